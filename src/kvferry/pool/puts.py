"""Serving puts: take slabs for what is absent, pull its bytes out of the client's memory, commit all of it at once."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from kvferry.errors import RegistrationError
from kvferry.layout import Offsets
from kvferry.pool.entries import Entry, Put
from kvferry.pool.figures import Figures
from kvferry.pool.index import BlockIndex
from kvferry.pool.messages import PutBlocks, PutDone
from kvferry.pool.parts import block_bytes, require_inside
from kvferry.pool.pulling import pull_blocks
from kvferry.transfer import Peer, TransferEngine
from kvferry.transport.base import Guard


class Puts:
    """One node's puts. On the node's event loop; bytes move on `threads`."""

    def __init__(
        self,
        engine: TransferEngine,
        index: BlockIndex,
        threads: ThreadPoolExecutor,
        figures: Figures,
        *,
        free_slots: Callable[[], None],
        stored: Callable[[list[Entry]], None],
        deadline_s: float,
    ) -> None:
        """
        Args:
            free_slots: called after blocks may have been forgotten.
            stored: told of the blocks that each put stored.
            deadline_s: for the bytes of one put.
        """
        self._engine, self._index, self._threads, self._figures = engine, index, threads, figures
        self._free_slots, self._stored, self._deadline_s = free_slots, stored, deadline_s

    async def serve(self, peer: Peer, request: PutBlocks) -> PutDone:
        """Store what is absent and has room.

        Raises: KVError; nothing was stored, and nobody writes into the arena any more.
        """
        if len(request.places) != len(request.hashes):
            raise RegistrationError(f"{len(request.hashes)} hashes and {len(request.places)} places; one for each")
        require_inside(request.parts, _int64(request.places), peer.regions)
        began_s = time.monotonic()
        index, nbytes = self._index, block_bytes(request.parts)
        put = index.begin_put(request.space, request.hashes, nbytes, first=request.first, length=request.length)
        self._free_slots()
        stored: list[Entry] = []
        if put.blocks:
            try:
                digests = await self._pull(peer, request, put)
            except BaseException:
                index.abort_put(put)
                raise
            stored = index.commit_put(put, digests)
            self._free_slots()
        self._figures.put(
            request.space.namespace,
            stored=len(stored),
            duplicates=put.duplicates,
            refused=put.refused,
            nbytes=len(stored) * put.nbytes,
            seconds=time.monotonic() - began_s,
        )
        self._stored(stored)
        return PutDone(request.id, len(stored), put.duplicates, put.refused)

    async def _pull(self, peer: Peer, request: PutBlocks, put: Put) -> list[int]:
        """Copy the blocks from the client's memory into their slabs; returns their digests."""
        work = functools.partial(
            pull_blocks,
            self._engine,
            peer,
            self._index.arena,
            parts=request.parts,
            places=_int64([request.places[block.index] for block in put.blocks]),
            slabs=[block.slab for block in put.blocks],
            guard=Guard(request.words_region, request.word_offset, request.word),
            deadline_s=self._deadline_s,
            helpers=self._threads,
        )
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _int64(values: list[int]) -> Offsets:
    return np.asarray(values, dtype=np.int64)
