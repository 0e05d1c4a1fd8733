"""`kvferry bench pool`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from kvferry.errors import ConfigError
from kvferry.transfer import command as transfer


def add_parser(subparsers: Any) -> None:
    """Register `bench` with the subjects `transfer` and `pool`."""
    subjects = transfer.add_parser(subparsers)
    parser = subjects.add_parser("pool", help="puts, gets and lookups beside other stores, the disk tier beside fio")
    parser.add_argument("--systems", nargs="+", metavar="NAME", help="such as kvferry mooncake; default: all")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="such as get-1m disk-write; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="each runs every system once, in turn (default 5)")
    parser.add_argument("--mib", type=int, default=256, help="what memory cases move; disk cases twice (default 256)")
    parser.add_argument("--restart-blocks", type=int, default=10_000, help="blocks on disk at the restart")
    parser.add_argument("--disk", metavar="DIR", help="where the disk cases write (default: the temporary directory)")
    parser.add_argument("--json", action="store_true", help="one object a line, and nothing else, on standard output")
    parser.add_argument("--plot", metavar="OUT.png", help="write a bar chart")
    parser.add_argument("--peers", metavar="DIR", help="site-packages of other systems (default: those of .venv-peers)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure and tell. Returns 1 if a system that ran gave a wrong byte or answer."""
    from kvferry.pool.bench.cases import CASES, Scale
    from kvferry.pool.bench.runner import run_rounds
    from kvferry.pool.bench.worker import SYSTEMS

    systems, cases = arguments.systems or list(SYSTEMS), arguments.cases or list(CASES)
    unknown = [name for name in systems if name not in SYSTEMS] + [name for name in cases if name not in CASES]
    if unknown or arguments.rounds < 1 or arguments.mib < 16 or arguments.mib % 16 or arguments.restart_blocks < 1:
        raise ConfigError(
            f"{' '.join(unknown) or 'names'} of systems and cases, --rounds {arguments.rounds}, --mib {arguments.mib}, "
            f"--restart-blocks {arguments.restart_blocks}: there are the systems {', '.join(SYSTEMS)} and the cases "
            f"{', '.join(CASES)}; rounds and blocks are at least 1, MiB a multiple of 16"
        )
    kinds = {CASES[name].kind for name in cases}
    if not any(SYSTEMS[name].kinds & kinds for name in systems):
        raise ConfigError(f"none of {', '.join(systems)} does {', '.join(cases)}; leave --systems out for all")
    peers = [arguments.peers] if arguments.peers else [str(p) for p in Path(".venv-peers").glob("lib/*/site-packages")]
    nbytes = arguments.mib << 20
    scale = Scale(nbytes, 2 * nbytes, arguments.restart_blocks, 3, arguments.disk or tempfile.gettempdir())

    def say(text: str) -> None:
        sys.stderr.write(text + "\n")

    rows = []
    for row in run_rounds(systems, cases, rounds=arguments.rounds, scale=scale, peers=peers, say=say):
        rows.append(row)
        sys.stdout.write((json.dumps(row) if arguments.json else _line(row)) + "\n")
        sys.stdout.flush()
    if arguments.plot:
        from kvferry.pool.bench.plot import plot

        plot([row for row in rows if "skipped" not in row], arguments.plot)
    return 1 if any(row["verified"] is False for row in rows) else 0


def _line(row: dict[str, Any]) -> str:
    if "skipped" in row:
        return f"{row['system']:13} skipped: {row['skipped']}"
    figure = f"{row['GBps']:8.2f} GB/s" if "GBps" in row else f"{row['p50_ms']:8.2f} ms p50"
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f} x {row['against']}"
    reached = "" if row["reached"] is None else f"goal {row['goal']}: {'reached' if row['reached'] else 'MISSED'}"
    right = {True: "every block compared", False: "WRONG", None: ""}[row["verified"]]
    return f"{row['case']:13} {row['system']:13} {figure}  {ratio:18} {reached:18} {right}".rstrip()
