"""What is measured: the cases, their data and offsets, and whether every block arrived."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvferry.layout import Offsets

Bytes = npt.NDArray[np.uint8]
_TILE = 16 << 20
WARM_UP = 4


class Case(NamedTuple):
    """`num_blocks` of `block_bytes` in one call; both sides' blocks in random order. `repeats` timed calls a round."""

    name: str
    num_blocks: int
    block_bytes: int
    repeats: int

    @property
    def total_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def is_latency(self) -> bool:
        return self.num_blocks == 1


def cases(total_bytes: int) -> dict[str, Case]:
    """The cases of issue and docs, with `total_bytes` (1 GiB there) moved by the two that measure bandwidth."""
    return {
        "paged": Case("paged", total_bytes // (64 << 10), 64 << 10, 3),
        "big": Case("big", max(1, total_bytes // (16 << 20)), 16 << 20, 3),
        "lat4k": Case("lat4k", 1, 4096, 2000),
    }


class Plan(NamedTuple):
    """Offsets of one case: int64 [num_blocks] on either side; for a latency case many single blocks to choose from."""

    case: Case
    source: Offsets
    target: Offsets


def plan(case: Case, memory_bytes: int) -> Plan:
    rooms = memory_bytes // case.block_bytes
    count = min(rooms, 4096) if case.is_latency else case.num_blocks
    source = np.random.default_rng(1).permutation(rooms)[:count]
    target = np.random.default_rng(2).permutation(rooms)[:count]
    return Plan(case, source.astype(np.int64) * case.block_bytes, target.astype(np.int64) * case.block_bytes)


def fill(memory: Bytes) -> None:
    """Random bytes, the same in every process."""
    for first in range(0, len(memory), _TILE):
        memory[first : first + _TILE] = tile(first, len(memory))


def tile(first: int, total: int) -> Bytes:
    """The source's bytes from `first` on, at most one tile of them."""
    return np.frombuffer(np.random.default_rng(first).bytes(min(_TILE, total - first)), dtype=np.uint8)


def verify(memory: Bytes, wanted: Plan, moved: int | None = None) -> bool:
    """Whether every block that the case moved is in place.

    Args:
        moved: how many of the plan's blocks were moved; all by default.
    """
    size = wanted.case.block_bytes
    source, target = wanted.source[:moved], wanted.target[:moved]
    for first in range(0, len(memory), _TILE):
        inside = np.flatnonzero((source >= first) & (source < first + _TILE))
        if not inside.size:
            continue
        expected = tile(first, len(memory))
        for index in inside.tolist():
            s, t = int(source[index]) - first, int(target[index])
            if not np.array_equal(memory[t : t + size], expected[s : s + size]):
                return False
    return True


def clear(memory: Bytes) -> None:
    ctypes.memset(memory.ctypes.data, 0, len(memory))


def timed(call: Callable[[], None], repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls, after some that are not counted: memory is touched, connections are made,
    and what adapts has adapted (the plain sockets choose their streams by then, too)."""
    for _ in range(WARM_UP):
        call()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return seconds
