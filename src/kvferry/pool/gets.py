"""Serving gets: hold the blocks that are there, bring those that lie on disk, lease all of them to the reader."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Sequence

from kvferry.pool.disk_queue import DiskQueue
from kvferry.pool.entries import Entry
from kvferry.pool.figures import Figures
from kvferry.pool.index import BlockIndex
from kvferry.pool.leases import Leases
from kvferry.pool.messages import GetBlocks, Leased

DISK_DEPTH = 8
"""Blocks that one get reads from disk at once."""


class Gets:
    """One node's gets. On the node's event loop."""

    def __init__(
        self,
        index: BlockIndex,
        leases: Leases,
        disk: DiskQueue | None,
        figures: Figures,
        used: Callable[[Sequence[Entry]], None],
    ) -> None:
        """
        Args:
            used: told of the blocks that each get was leased.
        """
        self._index, self._leases, self._disk, self._figures, self._used = index, leases, disk, figures, used

    async def serve(self, owner: Hashable, request: GetBlocks, require_owner: Callable[[], None]) -> Leased:
        """Lease what is there of the blocks asked for; with an empty lease if that is nothing.

        Args:
            require_owner: raises if the reader has gone meanwhile, as nobody would end its lease then.
        Raises: KVError; no block is held then.
        """
        held: dict[int, Entry] = {}
        began_s = time.monotonic()
        try:
            from_disk = await self._hold_all(request, held)
            require_owner()
            entries = [held[position] for position in sorted(held)]
            lease = self._leases.grant(owner, request.id, entries)
        except BaseException:
            for entry in held.values():
                self._index.release(entry)
            raise
        # After the reply: the reader copies meanwhile.
        asyncio.get_running_loop().call_soon(self._note_use, entries, len(request.hashes))
        self._figures.got(
            request.space.namespace,
            host=len(entries) - from_disk,
            disk=from_disk,
            missed=len(request.hashes) - len(entries),
            nbytes=len(entries) * request.nbytes,
            seconds=time.monotonic() - began_s,
        )
        arena = self._index.arena
        return Leased(
            id=request.id,
            found=[position in held for position in range(len(request.hashes))],
            arena=arena.region.region_id,
            offsets=arena.offsets([entry.slab for entry in entries if entry.slab is not None]).tolist(),
            digests=[entry.digest for entry in entries],
            word_offset=lease.word_offset,
            word=lease.word,
            from_disk=from_disk,
        )

    def _note_use(self, entries: Sequence[Entry], length: int) -> None:
        self._index.use(entries, length=length)
        self._used(entries)

    async def _hold_all(self, request: GetBlocks, held: dict[int, Entry]) -> int:
        """Hold what can be served, by its position in the request; returns how many came from disk."""
        on_disk: list[tuple[int, Entry]] = []
        for position, entry in enumerate(self._index.find(request.space, request.hashes)):
            if entry is None or entry.nbytes != request.nbytes:
                if request.prefix:
                    break
            elif entry.slab is not None:
                self._index.hold(entry)
                held[position] = entry
            else:
                on_disk.append((position, entry))
        if self._disk is None or not on_disk:
            return 0
        disk, turns = self._disk, asyncio.Semaphore(DISK_DEPTH)

        async def hold_from_disk(position: int, entry: Entry) -> None:
            async with turns:
                # Held as soon as it is there: the next load must not evict it.
                if await disk.load(entry) and self._index.in_host(entry):
                    self._index.hold(entry)
                    held[position] = entry

        await asyncio.gather(*(hold_from_disk(position, entry) for position, entry in on_disk))
        if request.prefix:
            usable = next((i for i in range(len(request.hashes)) if i not in held), len(request.hashes))
            for position in [position for position in held if position >= usable]:
                self._index.release(held.pop(position))
        return sum(position in held for position, _ in on_disk)
