"""Rounds of all systems in turn, each in fresh processes, and the figures made of them."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

from kvferry.pool.bench.cases import CASES, Goal, Scale
from kvferry.pool.bench.worker import SYSTEMS
from kvferry.transfer.bench.runner import describe_machine
from kvferry.transfer.bench.turns import turns

WITHIN_S = 300.0
Seen = dict[tuple[str, str], list[dict[str, Any]]]


def run_round(system: str, cases: list[str], scale: Scale, peers: list[str]) -> list[dict[str, Any]]:
    """One result a case that the system has. Raises: RuntimeError with the last lines that it wrote."""
    given = {"system": system, "cases": cases, "scale": scale._asdict(), "peers": peers}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "kvferry.pool.bench.worker", json.dumps(given)],
            capture_output=True,
            text=True,
            timeout=WITHIN_S,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"not done within {WITHIN_S:.0f} s") from error
    if done.returncode:
        raise RuntimeError(" / ".join(done.stderr.strip().splitlines()[-3:]) or f"exit status {done.returncode}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def run_rounds(
    systems: list[str], cases: list[str], *, rounds: int, scale: Scale, peers: list[str], say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Measure, then give one object for each system and case; a system that can't run gives one with `skipped`."""
    seen: Seen = {}
    skipped: dict[str, str] = {}
    kinds = {CASES[name].kind for name in cases}
    order = [name for name in _with_rivals(systems, cases) if SYSTEMS[name].kinds & kinds]
    try:
        for name in turns(order, rounds, skipped, say):
            try:
                results = run_round(name, cases, scale, peers)
            except (RuntimeError, ValueError) as error:
                skipped[name] = f"failed: {error}"
                continue
            for result in results:
                if "why_not" in result:
                    skipped[name] = result["why_not"]
                else:
                    seen.setdefault((name, result["case"]), []).append(result)
    except KeyboardInterrupt:
        say("stopped: the figures are those of the rounds so far")
    machine = describe_machine()
    for case in cases:
        for name in order:
            if (name, case) in seen:
                yield figures(name, case, seen) | machine
    for name, why in skipped.items():
        yield {"system": name, "case": None, "skipped": why, "verified": None}


def _with_rivals(systems: list[str], cases: list[str]) -> list[str]:
    """What is asked for, after what it is compared with: there is no ratio without."""
    goals = [CASES[case].goals.get(name, Goal()) for case in cases for name in systems]
    rivals = ["memcpy", *(goal.against for goal in goals if goal.against is not None)]
    return list(dict.fromkeys([*rivals, *systems]))


def figures(name: str, case_name: str, seen: Seen) -> dict[str, Any]:
    """Medians over the rounds, the ratio to a rival's of the same rounds, and whether the goal is reached."""
    case = CASES[case_name]
    goal = case.goals.get(name, Goal())
    mine = seen[name, case_name]
    per_round = [statistics.median(result["seconds"]) for result in mine]
    row: dict[str, Any] = {"system": name, "case": case_name}
    if case.is_latency:
        every = sorted(seconds for result in mine for seconds in result["seconds"])
        row |= {"p50_ms": round(1e3 * statistics.median(every), 3), "best_ms": round(1e3 * every[0], 3)}
    else:
        rates = [result["nbytes"] / seconds / 1e9 for result, seconds in zip(mine, per_round, strict=True)]
        row |= {"GBps": round(statistics.median(rates), 2), "GBps_rounds": [round(rate, 2) for rate in rates]}
    # Where no goal names another, everything that moves memory is held against the copy.
    against = goal.against or ("memcpy" if case.kind in ("put", "get") else None)
    theirs = [statistics.median(result["seconds"]) for result in seen.get((against or "", case_name), [])]
    ratios = [rival / ours for ours, rival in zip(per_round, theirs, strict=False)]
    ratio = round(statistics.median(ratios), 3) if ratios else None
    reached: bool | None = None
    if goal.ratio is not None and ratio is not None:
        reached = ratio >= goal.ratio
    elif goal.p50_ms is not None:
        reached = row["p50_ms"] <= goal.p50_ms
    verdicts = [result["verified"] for result in mine]
    return row | {
        "ratio": ratio,
        "against": against,
        "goal": goal.ratio if goal.ratio is not None else goal.p50_ms,
        "reached": reached,
        "verified": None if None in verdicts else all(verdicts),
        "rounds": len(mine),
        "amount": mine[0]["nbytes"],
    }
