"""What is measured, with which goal, and whether every block came back."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from kvferry.transfer.bench.cases import Bytes, clear

Kind = Literal["put", "get", "exists", "disk-write", "disk-read", "restart"]
NUM_KEYS = 1000
WARM_UP = 4
"""Repeats that are not counted: memory is touched, connections are made, and what adapts has adapted."""


class Goal(NamedTuple):
    """At least `ratio` times what `against` does in the same round; or, where that is None, at most `p50_ms`."""

    against: str | None = None
    ratio: float | None = None
    p50_ms: float | None = None


class Case(NamedTuple):
    """Blocks of `block_bytes`, `batch` of them a call. `goals` by system."""

    name: str
    kind: Kind
    block_bytes: int
    batch: int
    goals: dict[str, Goal]

    @property
    def is_latency(self) -> bool:
        return self.kind in ("exists", "restart")

    @property
    def shape(self) -> tuple[int, int]:
        return self.block_bytes, self.batch


MIB, KIB = 1 << 20, 1 << 10
_all = (
    Case("get-1m", "get", MIB, 64, {"kvferry": Goal("memcpy", 0.8), "kvferry-tcp": Goal("mooncake", 2.0)}),
    Case("put-1m", "put", MIB, 64, {"kvferry": Goal("memcpy", 0.6)}),
    Case("get-64k", "get", 64 * KIB, 256, {"kvferry": Goal("memcpy", 0.5)}),
    Case("put-64k", "put", 64 * KIB, 256, {}),
    Case("get-1m-single", "get", MIB, 1, {}),
    Case("put-1m-single", "put", MIB, 1, {}),
    Case("exists", "exists", 4 * KIB, NUM_KEYS, {"kvferry": Goal(p50_ms=0.5), "kvferry-redis": Goal(p50_ms=6.0)}),
    Case("disk-write", "disk-write", MIB, 8, {"kvferry": Goal("fio", 0.8)}),
    Case("disk-read", "disk-read", MIB, 64, {"kvferry": Goal("fio", 0.8)}),
    Case("restart", "restart", MIB, 1, {"kvferry": Goal(p50_ms=1000.0)}),
)
CASES: dict[str, Case] = {case.name: case for case in _all}


class Scale(NamedTuple):
    """How much is moved: bytes of each memory case and of each disk case, in files under `disk_path`; blocks on disk at
    a restart; and how often a round times the same."""

    memory_bytes: int
    disk_bytes: int
    restart_blocks: int
    repeats: int
    disk_path: str


class Result(NamedTuple):
    """What one system gave in one round: seconds of each repeat; `verified` is None where it can't be looked at."""

    case: str
    seconds: list[float]
    nbytes: int
    verified: bool | None


class Journey(NamedTuple):
    """One repeat: fresh keys, and where their blocks lie and go; int64 [num_blocks] each, in random order."""

    keys: list[bytes]
    sources: list[int]
    targets: list[int]


_numbers = itertools.count(1)


def fresh_keys(count: int) -> list[bytes]:
    """Block hashes that no store has seen."""
    return [next(_numbers).to_bytes(32, "big") for _ in range(count)]


def journey(num_blocks: int, block_bytes: int, seed: int) -> Journey:
    """A repeat of `num_blocks`. Another seed sends other blocks under the keys."""
    shuffle = np.random.default_rng(seed).permutation
    sources, targets = (shuffle(num_blocks) * block_bytes for _ in range(2))
    return Journey(fresh_keys(num_blocks), sources.tolist(), targets.tolist())


def arrived(made: Journey, block_bytes: int, source: Bytes, target: Bytes) -> bool:
    """Whether each block lies where it had to go."""
    return all(
        np.array_equal(source[s : s + block_bytes], target[t : t + block_bytes])
        for s, t in zip(made.sources, made.targets, strict=True)
    )


def seconds_of(call: Callable[[], object]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


__all__ = ["CASES", "Bytes", "Case", "Goal", "Journey", "Result", "Scale", "arrived", "clear", "fresh_keys", "journey"]
