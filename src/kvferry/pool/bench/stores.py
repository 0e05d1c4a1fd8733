"""Stores in memory: one contract, and the run that times puts, gets and lookups of any of them."""

from __future__ import annotations

import abc
import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import numpy as np

from kvferry.pool.bench.cases import (
    NUM_KEYS,
    WARM_UP,
    Bytes,
    Case,
    Result,
    Scale,
    arrived,
    clear,
    fresh_keys,
    journey,
    seconds_of,
)
from kvferry.transfer.bench.cases import fill

LOOKUPS = 100


class Store(abc.ABC):
    """One store, open for blocks of one size. `source` and `target` are the caller's memory."""

    source: Bytes
    target: Bytes

    @abc.abstractmethod
    def put(self, keys: list[bytes], sources: list[int], nbytes: int, batch: int) -> None:
        """Store the blocks at these offsets of `source`, `batch` of them a call. Raises: RuntimeError if one is not."""

    @abc.abstractmethod
    def get(self, keys: list[bytes], targets: list[int], nbytes: int, batch: int) -> None:
        """Copy the blocks to these offsets of `target`. Raises: RuntimeError if one is not there."""

    def lookup(self, keys: list[bytes]) -> Callable[[], Sequence[object]]:
        """A call that asks which of these blocks are there; its answers are true where one is."""
        raise NotImplementedError

    def forget(self, keys: list[bytes]) -> None:  # noqa: B027  (most stores evict by themselves)
        """Make room; not timed."""

    def close(self) -> None:  # noqa: B027
        """Give everything back."""


class System(abc.ABC):
    """One system under test."""

    name: ClassVar[str]
    kinds: ClassVar[frozenset[str]]

    @classmethod
    def why_not(cls) -> str | None:
        """Why it can't run here; None where it can."""
        return None

    @abc.abstractmethod
    def measure(self, cases: list[Case], scale: Scale) -> Iterator[Result]:
        """One round: a result for each of these cases, all of its `kinds`."""


class StoreSystem(System):
    """A system that is measured as a `Store`."""

    kinds = frozenset({"put", "get", "exists"})

    @abc.abstractmethod
    def open(self, memory_bytes: int, block_bytes: int) -> contextlib.AbstractContextManager[Store]:
        """A store that is empty and has room for `memory_bytes`."""

    def measure(self, cases: list[Case], scale: Scale) -> Iterator[Result]:
        for shape in dict.fromkeys(case.shape for case in cases if case.kind in ("put", "get")):
            here = [case for case in cases if case.shape == shape and case.kind in ("put", "get")]
            with self.open(scale.memory_bytes, shape[0]) as store:
                yield from _moves(store, here, scale)
        for case in cases:
            if case.kind == "exists":
                with self.open(NUM_KEYS * case.block_bytes, case.block_bytes) as store:
                    yield _lookups(store, case)


def _moves(store: Store, cases: list[Case], scale: Scale) -> Iterator[Result]:
    """Put and get the same blocks, again and again with fresh keys, whichever of the two is asked for."""
    block_bytes, batch = cases[0].shape
    count = scale.memory_bytes // block_bytes
    seconds: dict[str, list[float]] = {"put": [], "get": []}
    verified = True
    for number in range(WARM_UP + scale.repeats):
        made = journey(count, block_bytes, number)
        clear(store.target)
        put_s = seconds_of(lambda: store.put(made.keys, made.sources, block_bytes, batch))  # noqa: B023
        get_s = seconds_of(lambda: store.get(made.keys, made.targets, block_bytes, batch))  # noqa: B023
        verified &= arrived(made, block_bytes, store.source, store.target)
        store.forget(made.keys)
        if number >= WARM_UP:
            seconds["put"].append(put_s)
            seconds["get"].append(get_s)
    for case in cases:
        yield Result(case.name, seconds[case.kind], scale.memory_bytes, verified)


def _lookups(store: Store, case: Case) -> Result:
    """Ask for many keys in one call, every other one of them there."""
    here, absent = fresh_keys(NUM_KEYS // 2), fresh_keys(NUM_KEYS // 2)
    places = [i * case.block_bytes for i in range(len(here))]
    store.put(here, places, case.block_bytes, len(here))
    asked = [key for pair in zip(here, absent, strict=True) for key in pair]
    lookup, answers = store.lookup(asked), list[Sequence[object]]()
    seconds = [seconds_of(lambda: answers.append(lookup())) for _ in range(WARM_UP + LOOKUPS)]
    right = all([bool(there) for there in answer] == [True, False] * len(here) for answer in answers)
    return Result(case.name, seconds[WARM_UP:], NUM_KEYS, right)


def memories(nbytes: int) -> tuple[Bytes, Bytes]:
    """A source with random bytes, the same in every process, and a target whose pages are there."""
    source, target = np.empty(nbytes, dtype=np.uint8), np.zeros(nbytes, dtype=np.uint8)
    fill(source)
    clear(target)
    return source, target


class _OneCopy(Store):
    def __init__(self, nbytes: int) -> None:
        self.source, self.target = memories(nbytes)

    def put(self, keys: list[bytes], sources: list[int], nbytes: int, batch: int) -> None:
        self._sources = sources
        ctypes.memmove(self.target.ctypes.data, self.source.ctypes.data, len(self.source))

    def get(self, keys: list[bytes], targets: list[int], nbytes: int, batch: int) -> None:
        ctypes.memmove(self.target.ctypes.data, self.source.ctypes.data, len(self.source))
        # It moves the memory as it lies; told here, so that the same comparison of every block fits.
        targets[:] = self._sources


class Memcpy(StoreSystem):
    """The ceiling: one thread, one contiguous copy of the same bytes."""

    name = "memcpy"
    kinds = frozenset({"put", "get"})

    @contextlib.contextmanager
    def open(self, memory_bytes: int, block_bytes: int) -> Iterator[Store]:
        yield _OneCopy(memory_bytes)
