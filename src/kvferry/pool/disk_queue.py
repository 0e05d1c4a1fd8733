"""Between the index and the disk tier: writes behind the puts, and loads for gets. On the node's event loop."""

from __future__ import annotations

import asyncio
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from kvferry.errors import IntegrityError
from kvferry.observe import get_log
from kvferry.policy.tiering import DiskLoad, admit_to_disk
from kvferry.pool.disk import DiskTier, SlotHeader, pages
from kvferry.pool.index import BlockIndex, Entry

MAX_QUEUED_BYTES = 256 << 20
_log = get_log(__name__)


class DiskQueue:
    """Moves blocks between slabs and slots. `counts` gets written, loaded, broken and skipped blocks."""

    def __init__(self, disk: DiskTier, index: BlockIndex, counts: Counter[str]) -> None:
        self._disk, self._index, self._counts = disk, index, counts
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="kvferry-disk")
        self._entries: dict[int, Entry] = {}
        self._busy: set[int] = set()
        self._loads: dict[Entry, asyncio.Task[bool]] = {}
        self._writes: set[asyncio.Task[None]] = set()
        self._queued_bytes = 0
        for found in disk.found:
            header = found.header
            if index.adopt(header.space, header.block_hash, header.nbytes, header.digest, found.slot):
                (entry,) = index.find(header.space, [header.block_hash])
                assert entry is not None
                self._entries[found.slot] = entry
            else:
                disk.give(found.slot)

    @property
    def num_blocks(self) -> int:
        """Blocks that lie on disk."""
        return len(self._entries)

    def write_behind(self, entry: Entry) -> None:
        """Write a block of the host tier to disk, if it is worth it; returns at once."""
        load = DiskLoad(self._queued_bytes, MAX_QUEUED_BYTES)
        if entry.slot is not None or entry.slab is None:
            return
        if not admit_to_disk(nbytes=entry.nbytes, depth=entry.place.depth, reuses=entry.reuses, load=load):
            self._counts["disk_skipped"] += 1
            return
        slot, occupied = self._disk.take(self._busy)
        if slot is None:
            self._counts["disk_skipped"] += 1
            return
        if occupied:
            self._index.leave_disk(self._entries.pop(slot))
        self._busy.add(slot)
        self._queued_bytes += entry.nbytes
        self._index.hold(entry)
        task = asyncio.get_running_loop().create_task(self._write(entry, slot))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def load(self, entry: Entry) -> bool:
        """Bring a block that is on disk only into host memory; False where it is broken or there is no room."""
        task = self._loads.get(entry)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._load(entry))
            self._loads[entry] = task
            task.add_done_callback(lambda _: self._loads.pop(entry, None))
        return await asyncio.shield(task)

    def free_slots(self) -> None:
        """Give the slots of forgotten blocks back; called after anything that forgets blocks."""
        for slot in self._index.take_freed_slots():
            del self._entries[slot]
            if slot not in self._busy:
                self._disk.give(slot)

    async def drain(self) -> None:
        """Return when all that was queued is written or loaded."""
        await asyncio.gather(*self._writes, *self._loads.values(), return_exceptions=True)

    async def close(self) -> None:
        """Finish what is queued, then give threads and files back."""
        await self.drain()
        await asyncio.get_running_loop().run_in_executor(None, self._threads.shutdown)
        self._disk.close()

    def _header(self, entry: Entry) -> SlotHeader:
        space = self._index.space_of(entry)
        return SlotHeader(space.fingerprint, space.namespace, entry.key[1], entry.nbytes, entry.digest)

    async def _write(self, entry: Entry, slot: int) -> None:
        assert entry.slab is not None
        memory = self._index.arena.view(entry.slab, pages(entry.nbytes))
        written = False
        try:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._threads, self._disk.write, slot, memory, self._header(entry))
            written = True
        except OSError as error:
            self._counts["disk_errors"] += 1
            _log.warning("a block could not be written to disk", slot=slot, error=str(error.strerror))
        finally:
            self._busy.discard(slot)
            self._queued_bytes -= entry.nbytes
            if written and not entry.removed:
                self._entries[slot] = entry
                self._index.on_disk(entry, slot)
                self._disk.used(slot)
                self._counts["disk_written"] += 1
            else:
                self._disk.give(slot)
            self._index.release(entry)

    async def _load(self, entry: Entry) -> bool:
        slot = entry.slot
        if slot is None or entry.removed or slot in self._busy:
            return entry.slab is not None
        slab = self._index.begin_load(entry)
        self.free_slots()
        if slab is None:
            self._counts["disk_no_room"] += 1
            return False
        self._busy.add(slot)
        memory, good = self._index.arena.view(slab, pages(entry.nbytes)), False
        try:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._threads, self._disk.read, slot, memory, self._header(entry))
            good = True
            self._counts["disk_loaded"] += 1
        except (OSError, IntegrityError) as error:
            self._counts["disk_broken"] += 1
            _log.warning("a block on disk is broken; it is a miss", slot=slot, error=str(error))
        finally:
            self._busy.discard(slot)
            forgotten = self._entries.get(slot) is not entry
            self._index.end_load(entry, slab, good=good)
            if forgotten:
                # It was removed while it was read: its slot could not be given back then.
                self._disk.give(slot)
            else:
                self.free_slots()
                if good:
                    self._disk.used(slot)
        return entry.slab is not None
