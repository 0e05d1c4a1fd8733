"""The checksum that the pull kernel takes while it copies, defined for any length, and the same on the host.

A block's sum is, modulo 2**64, that of word[i] * factor(i) over its little-endian 4-byte words, the last one padded
with zero bytes; with x = (i + 1) * FACTOR, factor(i) is x ^ (x >> 32), made odd. So a change of one word always changes
the sum; one of several leaves it as it was by chance only. It finds accidents, as xxh3 does, not attackers. A sum of
products, because the threads of a GPU add their parts in any order.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvferry.layout import Offsets

COPY, COPY_AND_SUM, SUM = 0, 1, 2
"""What a launch of the copy kernels does."""

Sums = npt.NDArray[np.int64]
FACTOR = 0x9E3779B97F4A7C15
"""Source: Fibonacci hashing, 2**64 / golden ratio."""


def sums_of_blocks(memory: npt.NDArray[np.uint8], offsets: Offsets, nbytes: int) -> Sums:
    """int64 [num_blocks]: the sum of each block of `nbytes` at `offsets` of host memory, uint8 [size]."""
    num_words = -(-nbytes // 4)
    factors = np.arange(1, num_words + 1, dtype=np.uint64) * np.uint64(FACTOR)
    factors ^= factors >> np.uint64(32)
    factors |= np.uint64(1)
    padded = np.zeros(num_words * 4, dtype=np.uint8)
    sums = np.empty(len(offsets), dtype=np.uint64)
    for row, start in enumerate(offsets.tolist()):
        padded[:nbytes] = memory[start : start + nbytes]
        sums[row] = np.dot(padded.view("<u4").astype(np.uint64), factors)
    return sums.view(np.int64)
