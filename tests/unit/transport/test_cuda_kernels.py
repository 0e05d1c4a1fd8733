"""The copy kernels' logic, on the CPU: Triton's interpreter runs them over addresses of numpy memory.

The interpreter is chosen when triton is imported, so `test_in_the_interpreter` runs this file in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from kvferry.transport.checksum import COPY, COPY_AND_SUM, SUM, sums_of_blocks

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_in_the_interpreter")


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.timeout(300)
def test_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.fixture
def kernels() -> Any:
    from kvferry.transport import cuda_kernels

    return cuda_kernels


class Case:
    """Two byte arrays, block offsets into them, and the table of their addresses."""

    def __init__(self, n: int, nbytes: int, stride: int, skew: int = 0, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        size = (n + 3) * stride + 64
        self.source = aligned(size)
        self.source[:] = random.integers(0, 256, size, dtype=np.uint8)
        self.target = aligned(size)
        self.target[:] = 0xEE
        self.source_offsets = random.permutation(n + 3)[:n] * stride + skew
        self.target_offsets = random.permutation(n + 3)[:n] * stride + skew
        self.table = aligned(16 * n + 16).view(np.int64)[: 2 * n]
        self.table[:n] = self.source.ctypes.data + self.source_offsets
        self.table[n:] = self.target.ctypes.data + self.target_offsets
        self.n, self.nbytes = n, nbytes

    def expected(self) -> np.ndarray:
        wanted = np.full_like(self.target, 0xEE)
        for s, t in zip(self.source_offsets, self.target_offsets, strict=True):
            wanted[t : t + self.nbytes] = self.source[s : s + self.nbytes]
        return wanted


def aligned(nbytes: int) -> np.ndarray:
    raw = np.zeros(nbytes + 16, dtype=np.uint8)
    start = -raw.ctypes.data % 16
    return raw[start : start + nbytes]


@inside
@pytest.mark.parametrize(
    ("n", "nbytes", "stride"),
    [
        (1, 16, 16),
        (5, 48, 64),
        (3, 8, 16),
        (7, 1000, 1024),
        (3, 1152, 1152),
        (5, 4096, 8192),
        (3, 5000, 5008),
        (2, 16384, 16384),
        (2, 40000, 40960),
    ],
)
@pytest.mark.parametrize("programs", [1, 3])
def test_aligned_blocks_land_and_nothing_else_changes(
    kernels: Any, n: int, nbytes: int, stride: int, programs: int
) -> None:
    case = Case(n, nbytes, stride)
    assert kernels.is_aligned(case.table)
    for total in (0, kernels.LARGE_LAUNCH_BYTES):
        tile = kernels.tile_for(nbytes, total)
        case.target[:] = 0xEE
        kernels.copy_blocks[(programs,)](case.table.ctypes.data, 0, n, nbytes, tile.rows, tile.cols, 0)
        assert np.array_equal(case.target, case.expected())


@inside
@pytest.mark.parametrize(("n", "nbytes", "skew"), [(1, 1, 3), (6, 33, 1), (19, 700, 5), (4, 1024, 8)])
def test_unaligned_blocks_land_and_nothing_else_changes(kernels: Any, n: int, nbytes: int, skew: int) -> None:
    case = Case(n, nbytes, 1024 + skew, skew)
    assert not kernels.is_aligned(case.table)
    tile = kernels.BYTE_TILE
    kernels.copy_bytes[(2,)](case.table.ctypes.data, 0, n, nbytes, tile.rows, tile.cols, COPY)
    assert np.array_equal(case.target, case.expected())


def launch(kernels: Any, case: Case, mode: int) -> np.ndarray:
    """The sums of a launch, with the kernel that the launcher would take."""
    sums = aligned(8 * case.n).view(np.int64)
    is_aligned = kernels.is_aligned(case.table)
    tile = kernels.tile_for(case.nbytes, 0) if is_aligned else kernels.BYTE_TILE
    kernel = kernels.copy_blocks if is_aligned else kernels.copy_bytes
    args = (case.table.ctypes.data, sums.ctypes.data, case.n, case.nbytes, tile.rows, tile.cols, mode)
    kernel[(2,)](*args)
    return sums


@inside
@pytest.mark.parametrize("mode", [COPY_AND_SUM, SUM])
@pytest.mark.parametrize(
    ("nbytes", "stride", "skew"),
    [
        *((64, 64, 0), (1024, 1040, 0), (20480, 20480, 0)),  # whole 16-byte pieces, with and without gaps
        *((8, 16, 0), (1000, 1024, 0), (1003, 1008, 0), (5001, 8192, 0)),  # tails of whole words, and of bytes
        *((33, 40, 1), (700, 704, 4), (1026, 1100, 2)),  # no alignment
    ],
)
def test_sums_are_those_of_the_host(kernels: Any, mode: int, nbytes: int, stride: int, skew: int) -> None:
    case = Case(3, nbytes, stride, skew)
    sums = launch(kernels, case, mode)
    assert sums.tolist() == sums_of_blocks(case.source, case.source_offsets, nbytes).tolist()
    assert np.array_equal(case.target, case.expected() if mode == COPY_AND_SUM else np.full_like(case.target, 0xEE))


@inside
@pytest.mark.parametrize(("nbytes", "skew"), [(1003, 0), (1003, 1)])
def test_a_flipped_bit_changes_the_kernels_sum_wherever_it_is(kernels: Any, nbytes: int, skew: int) -> None:
    case = Case(3, nbytes, 1008, skew)
    sums = launch(kernels, case, SUM)
    for at in (0, 5, 511, 512, 999, 1000, nbytes - 1):
        case.source[case.source_offsets[1] + at] ^= 0x10
        seen = launch(kernels, case, COPY_AND_SUM)
        assert (seen != sums).tolist() == [False, True, False], f"byte {at}"
        case.source[case.source_offsets[1] + at] ^= 0x10


@inside
def test_the_word_is_loaded_whole(kernels: Any) -> None:
    words = aligned(16).view(np.int64)
    words[0] = -(2**62) + 12345
    kernels.load_word[(1,)](words.ctypes.data, words.ctypes.data + 8)
    assert words[1] == words[0]


@pytest.mark.parametrize("nbytes", [1, 16, 511, 512, 4096, 16384, 1 << 21])
def test_a_tile_moves_16_or_64_kib_in_runs_no_longer_than_a_block(nbytes: int) -> None:
    from kvferry.transport.cuda_kernels import LARGE_LAUNCH_BYTES, num_tiles, tile_for

    large, tile = tile_for(nbytes, LARGE_LAUNCH_BYTES), tile_for(nbytes, LARGE_LAUNCH_BYTES - 1)
    assert (large.rows * large.cols * 4, tile.rows * tile.cols * 4) == (65536, 16384)
    assert max(large.cols, tile.cols) * 4 <= max(nbytes, 64)
    assert num_tiles(1, nbytes, tile, 4) == max(1, -(-nbytes // (tile.cols * 4)))
