"""Rounds of all systems in turn, each in fresh processes, and the figures made of them."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kvferry.transfer.bench.cases import cases
from kvferry.transfer.bench.turns import turns
from kvferry.transfer.bench.worker import SYSTEMS

WITHIN_S = 180.0
"""A half that is not done by then is killed, and its system is skipped with what it wrote last."""


class Pair:
    """The two processes of one system in one round."""

    def __init__(self, system: str, wanted: list[str], nbytes: int, peers: list[str]) -> None:
        self._cases = wanted
        self._given = {"system": system, "nbytes": nbytes, "peers": peers, "cases": wanted}

    def run(self) -> list[dict[str, Any]]:
        """One result a case. Raises: RuntimeError with the last lines that a half wrote before it failed."""
        with _Half(self._given | {"role": "owner"}) as owner:
            hello = owner.hear()
            if "why_not" in hello:
                return [hello]
            with _Half(self._given | {"role": "reader", "hello": hello}) as reader:
                answer = reader.hear()
                if answer is not None:
                    owner.say(answer)
                    owner.hear()
                reader.say({})
                return [reader.hear() for _ in self._cases]


class _Half:
    def __init__(self, given: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kvferry.transfer.bench.worker", json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"UCX_LOG_LEVEL": "error", "NIXL_LOG_LEVEL": "ERROR"},
        )
        self._watch = threading.Timer(WITHIN_S, self._process.kill)
        self._watch.daemon = True
        self._watch.start()

    def say(self, value: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()

    def hear(self) -> Any:
        assert self._process.stdout is not None and self._process.stderr is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.kill()
            said = self._process.stderr.read().strip().splitlines()
            raise RuntimeError(" / ".join(said[-3:]) or "it ended without a word")
        return json.loads(line)

    def __enter__(self) -> _Half:
        return self

    def __exit__(self, *exc: object) -> None:
        self._watch.cancel()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None and not stream.closed:
                try:
                    stream.close()
                except BrokenPipeError:
                    pass
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stderr is not None:
            self._process.stderr.close()


def run_rounds(
    systems: list[str], wanted: list[str], *, rounds: int, nbytes: int, peers: list[str], say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Measure, then give one object for each system and case; a system that can't run gives one with `skipped`."""
    seen: dict[tuple[str, str], list[dict[str, Any]]] = {}
    skipped: dict[str, str] = {}
    # The ceilings of what is asked for are measured too: there is no ratio without them.
    order = list(dict.fromkeys([*(SYSTEMS[name].ceiling for name in systems), *systems]))
    try:
        _measure(order, wanted, rounds, nbytes, peers, say, seen, skipped)
    except KeyboardInterrupt:
        say("stopped: the figures are those of the rounds so far")
    machine = describe_machine()
    for name in order:
        for case in wanted:
            if (name, case) in seen:
                yield _figures(name, case, seen, nbytes) | machine
        if name in skipped:
            yield {"system": name, "case": None, "skipped": skipped[name], "verified": False}


def _measure(
    order: list[str],
    wanted: list[str],
    rounds: int,
    nbytes: int,
    peers: list[str],
    say: Callable[[str], None],
    seen: dict[tuple[str, str], list[dict[str, Any]]],
    skipped: dict[str, str],
) -> None:
    """Fill `seen` and `skipped`, round after round."""
    for name in turns(order, rounds, skipped, say):
        try:
            results = Pair(name, wanted, nbytes, peers).run()
        except (RuntimeError, ValueError, BrokenPipeError) as error:
            skipped[name] = f"failed: {error}"
            continue
        if "why_not" in results[0]:
            skipped[name] = results[0]["why_not"]
            continue
        for result in results:
            seen.setdefault((name, result["case"]), []).append(result)


def _figures(name: str, case: str, seen: dict[tuple[str, str], list[dict[str, Any]]], nbytes: int) -> dict[str, Any]:
    mine, ceiling = seen[name, case], seen.get((SYSTEMS[name].ceiling, case), [])
    shape = cases(nbytes)[case]
    per_round = [statistics.median(result["seconds"]) for result in mine]
    ratios = [
        (ours / theirs if shape.is_latency else theirs / ours)
        for ours, theirs in zip(per_round, (statistics.median(r["seconds"]) for r in ceiling), strict=False)
    ]
    figures: dict[str, Any] = {"system": name, "case": case}
    if shape.is_latency:
        every = np.concatenate([result["seconds"] for result in mine]) * 1e6
        figures |= {
            "p50_us": round(float(np.percentile(every, 50)), 2),
            "p99_us": round(float(np.percentile(every, 99)), 2),
        }
    else:
        figures |= {
            "GBps": round(shape.total_bytes / statistics.median(per_round) / 1e9, 2),
            "GBps_rounds": [round(shape.total_bytes / seconds / 1e9, 2) for seconds in per_round],
        }
    return figures | {
        "ceiling": SYSTEMS[name].ceiling,
        "ratio_to_ceiling": round(statistics.median(ratios), 3) if ratios else None,
        "verified": all(result["verified"] for result in mine),
        "rounds": len(mine),
        "bytes": shape.total_bytes,
    }


def describe_machine() -> dict[str, Any]:
    """Commit, processor, cores and kernel, for each object of the result."""
    here = Path(__file__).parent
    try:
        asked = ["git", "-C", str(here), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # No git here.
        commit = ""
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "unknown"
    )
    return {
        "commit": commit or "unknown",
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
