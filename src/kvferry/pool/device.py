"""KV blocks in GPU memory, on their way to and from the pool.

What a node of this host has, the GPU copies out of the node's arena by itself, once that is pinned here: one copy. All
else goes through `Staging`: a few pieces of pinned shared memory, into which the GPU copies a save's blocks, from where
the node fetches them, and which a load fills from wherever a node is. While one piece is copied, the next one comes.
A piece is one launch of the copy kernel (`transport/cuda_copy.py`), on a stream of its own with few of the GPU's SMs.

Needs cuda-bindings and triton.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np

from kvferry.errors import KVError, LeaseExpired
from kvferry.layout import Offsets
from kvferry.pool.fetching import fetch_blocks
from kvferry.pool.messages import Leased
from kvferry.pool.parts import BlockPart, PartRun, Piece, block_bytes, part_runs, whole
from kvferry.pool.pinning import PinnedArenas
from kvferry.pool.staging import Staging, on_thread
from kvferry.transfer import Peer, TransferEngine
from kvferry.transport import cuda_runtime as cuda
from kvferry.transport.base import Region, StopToken
from kvferry.transport.copying import Limits
from kvferry.transport.cuda import merged
from kvferry.transport.cuda_copy import BlockCopier, CudaSettings, Run

NUM_PIECES = 4
"""A save has two at a time, and so has a load: one that is filled and one that is emptied."""

SETTINGS = CudaSettings(spin_s=0.0, awake_s=0.0, programs_small=32)
"""Gentler than a handoff's, as nobody waits for a save: PCIe is the limit with few programs, too (docs/pool.md)."""

NUM_THREADS = 4


class DeviceBlocks:
    """One rank's blocks in the memory of one GPU. But for the constructor, all calls belong to one event loop."""

    def __init__(
        self, device: int, parts: Sequence[BlockPart], regions: Mapping[int, Region], staging: Region, piece_blocks: int
    ) -> None:
        """
        Args:
            parts: what a block consists of, in CUDA memory.
            regions: those of the parts, by id.
            staging: shared memory of NUM_PIECES times `piece_blocks` blocks.
        Raises: KVError where the GPU cannot copy, or the memory cannot be pinned.
        """
        self._parts, self._staging_region = parts, staging
        self._addresses = {part.region: regions[part.region].address for part in parts}
        self._block_bytes, self._piece_blocks = block_bytes(parts), piece_blocks
        self.staging = Staging(piece_blocks * self._block_bytes, NUM_PIECES)
        self._copier = BlockCopier(device, SETTINGS)
        # The device stays current on these threads: to switch back would make a context on another one.
        self._threads = ThreadPoolExecutor(
            NUM_THREADS, thread_name_prefix="kvferry-pool-gpu", initializer=cuda.enter, initargs=(device,)
        )
        self._arenas = PinnedArenas(self._threads)
        self._is_pinned = False
        try:
            self._is_pinned = self._threads.submit(cuda.pin, staging.address, staging.nbytes).result()
            self._threads.submit(self._copier.warm).result()
        except KVError:
            self._threads.submit(self._release).result()
            self._threads.shutdown()
            raise

    async def outgoing(self, places: Offsets, until_s: float) -> AsyncGenerator[Piece, None]:
        """Copies of these blocks, piece after piece, each of them good until the next one is asked for.

        To be used within `contextlib.aclosing`: when that is left, the blocks are not read any more.

        Args:
            places: int64 [num_blocks], block ids. What computes them has completed.
        Raises: as `BlockCopier.copy`.
        """
        parts = whole(self._staging_region, self._block_bytes)

        async def copy_out(blocks: slice, at: int) -> None:
            runs = part_runs(self._parts, places[blocks], self._rows(blocks))
            await self._copy([self._out(run, self._staging_region.address + at) for run in runs], until_s)

        async with contextlib.aclosing(self.staging.through(self._pieces(len(places)), copy_out)) as filled:
            async for blocks, at in filled:
                yield Piece(blocks.start, blocks.stop, parts, self._rows(blocks) + at)

    async def fetch(
        self,
        engine: TransferEngine,
        peer: Peer,
        lease: Leased,
        *,
        parts: Sequence[BlockPart],
        places: Offsets,
        regions: Mapping[int, Region],
        until_s: float,
    ) -> str:
        """As `fetching.fetch_blocks`, into GPU memory.

        Args:
            parts: as constructed, with the ids that `regions` have.
        """
        addresses = {part.region: regions[part.region].address for part in parts}
        arena = self._arenas.find(engine, peer, lease.arena)
        if arena is not None:
            with arena:
                runs = part_runs(parts, places, np.asarray(lease.offsets, dtype=np.int64))
                await self._copy([_into(run, addresses, arena.address) for run in runs], until_s)
                left_s = max(0.001, until_s - time.monotonic())
                word = await engine.load_word(peer, lease.arena, lease.word_offset, deadline_s=left_s)
            if word != lease.word:
                raise LeaseExpired("the lease's word changed while its blocks were read: recompute", peer=peer.name)
            return "shm"
        staging = next(region for region in regions.values() if region.address == self._staging_region.address)
        transport = ""

        async def copy_in(blocks: slice, at: int) -> None:
            nonlocal transport
            piece = msgspec.structs.replace(
                lease, found=[], offsets=lease.offsets[blocks], digests=lease.digests[blocks]
            )
            transport = await fetch_blocks(
                engine,
                peer,
                piece,
                parts=whole(staging, self._block_bytes),
                places=self._rows(blocks) + at,
                regions=regions,
                until_s=until_s,
            )

        async with contextlib.aclosing(self.staging.through(self._pieces(len(places)), copy_in)) as filled:
            async for blocks, at in filled:
                runs = part_runs(parts, places[blocks], self._rows(blocks) + at)
                await self._copy([_into(run, addresses, staging.address) for run in runs], until_s)
        return transport

    def lost(self, peer: Peer) -> None:
        """A node is gone, and with it the right to its memory."""
        self._arenas.lost(peer)

    async def close(self) -> None:
        """Give everything back; nothing may be under way."""
        await self._arenas.close()
        await asyncio.get_running_loop().run_in_executor(self._threads, self._release)
        self._threads.shutdown()

    def _release(self) -> None:
        if self._copier.stuck:
            return  # A kernel that never ended may still use all of it.
        self._copier.close()
        if self._is_pinned:
            cuda.unpin(self._staging_region.address)

    def _pieces(self, num_blocks: int) -> list[slice]:
        step = self._piece_blocks
        return [slice(first, min(first + step, num_blocks)) for first in range(0, num_blocks, step)]

    def _rows(self, blocks: slice) -> Offsets:
        """Where these blocks lie in a piece, one after the other."""
        return np.arange(blocks.stop - blocks.start, dtype=np.int64) * self._block_bytes

    def _out(self, run: PartRun, to: int) -> Run:
        return Run(run.offsets, self._addresses[run.region], run.pool_offsets, to, run.nbytes, "host")

    async def _copy(self, runs: list[Run], until_s: float) -> None:
        """Return when every byte is in place. Cancelled or failed: when none will be any more."""
        stop = StopToken()
        limits = Limits(stop, max(0.001, until_s - time.monotonic()), "the GPU")
        await on_thread(self._threads, functools.partial(self._copier.copy, merged(runs), limits), stop)


def _into(run: PartRun, addresses: Mapping[int, int], origin: int) -> Run:
    return Run(run.pool_offsets, origin, run.offsets, addresses[run.region], run.nbytes, "host")
