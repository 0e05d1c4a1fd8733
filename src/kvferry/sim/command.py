"""`kvferry sim`: search seeds for broken invariants (`faults`), replay a trace through eviction policies (`cache`)."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from kvferry.errors import ConfigError
from kvferry.policy.eviction_choice import POLICY_NAMES
from kvferry.sim.cache import describe as describe_ratios
from kvferry.sim.cache import parse_capacities, plot, replay_all
from kvferry.sim.faults import Report, run_seed, run_seeds
from kvferry.sim.rules import RULES, Rules

SHOWN_VIOLATIONS = 20


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register `kvferry sim`."""
    parser = subparsers.add_parser(
        "sim",
        help="run the protocol under a virtual clock and look for faults",
        description="Runs the protocol's real state machines in simulated clusters that lose messages, crash and stop.",
    )
    kinds = parser.add_subparsers(title="searches", metavar="SEARCH", required=True)
    rules = "; ".join(f"{name}: {text}" for name, text in RULES.items())
    faults = kinds.add_parser(
        "faults",
        help="run seeds and check the invariants after each step",
        description="Each seed is a cluster with requests and faults of its own. Exit status 1 if an invariant broke.",
        epilog=f"The rules. {rules}.",
    )
    faults.add_argument("--seeds", default="0:1000", metavar="A:B", help="run seeds A to B-1 (default 0:1000)")
    faults.add_argument("--replay", type=int, metavar="SEED", help="run one seed and print everything that happens")
    faults.add_argument(
        "--rules-off", default="", metavar="R1,...", help="break these rules, to see that it is noticed"
    )
    faults.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: all cores)"
    )
    faults.add_argument("--json", action="store_true", help="print one JSON object")
    faults.set_defaults(run=run_faults)
    cache = kinds.add_parser(
        "cache",
        help="replay a request trace through the pool's eviction policies",
        description="Hit ratios by policy and capacity, with Belady's bound and an unbounded cache beside them.",
    )
    cache.add_argument("--trace", required=True, metavar="FILE", help="requests, one JSON object a line")
    cache.add_argument("--capacity", default="3M,10M,50M", metavar="N,...", help="tokens (default 3M,10M,50M)")
    cache.add_argument("--policy", default=",".join(POLICY_NAMES), metavar="NAME,...", help="default: %(default)s")
    cache.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: all cores)"
    )
    cache.add_argument("--json", action="store_true", help="print one JSON object for each policy and capacity")
    cache.add_argument("--plot", metavar="FILE", help="draw hit ratio over capacity into this file (PNG, SVG, PDF)")
    cache.set_defaults(run=run_cache)


def run_faults(args: argparse.Namespace) -> int:
    """Search or replay. Raises: ConfigError for seeds or rules that are none."""
    off = [name.strip() for name in args.rules_off.split(",") if name.strip()]
    if args.replay is not None:
        return _replay(args.replay, Rules(off), as_json=args.json)
    report = run_seeds(parse_seeds(args.seeds), off, num_processes=max(1, args.jobs))
    _print(msgspec.json.encode(report).decode() if args.json else describe(report))
    return 1 if report.violations else 0


def run_cache(args: argparse.Namespace) -> int:
    """Replay. Raises: ConfigError for a trace, capacities or policies that are none."""
    capacities = parse_capacities(args.capacity)
    policies = [name.strip() for name in args.policy.split(",") if name.strip()]
    results = replay_all(Path(args.trace), policies, capacities, num_processes=max(1, args.jobs))
    if args.json:
        _print("\n".join(msgspec.json.encode(result).decode() for result in results))
    else:
        _print(describe_ratios(results))
    if args.plot:
        plot(results, Path(args.plot))
    return 0


def parse_seeds(text: str) -> range:
    """`A:B` or `N` (that one seed) as a range. Raises: ConfigError."""
    first, colon, stop = text.partition(":")
    try:
        seeds = range(int(first), int(stop) if colon else int(first) + 1)
    except ValueError:
        seeds = range(0)
    if not seeds:
        raise ConfigError(f"--seeds {text!r} names no seed; write A:B with A < B, such as 0:1000")
    return seeds


def describe(report: Report) -> str:
    """The report as a few lines for a person."""
    counts = report.counts
    ends = ", ".join(f"{counts.get(end, 0)} {end}" for end in ("delivered", "recomputed", "aborted", "failed"))
    faults = ("dropped", "duplicated", "late", "corrupted", "crashes", "stops", "partitions", "preemptions", "hangs")
    lines = [
        f"{report.runs} seeds, {report.steps} steps in {report.duration_s:.1f} s",
        f"handoffs: {ends}",
        "faults: " + ", ".join(f"{counts.get(fault, 0)} {fault}" for fault in faults),
        f"longest time to a terminal state {report.worst_terminal_s:.2f} s, "
        f"at most {report.worst_overrun_s:.2f} s past the deadline; {report.long_drains} long drains",
    ]
    if report.rules_off:
        lines.append(f"broken on purpose: {', '.join(report.rules_off)}")
    lines.append(f"{len(report.violations)} violations")
    again = f" --rules-off {','.join(report.rules_off)}" if report.rules_off else ""
    lines += [
        f"  seed {v.seed} at {v.at_s:.3f} s: {v.invariant}: {v.what}" for v in report.violations[:SHOWN_VIOLATIONS]
    ]
    if report.violations:
        lines.append(f"replay: kvferry sim faults --replay {report.violations[0].seed}{again}")
    return "\n".join(lines)


def _replay(seed: int, rules: Rules, *, as_json: bool) -> int:
    result = run_seed(seed, rules, trace=True)
    violation = result.violation
    if as_json:
        _print(msgspec.json.encode(result).decode())
    else:
        end = "no violation" if violation is None else f"{violation.invariant} is broken: {violation.what}"
        _print("\n".join([f"seed {seed}: {result.plan}", *result.story, end]))
    return 0 if violation is None else 1


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
