"""`kvferry bench transfer`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from kvferry.errors import ConfigError

_CASES = ("paged", "big", "lat4k")


def add_parser(subparsers: Any) -> Any:
    """Register `bench` with the subject `transfer`. Returns the subjects, for the rooms above to add theirs."""
    bench = subparsers.add_parser("bench", help="measure kvferry beside other systems")
    subjects = bench.add_subparsers(title="subjects", metavar="SUBJECT", dest="subject", required=True)
    parser = subjects.add_parser("transfer", help="reads of blocks between two processes of this machine")
    parser.add_argument("--systems", nargs="+", metavar="NAME", help="such as kvferry-shm mooncake-tcp; default: all")
    parser.add_argument("--cases", nargs="+", choices=_CASES, default=list(_CASES))
    parser.add_argument("--rounds", type=int, default=5, help="each runs every system once, in turn (default 5)")
    parser.add_argument("--mib", type=int, default=1024, help="what `paged` and `big` move (default 1024)")
    parser.add_argument("--json", action="store_true", help="one object a line, and nothing else, on standard output")
    parser.add_argument("--plot", metavar="OUT.png", help="write a bar chart")
    parser.add_argument("--peers", metavar="DIR", help="site-packages of other systems (default: those of .venv-peers)")
    parser.set_defaults(run=run)
    return subjects


def run(arguments: argparse.Namespace) -> int:
    """Measure and tell. Returns 1 if a system that ran moved a wrong byte."""
    from kvferry.transfer.bench.runner import run_rounds
    from kvferry.transfer.bench.worker import SYSTEMS

    systems = _names(arguments.systems) or list(SYSTEMS)
    unknown = [name for name in systems if name not in SYSTEMS]
    if unknown or arguments.rounds < 1 or arguments.mib < 16 or arguments.mib % 16:
        raise ConfigError(
            f"--systems {' '.join(unknown) or 'fine'}, --rounds {arguments.rounds}, --mib {arguments.mib}: there are "
            f"{', '.join(SYSTEMS)}; rounds are at least 1, MiB a multiple of 16"
        )
    peers = [arguments.peers] if arguments.peers else [str(p) for p in Path(".venv-peers").glob("lib/*/site-packages")]

    def say(text: str) -> None:
        sys.stderr.write(text + "\n")

    figures = []
    for row in run_rounds(
        systems, arguments.cases, rounds=arguments.rounds, nbytes=arguments.mib << 20, peers=peers, say=say
    ):
        figures.append(row)
        sys.stdout.write((json.dumps(row) if arguments.json else _line(row)) + "\n")
        sys.stdout.flush()
    if arguments.plot:
        from kvferry.transfer.bench.plot import plot

        plot([row for row in figures if "skipped" not in row], arguments.plot)
    return 0 if all(row["verified"] or "skipped" in row for row in figures) else 1


def _names(given: list[str] | None) -> list[str]:
    return [name for text in given or [] for name in text.split(",") if name]


def _line(row: dict[str, Any]) -> str:
    if "skipped" in row:
        return f"{row['system']:13} skipped: {row['skipped']}"
    figure = f"{row['GBps']:7.2f} GB/s" if "GBps" in row else f"{row['p50_us']:7.1f} µs p50 {row['p99_us']:8.1f} µs p99"
    right = "every block compared" if row["verified"] else "WRONG BYTES"
    return f"{row['system']:13} {row['case']:6} {figure}  {row['ratio_to_ceiling']:.2f} x {row['ceiling']}  {right}"
