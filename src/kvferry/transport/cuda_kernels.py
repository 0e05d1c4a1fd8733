# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return, misc"
"""The Triton kernels that copy lists of scattered blocks, and their launcher. Needs triton, no GPU to import.

A *table* is int64 [2 * n] in memory that the GPU can read: n source addresses, then n target addresses. Addresses
may lie in this GPU's memory, in a peer's (opened through CUDA IPC), or in pinned host memory; they travel as integers
because Triton's launcher refuses a peer's memory as a tensor. One launch copies the whole table: `programs` persistent
programs walk over its tiles of ROWS blocks times COLS words, so a launch takes as few SMs as its caller grants.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import triton
import triton.language as tl

from kvferry.transport.checksum import COPY, FACTOR


@triton.jit(do_not_specialize=["n", "nbytes"])
def copy_blocks(
    table: tl.int64,
    sums: tl.int64,
    n: tl.int32,
    nbytes: tl.int64,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Copy n blocks of nbytes whose addresses are multiples of 16, by 16-byte accesses; the tail by bytes.

    With SUMS 1 each block's checksum (`kvferry.transport.checksum`) of what was loaded is added into `sums`
    (int64 [n], zeroed by the caller); with SUMS 2 nothing is copied, the source blocks are only summed.
    """
    at = table.to(tl.pointer_type(tl.int64))
    words = nbytes // 16 * 4
    tail = nbytes - words * 4
    pieces = tl.maximum(tl.cdiv(words, COLS), 1)
    tiles = tl.cdiv(n, ROWS) * pieces
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        row = (tile // pieces) * ROWS + tl.arange(0, ROWS)
        col = (tile % pieces) * COLS + tl.arange(0, COLS)
        live = row < n
        source = tl.load(at + row, mask=live, other=0)
        target = tl.load(at + n + row, mask=live, other=0)
        from_ = source.to(tl.pointer_type(tl.int32))[:, None] + col[None, :]
        to = target.to(tl.pointer_type(tl.int32))[:, None] + col[None, :]
        from_ = tl.max_contiguous(tl.multiple_of(from_, (16, 16)), (1, COLS))
        to = tl.max_contiguous(tl.multiple_of(to, (16, 16)), (1, COLS))
        mask = live[:, None] & (col < words)[None, :]
        value = tl.load(from_, mask=mask, other=0, cache_modifier=".cg")
        if SUMS != 2:
            tl.store(to, value, mask=mask, cache_modifier=".cg")
        if SUMS != 0:
            factor = factors_of(col)
            low = value.to(tl.uint32, bitcast=True).to(tl.int64)
            part = tl.sum(low * factor[None, :], axis=1)
            tl.atomic_add(sums.to(tl.pointer_type(tl.int64)) + row, part, mask=live, sem="relaxed")
        if (tail > 0) & (tile % pieces == pieces - 1):
            byte = tl.arange(0, 16)
            rest = live[:, None] & (byte < tail)[None, :]
            last_from = source.to(tl.pointer_type(tl.int8))[:, None] + words * 4 + byte[None, :]
            last_to = target.to(tl.pointer_type(tl.int8))[:, None] + words * 4 + byte[None, :]
            last = tl.load(last_from, mask=rest, other=0)
            if SUMS != 2:
                tl.store(last_to, last, mask=rest)
            if SUMS != 0:
                last_part = tl.sum(byte_parts(last, words * 4 + byte), axis=1)
                tl.atomic_add(sums.to(tl.pointer_type(tl.int64)) + row, last_part, mask=live, sem="relaxed")


@triton.jit
def factors_of(place):
    """What the word at each place of its block is multiplied with; place: int64 [COLS], counted in words."""
    product = (place + 1).to(tl.int64) * FACTOR_
    return (product ^ (product.to(tl.uint64, bitcast=True) >> 32).to(tl.int64, bitcast=True)) | 1


@triton.jit
def byte_parts(value, place):
    """What bytes at these places of their blocks add to the sums; value: int8 [ROWS, COLS], place: int64 [COLS]."""
    low = value.to(tl.uint8, bitcast=True).to(tl.int64) << (place % 4 * 8)[None, :]
    return low * factors_of(place // 4)[None, :]


@triton.jit(do_not_specialize=["n", "nbytes"])
def copy_bytes(
    table: tl.int64,
    sums: tl.int64,
    n: tl.int32,
    nbytes: tl.int64,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Copy, and sum as `copy_blocks` does, n blocks of nbytes at any alignment, byte by byte: slow, and right."""
    at = table.to(tl.pointer_type(tl.int64))
    pieces = tl.cdiv(nbytes, COLS)
    for tile in range(tl.program_id(0).to(tl.int64), tl.cdiv(n, ROWS) * pieces, tl.num_programs(0)):
        row = (tile // pieces) * ROWS + tl.arange(0, ROWS)
        col = (tile % pieces) * COLS + tl.arange(0, COLS)
        live = row < n
        source = tl.load(at + row, mask=live, other=0)
        target = tl.load(at + n + row, mask=live, other=0)
        mask = live[:, None] & (col < nbytes)[None, :]
        value = tl.load(source.to(tl.pointer_type(tl.int8))[:, None] + col[None, :], mask=mask, other=0)
        if SUMS != 2:
            tl.store(target.to(tl.pointer_type(tl.int8))[:, None] + col[None, :], value, mask=mask)
        if SUMS != 0:
            part = tl.sum(byte_parts(value, col), axis=1)
            tl.atomic_add(sums.to(tl.pointer_type(tl.int64)) + row, part, mask=live, sem="relaxed")


@triton.jit
def load_word(word: tl.int64, slot: tl.int64):
    """Load the 8 bytes at address `word` in one access and store them at `slot` (pinned host memory)."""
    value = tl.load(word.to(tl.pointer_type(tl.int64)), volatile=True)
    tl.store(slot.to(tl.pointer_type(tl.int64)), value)


FACTOR_ = tl.constexpr(FACTOR - (1 << 64))  # as a signed 64-bit number


class Tile(NamedTuple):
    """What one program moves in one step: ROWS blocks times COLS units (4-byte words, or bytes where not aligned)."""

    rows: int
    cols: int
    warps: int


LARGE_LAUNCH_BYTES = 32 << 20
"""From here on a launch is about bandwidth, below about latency."""


def tile_for(nbytes: int, total_bytes: int) -> Tile:
    """The tile for a launch of aligned blocks of this size, in as long runs as the blocks have.

    Large launches take 64 KiB a step, so that few programs keep enough bytes in flight (16 programs pull as much over
    NVLink as 64 do with 16 KiB a step); small ones 16 KiB, so that many programs share the work. Few shapes, because
    each is compiled on its first use (about a second; Triton keeps it on disk).
    """
    large = total_bytes >= LARGE_LAUNCH_BYTES
    words, warps = (16384, 16) if large else (4096, 8)
    for cols in (16384, 4096, 1024, 128):
        if cols <= words and nbytes >= cols * 4:
            return Tile(words // cols, cols, warps)
    return Tile(words // 16, 16, warps)


BYTE_TILE = Tile(16, 256, 4)


def is_aligned(table: npt.NDArray[np.int64]) -> bool:
    """Whether every address is a multiple of 16."""
    return not int(np.bitwise_or.reduce(table)) & 15


def num_tiles(n: int, nbytes: int, tile: Tile, unit_bytes: int) -> int:
    return -(-n // tile.rows) * max(1, -(-nbytes // (tile.cols * unit_bytes)))


class Launcher:
    """Launches the kernels on one device, without Triton's own look-ups: those take tens of microseconds a launch.

    The calling thread's current device must be this one. `stream` is a CUDA stream handle as an integer.
    """

    def __init__(self) -> None:
        self._compiled: dict[tuple[Any, ...], Any] = {}
        # By kernel and grid: what Triton makes for `kernel[grid]`, which takes microseconds to make again.
        self._ready: dict[tuple[Any, ...], Any] = {}

    def copy(
        self,
        table: int,
        n: int,
        nbytes: int,
        *,
        aligned: bool,
        programs: int,
        stream: int,
        tile: Tile | None = None,
        mode: int = COPY,
        sums: int = 0,
    ) -> None:
        """Start copying the n blocks of a table at this address (a multiple of 16), or summing them into int64 [n],
        zeros, at address `sums`, or both."""
        if aligned:
            shape = tile or tile_for(nbytes, n * nbytes)
            grid = min(programs, num_tiles(n, nbytes, shape, 4))
            kernel = copy_blocks
        else:
            shape = BYTE_TILE
            grid = min(programs, num_tiles(n, nbytes, shape, 1))
            kernel = copy_bytes
        args = (table, sums, n, nbytes, shape.rows, shape.cols, mode)
        self._on_grid(kernel, (shape, mode), args, shape.warps, grid)(*args, stream=stream)

    def handle(self, tile: Tile) -> tuple[int, int, int]:
        """(CUfunction, threads, bytes of shared memory) of the kernel that copies aligned blocks by this tile."""
        args = (1 << 40, 0, 7, 65536, tile.rows, tile.cols, COPY)
        kernel = self._kernel(copy_blocks, (tile, COPY), args, tile.warps)
        kernel[(1, 1, 1)]  # loads it
        return int(kernel.function), 32 * tile.warps, int(kernel.metadata.shared)

    def word_handle(self, low: int) -> int:
        """The CUfunction, of one warp and no shared memory, that loads words whose addresses end with these 4 bits."""
        kernel = self._kernel(load_word, (low, 0), ((1 << 40) + low, 1 << 40), 1)
        kernel[(1, 1, 1)]  # loads it
        return int(kernel.function)

    def load_word(self, word: int, slot: int, *, stream: int) -> None:
        """Start loading the 8 bytes at address `word` into pinned host memory at `slot`."""
        args = (word, slot)
        self._on_grid(load_word, (word & 15, slot & 15), args, 1, 1)(*args, stream=stream)

    def warm(self, nbytes: int, total_bytes: int, mode: int = COPY) -> None:
        """Compile what launches of this kind need, so that the first transfer does not wait for it."""
        shape = tile_for(nbytes, total_bytes)
        args = (1 << 40, 1 << 40 if mode else 0, 7, nbytes, shape.rows, shape.cols, mode)
        self._kernel(copy_blocks, (shape, mode), args, shape.warps)
        for low in (0, 8):
            self._kernel(load_word, (low, 0), ((1 << 40) + low, 1 << 40), 1)

    def _on_grid(self, function: Any, key: tuple[Any, ...], args: tuple[Any, ...], warps: int, grid: int) -> Any:
        name = (function, *key, grid)
        if (ready := self._ready.get(name)) is None:
            ready = self._ready[name] = self._kernel(function, key, args, warps)[(grid, 1, 1)]
        return ready

    def _kernel(self, function: Any, key: tuple[Any, ...], args: tuple[Any, ...], warps: int) -> Any:
        name = (function, *key)
        if (kernel := self._compiled.get(name)) is None:
            kernel = self._compiled[name] = function.warmup(*args, grid=(1,), num_warps=warps)
        return kernel
