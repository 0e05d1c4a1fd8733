"""The node's host memory: the words of its leases, then slabs of one size. Engines map it read-only."""

from __future__ import annotations

import secrets
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from kvferry.errors import ConfigError
from kvferry.layout import Offsets
from kvferry.transport.base import Region
from kvferry.transport.memory import PAGE_BYTES, WORD_BYTES, WordTable
from kvferry.types import Word


def arena_bytes(num_slabs: int, slab_bytes: int, num_words: int) -> int:
    """The size of the region that an `Arena` with these figures needs."""
    return _round_up(num_words * WORD_BYTES) + num_slabs * _round_up(slab_bytes)


class Arena:
    """Slabs in one region. Each starts at a page, so that direct I/O reads and writes them in place."""

    def __init__(self, region: Region, *, slab_bytes: int, num_words: int) -> None:
        """
        Args:
            slab_bytes: the largest block; rounded up to whole pages.
        Raises: ConfigError if not one slab fits.
        """
        self.region = region
        self.slab_bytes = _round_up(slab_bytes)
        self.words = WordTable(region, capacity=num_words)
        self._first = _round_up(num_words * WORD_BYTES)
        self.num_slabs = (region.nbytes - self._first) // self.slab_bytes
        if slab_bytes < 1 or self.num_slabs < 1:
            raise ConfigError(
                f"an arena of {region.nbytes} bytes holds no slab of {slab_bytes}; give the pool more memory"
            )
        self._free = list(range(self.num_slabs - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Free slabs, at most `count`."""
        first = max(0, len(self._free) - count)
        taken = self._free[first:]
        del self._free[first:]
        taken.reverse()
        return taken

    def give(self, slabs: Iterable[int]) -> None:
        """Free slabs that nobody reads or writes any more."""
        self._free.extend(slabs)

    def offset(self, slab: int) -> int:
        """Where the slab starts in the region, in bytes."""
        return self._first + slab * self.slab_bytes

    def offsets(self, slabs: list[int]) -> Offsets:
        """int64 [num_slabs]: where these slabs start in the region, in bytes."""
        return np.asarray(slabs, dtype=np.int64) * self.slab_bytes + self._first

    def view(self, slab: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """uint8 [nbytes]: the slab's memory."""
        at = self.offset(slab)
        view: npt.NDArray[np.uint8] = self.region.buffer[at : at + nbytes]
        return view


def new_word() -> Word:
    """A fresh lease word."""
    return Word(secrets.randbits(63) | 1)


def _round_up(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES
