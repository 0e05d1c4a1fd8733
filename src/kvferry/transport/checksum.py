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
GATHERED_BYTES = 1 << 20
"""So many bytes of small blocks are brought together and summed at a time."""
FACTOR = 0x9E3779B97F4A7C15
"""Source: Fibonacci hashing, 2**64 / golden ratio."""


def sums_of_blocks(memory: npt.NDArray[np.uint8], offsets: Offsets, nbytes: int) -> Sums:
    """int64 [num_blocks]: the sum of each block of `nbytes` at `offsets` of host memory, uint8 [size]."""
    num_words, step = -(-nbytes // 4), max(1, GATHERED_BYTES // nbytes)
    factors = odd_factors(num_words)
    blocks = np.lib.stride_tricks.sliding_window_view(memory, nbytes)
    padded = np.zeros((min(step, len(offsets)), num_words * 4), dtype=np.uint8)
    sums = np.empty(len(offsets), dtype=np.uint64)
    for first in range(0, len(offsets), step):
        taken = blocks[offsets[first : first + step]]
        padded[: len(taken), :nbytes] = taken
        words = padded[: len(taken)].view("<u4").astype(np.uint64)
        sums[first : first + step] = words @ factors
    return sums.view(np.int64)


def odd_factors(count: int) -> npt.NDArray[np.uint64]:
    """uint64 [count]: factor(0), factor(1) and so on, all of them odd and different."""
    factors = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(FACTOR)
    factors ^= factors >> np.uint64(32)
    return factors | np.uint64(1)
