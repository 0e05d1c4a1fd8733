"""What a running cluster looks like: instances, open handoffs and requests, or plain lines where no terminal is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kvferry.cluster.processes import Child
from kvferry.cluster.router_view import EndedRequest, HandoffRow, InstanceRow, OpenRequest, Requests, RouterView
from kvferry.errors import KVError
from kvferry.types import Side, TerminalState

REFRESH_S = 0.5
NUM_REQUESTS_SHOWN = 12
MIN_REQUESTS_SHOWN = 3
NUM_HANDOFFS_SHOWN = 8
SILENT_WARN_S = 2.0
LATE_HANDOFF_S = 2.0
DOCTORS_OWN = "kvferry-doctor-"
"""Names of the stand-ins that `kvferry doctor --probe` registers; some of its requests are meant to fail."""
_COLOURS = {
    TerminalState.DELIVERED: "green",
    TerminalState.RECOMPUTED: "yellow",
    TerminalState.ABORTED: "dim",
    TerminalState.FAILED: "bold red",
}
_TROUBLE = (TerminalState.RECOMPUTED, TerminalState.FAILED)


@dataclass(frozen=True)
class Picture:
    """One look at the cluster. `children` is empty when the processes are someone else's."""

    url: str
    instances: Sequence[InstanceRow] = ()
    requests: Requests = field(default_factory=Requests)
    children: Sequence[Child] = ()
    trouble: str = ""


async def look(router: RouterView, children: Sequence[Child] = ()) -> Picture:
    """Ask the router; what went wrong is part of the picture."""
    try:
        return Picture(router.url, await router.instances(), await router.requests(), children)
    except KVError as error:
        return Picture(router.url, children=children, trouble=str(error))


async def show_live(
    router: RouterView,
    console: Console,
    *,
    hint: str,
    children: Sequence[Child] = (),
    check: Callable[[], None] = lambda: None,
) -> None:
    """Show the cluster until cancelled: a live table on a terminal, else a line for each request that ends.

    Args:
        hint: the last line of the table.
        check: called at each refresh; what it raises ends the show.
    """
    if not console.is_terminal:
        await _show_lines(router, console, check)
        return
    # On the alternate screen, so that the table can't be torn by what else is written.
    with Live(console=console, auto_refresh=False, screen=True) as live:
        while True:
            check()
            picture = await look(router, children)
            live.update(draw(picture, hint, console.height), refresh=True)
            await asyncio.sleep(REFRESH_S)


async def _show_lines(router: RouterView, console: Console, check: Callable[[], None]) -> None:
    seen: set[str] = set()
    while True:
        check()
        picture = await look(router)
        for record in picture.requests.recent:
            key = f"{record.request} {record.handoff}"
            if key not in seen:
                seen.add(key)
                console.print(_as_line(record), highlight=False, soft_wrap=True, markup=False)
        await asyncio.sleep(REFRESH_S)


def draw(picture: Picture, hint: str, height: int) -> RenderableType:
    """The whole screen: instances, open handoffs, requests, and a hint."""
    parts: list[RenderableType] = [Text.from_markup(f"[bold]kvferry[/]  {escape(picture.url)}"), Text()]
    if picture.trouble:
        parts.append(Text(picture.trouble, style="bold red"))
    instances = _instances(picture)
    parts += [instances, Text()]
    room = max(MIN_REQUESTS_SHOWN, height - instances.row_count - 9)
    open_handoffs = _handoffs(picture.requests, min(NUM_HANDOFFS_SHOWN, room - MIN_REQUESTS_SHOWN - 2))
    if open_handoffs.row_count:
        parts += [open_handoffs, Text()]
        room -= open_handoffs.row_count + 2
    recent = _others(picture.requests)
    last = next((record for record in reversed(recent) if record.state in _TROUBLE and record.detail), None)
    room = min(NUM_REQUESTS_SHOWN, room - (last is not None))
    parts += [_requests(picture.requests.requests, recent, room), Text()]
    if last is not None:
        told = f"{last.request} {last.state}: {last.detail}"
        parts.append(Text(told, style=_COLOURS[last.state], no_wrap=True, overflow="ellipsis"))
    parts.append(Text(f"times in ms   {hint}", style="dim"))
    return Group(*parts)


def _instances(picture: Picture) -> Table:
    table = _table("instance", "role", "pid", "URL", "KV blocks in use", "running", "waiting", "report", "state")
    children = {child.name: child for child in picture.children if child.name != "router"}
    for row in sorted(picture.instances, key=lambda row: (row.role != "prefill", row.instance_id)):
        child = children.pop(row.instance_id, None)
        table.add_row(
            escape(row.instance_id),
            row.role,
            str(child.pid) if child is not None else "",
            escape(row.url),
            _bar(row.num_blocks - row.free_blocks, row.num_blocks),
            str(row.running),
            str(row.waiting),
            f"{row.silent_s:.1f} s ago",
            _state(row, child),
        )
    for name, child in children.items():
        state = "[bold red]died[/]" if child.has_died else "[yellow]not in the router's table[/]"
        table.add_row(escape(name), "", str(child.pid), "", "", "", "", "", state)
    return table


def _state(row: InstanceRow, child: Child | None) -> str:
    if child is not None and child.has_died:
        return "[bold red]died[/]"
    if row.mismatches:
        return f"[bold red]does not fit: {escape('; '.join(row.mismatches))}[/]"
    if row.stuck:
        return "[bold red]stuck[/]"
    if row.silent_s > SILENT_WARN_S:
        return "[yellow]silent[/]"
    return "[green]serving[/]"


def _bar(used: int, total: int, width: int = 12) -> str:
    if total <= 0:
        return ""
    # One block in use must be seen, so the bar rounds up.
    filled = min(width, -(-used * width // total))
    return f"[cyan]{'█' * filled}[/][dim]{'░' * (width - filled)}[/] {used}/{total}"


def _others(requests: Requests) -> list[EndedRequest]:
    """The latest ended requests without the doctor's own."""
    return [r for r in requests.recent if not (r.decode or "").startswith(DOCTORS_OWN)]


def _requests(requests: Sequence[OpenRequest], recent: Sequence[EndedRequest], room: int) -> Table:
    table = _table("request", "pair", "state", "queue", "prefill", "handoff", "decode", "TTFT", "KV bytes", "why")
    open_ones = requests[-room:]
    for request in open_ones:
        pair = _pair(request.prefill, request.decode)
        table.add_row(escape(request.request[:20]), pair, f"[cyan]{request.stage}[/] {request.age_s:.1f} s", *[""] * 7)
    ended = recent[-(room - len(open_ones)) :] if room > len(open_ones) else []
    for record in reversed(ended):
        table.add_row(
            escape(record.request[:20]),
            _pair(record.prefill, record.decode),
            f"[{_COLOURS[record.state]}]{record.state}[/]",
            *(_ms(record.stages.get(stage)) for stage in ("queue", "prefill", "handoff", "decode")),
            _ms(record.ttft_s),
            f"{record.handoff_bytes:,}",
            escape(_why(record)),
        )
    if not table.row_count:
        table.add_row("[dim]none yet[/]")
    return table


def _handoffs(requests: Requests, room: int) -> Table:
    """Open handoffs, the oldest first: what each of the two sides says of it."""
    table = _table("open handoff", "prefill side", "decode side", "age", "remains", "how far")
    sides: dict[str, dict[Side, HandoffRow]] = {}
    for row in requests.handoffs:
        sides.setdefault(row.handoff, {})[row.side] = row
    oldest_first = sorted(sides.items(), key=lambda item: -max(row.age_s for row in item[1].values()))
    for handoff, views in oldest_first[: max(0, room)]:
        source, target = views.get("source"), views.get("target")
        age_s = max(row.age_s + row.reported_s for row in views.values())
        remaining_s = min(row.remaining_s - row.reported_s for row in views.values())
        named = target.peer if target is not None else ""
        table.add_row(
            escape(handoff[:12]),
            _one_side(source) if source is not None else f"{escape(named)} [yellow]not known there[/]".strip(),
            _one_side(target) if target is not None else "[yellow]not subscribed[/]",
            f"[{'yellow' if age_s > LATE_HANDOFF_S else 'default'}]{age_s:.1f} s[/]",
            f"{max(0.0, remaining_s):.1f} s",
            escape((target or source or HandoffRow("", "", "source", "", 0, 0)).detail),
        )
    return table


def _one_side(row: HandoffRow) -> str:
    return f"{escape(row.instance)} [cyan]{escape(row.stage)}[/]"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", expand=False)
    right = ("age", "remains", "running", "waiting", "queue", "prefill", "handoff", "decode", "TTFT", "KV bytes", "pid")
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=True)
    return table


def _pair(prefill: str | None, decode: str | None) -> str:
    return escape(f"{prefill} → {decode}") if prefill and decode else escape(prefill or decode or "")


def _why(record: EndedRequest) -> str:
    if record.state is TerminalState.DELIVERED:
        return record.transport or ""
    return " ".join(part for part in (record.stage, record.cause) if part)


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1000:.1f}"


def _as_line(record: EndedRequest) -> str:
    stages = " ".join(f"{stage}={seconds * 1000:.1f}ms" for stage, seconds in record.stages.items())
    pair = f"{record.prefill}->{record.decode}" if record.prefill else record.decode or ""
    why = _why(record)
    if record.state in _TROUBLE and record.detail:
        why += f": {record.detail}"
    return f"{record.request} {record.state} {pair} {stages} bytes={record.handoff_bytes}" + (f" {why}" if why else "")
