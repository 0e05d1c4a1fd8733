"""Between the index and the disk tier: writes behind the puts, loads for gets or ahead of them, and the file `epochs`
beside the blocks, which says of which removals they are the remainder. On the node's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from kvferry.errors import IntegrityError
from kvferry.observe import get_log
from kvferry.policy.tiering import DiskLoad, admit_prefetch, admit_to_disk
from kvferry.pool.disk import DiskTier, SlotHeader, pages
from kvferry.pool.entries import Entry
from kvferry.pool.epochs import Epochs
from kvferry.pool.index import BlockIndex

MAX_QUEUED_BYTES = 256 << 20
PREFETCH_DEPTH = 4
"""Blocks that are read ahead at once."""

_log = get_log(__name__)


class DiskQueue:
    """Moves blocks between slabs and slots. `counts` gets written, loaded, broken and skipped blocks."""

    def __init__(self, disk: DiskTier, index: BlockIndex, counts: Counter[str]) -> None:
        self._disk, self._index, self._counts = disk, index, counts
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="kvferry-disk")
        self._entries: dict[int, Entry] = {}
        self._busy: set[int] = set()
        self._loads: dict[Entry, asyncio.Task[bool]] = {}
        self._writes: dict[Entry, asyncio.Task[None]] = {}
        self._ahead: set[asyncio.Task[None]] = set()
        self._prefetches = asyncio.Semaphore(PREFETCH_DEPTH)
        self._waiting_gets = 0
        self._queued_bytes = 0
        self._unadopted: dict[int, SlotHeader] = {found.slot: found.header for found in disk.found}
        with contextlib.suppress(FileNotFoundError, msgspec.MsgspecError):
            # Without it the directory's epochs are unknown ones, and what it can't vouch for is forgotten.
            index.epochs = Epochs.decode((disk.directory / "epochs").read_bytes())
        self._epochs_then = index.epochs.all()
        counts["disk_broken"] += disk.broken

    def adopt(self) -> None:
        """Serve what lay on disk when the node started, but for spaces in which blocks were removed since."""
        self._wipe_outdated()
        for slot, header in self._unadopted.items():
            space, index = header.space, self._index
            if index.adopt(space, header.block_hash, header.nbytes, header.digest, slot):
                (entry,) = index.find(space, [header.block_hash])
                assert entry is not None
                self._entries[slot] = entry
            else:
                self._disk.give(slot)
        self._unadopted.clear()

    def _wipe_outdated(self) -> None:
        now = self._index.epochs.all()
        outdated = [s for s, h in self._unadopted.items() if now.get(h.space) != self._epochs_then.get(h.space)]
        for slot in outdated:
            del self._unadopted[slot]
            self._disk.give(slot)

    @property
    def num_blocks(self) -> int:
        """Blocks that lie on disk."""
        return len(self._entries)

    @property
    def num_slots(self) -> int:
        """Blocks that fit on disk."""
        return self._disk.num_slots

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait to be written."""
        return self._queued_bytes

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
        if occupied and self._unadopted.pop(slot, None) is None:
            self._index.leave_disk(self._entries.pop(slot))
        self._busy.add(slot)
        self._queued_bytes += entry.nbytes
        self._index.hold(entry)
        task = asyncio.get_running_loop().create_task(self._write(entry, slot))
        self._writes[entry] = task
        task.add_done_callback(lambda _: self._writes.pop(entry, None))

    async def load(self, entry: Entry) -> bool:
        """Bring a block that is on disk only into host memory; False where it is broken or there is no room."""
        self._waiting_gets += 1
        try:
            return await self._load_once(entry)
        finally:
            self._waiting_gets -= 1

    def prefetch(self, entries: Sequence[Entry]) -> int:
        """Begin to bring blocks that are on disk only into host memory, as many as are worth it now; how many."""
        wanted = [entry for entry in entries if entry.slab is None and entry not in self._loads]
        count = admit_prefetch(
            wanted=len(wanted),
            num_slabs=self._index.arena.num_slabs,
            num_loading=len(self._loads) + len(self._ahead),
            waiting_gets=self._waiting_gets,
        )
        for entry in wanted[:count]:
            task = asyncio.get_running_loop().create_task(self._load_ahead(entry))
            self._ahead.add(task)
            task.add_done_callback(self._ahead.discard)
        return count

    async def _load_ahead(self, entry: Entry) -> None:
        async with self._prefetches:
            if entry.slab is None and await self._load_once(entry):
                self._counts["prefetched"] += 1

    async def _load_once(self, entry: Entry) -> bool:
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

    async def wiped(self) -> None:
        """Return when nothing of the blocks that were removed is left on disk, and their removal is noted there."""
        self.free_slots()
        self._wipe_outdated()
        under_way = [*self._writes.items(), *self._loads.items()]
        await asyncio.gather(*(task for entry, task in under_way if entry.removed), return_exceptions=True)
        self.note_epochs()

    def note_epochs(self) -> None:
        """Write down which removals this node has heard of. Only after their blocks are wiped, so that a node that is
        killed in between hears of them again."""
        path = self._disk.directory / "epochs"
        try:
            path.with_suffix(".new").write_bytes(self._index.epochs.encode())
            path.with_suffix(".new").replace(path)
        except OSError as error:
            self._counts["disk_errors"] += 1
            _log.warning("the epochs could not be written; a restart may forget blocks", error=str(error.strerror))

    async def drain(self) -> None:
        """Return when all that was queued is written or loaded."""
        await asyncio.gather(*self._writes.values(), *self._loads.values(), *self._ahead, return_exceptions=True)

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
