"""Findings as a table for people or JSON for machines."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from kvferry.doctor.facts import ProbeStep
from kvferry.doctor.findings import Finding

_STYLE = {"error": "bold red", "warning": "yellow", "info": "cyan"}


def as_json(findings: list[Finding], probe: Sequence[ProbeStep] = ()) -> str:
    """`{"findings": [...]}`, and the steps of the probe with their figures if there was one."""
    body = {"findings": findings, "probe": probe} if probe else {"findings": findings}
    return msgspec.json.format(msgspec.json.encode(body)).decode()


def show_probe(steps: Sequence[ProbeStep], console: Console) -> None:
    """Print what the rendezvous over each transport came to: how far it got, and how fast it was."""
    table = Table("transport", "steps done", "moved", "speed", title="rendezvous", title_justify="left")
    for transport in dict.fromkeys(s.transport for s in steps):
        mine = [s for s in steps if s.transport == transport]
        done, moved = [s for s in mine if s.ok], next((s for s in mine if s.nbytes), None)
        failed = next((s for s in mine if not s.ok), None)
        far = ", ".join(s.step for s in done) + (f"; {failed.step} FAILED" if failed else "")
        size = f"{moved.nbytes >> 20} MiB in {moved.duration_s * 1e3:.1f} ms" if moved else ""
        table.add_row(transport, far, size, moved.detail if moved else "")
    console.print(table)


def show(findings: list[Finding], console: Console, examined: str) -> None:
    """Print the findings, each with what was seen, why it stalls decode and the change that mends it."""
    if not findings:
        console.print(Text(f"Nothing wrong found ({examined}).", style="green"))
        return
    for f in findings:
        grid = Table.grid(padding=(0, 1))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for label, text in (("seen", f.seen), ("why", f.why), ("fix", f.fix)):
            grid.add_row(label, Text(text))
        title = Text(f"{f.id} {f.severity}: {f.title}", style=_STYLE[f.severity])
        console.print(Panel(grid, title=title, title_align="left"))
    errors = sum(f.severity == "error" for f in findings)
    console.print(
        Text(f"{errors} error{'s' if errors != 1 else ''}, {len(findings) - errors} other ({examined}). ")
        + Text("More on each: docs/findings/ID.md", style="dim")
    )


def exit_status(findings: list[Finding]) -> int:
    """0 nothing wrong (warnings allowed), 1 findings of level error."""
    return 1 if any(f.severity == "error" for f in findings) else 0
