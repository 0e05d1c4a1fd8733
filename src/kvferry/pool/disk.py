"""The disk tier: preallocated files of slots, and one of headers. Survives a restart; a torn write is never served.

A slot is written in this order: its header is wiped, the block's bytes are written (direct I/O, from the slab itself),
then the new header with the bytes' xxh3 and a checksum of its own. So a header that is whole and fits its bytes vouches
for a whole block, whatever was interrupted; every read checks the bytes against it. Opening reads the headers only, in
one go. Nothing is flushed for its own sake: what a power cut loses is found out by the checksums and is a miss.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from collections import OrderedDict
from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from kvferry.errors import ConfigError, IntegrityError, PoolExhausted
from kvferry.observe import get_log
from kvferry.pool.keys import BlockSpace

PAGE_BYTES = mmap.PAGESIZE
HEADER_BYTES = 512
FORMAT = "kvferry-pool-2"
NUM_FILES = 8
"""Slots lie in these files in turn: file systems let one writer at a time into a file whose blocks are new."""

_CHECKSUM_BYTES = 8
_log = get_log(__name__)


class Geometry(msgspec.Struct, frozen=True):
    """The first header of the file: what all slots share."""

    slab_bytes: int
    format: str = FORMAT


class SlotHeader(msgspec.Struct, frozen=True, array_like=True):
    """What a slot holds. `digest` is the block's xxh3-64."""

    fingerprint: bytes
    namespace: str
    block_hash: bytes
    nbytes: int
    digest: int

    @property
    def space(self) -> BlockSpace:
        return BlockSpace(self.fingerprint, self.namespace)


class FoundSlot(NamedTuple):
    """A slot that held a block when the tier was opened."""

    slot: int
    header: SlotHeader


class DiskTier:
    """Slots for blocks of at most `slab_bytes`. The calls that move bytes block, and may run on any thread, one call a
    slot at a time; all others belong to one thread.
    """

    def __init__(self, directory: Path, *, slab_bytes: int, disk_bytes: int) -> None:
        """Open the tier of this directory, or make it.

        Raises:
            ConfigError: another node uses it, it has slabs of another size, or it cannot be opened.
            PoolExhausted: the file system has no room for `disk_bytes`.
        """
        self.directory, self.slab_bytes = directory, slab_bytes
        self.num_slots = disk_bytes // slab_bytes
        if self.num_slots < 1 or slab_bytes % PAGE_BYTES:
            raise ConfigError(f"a disk tier of {disk_bytes} bytes holds no slab of {slab_bytes}; give it more room")
        self._files = contextlib.ExitStack()
        self.broken = 0
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._headers = self._open("headers", 0)
            try:
                fcntl.flock(self._headers, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ConfigError(f"another node uses the disk tier {directory}; give each node its own") from error
            self._blocks = [self._open_direct(f"blocks-{number}") for number in range(NUM_FILES)]
            self._preallocate()
        except OSError as error:
            self._files.close()
            raise ConfigError(f"the disk tier {directory} cannot be opened: {error.strerror}") from error
        except BaseException:
            self._files.close()
            raise
        self.found = self._read_headers()
        used = {found.slot for found in self.found}
        self._free = [slot for slot in range(self.num_slots - 1, -1, -1) if slot not in used]
        self._order: OrderedDict[int, None] = OrderedDict((found.slot, None) for found in self.found)

    def close(self) -> None:
        """Give the files back. Idempotent."""
        self._files.close()

    # Slots

    def take(self, busy: Container[int] = ()) -> tuple[int | None, bool]:
        """A slot to write, and whether a block has to leave it first: the one not used for longest that is not `busy`.

        Returns: (None, False) where all are busy.
        """
        if self._free:
            return self._free.pop(), False
        slot = next((slot for slot in self._order if slot not in busy), None)
        if slot is None:
            return None, False
        del self._order[slot]
        return slot, True

    def used(self, slot: int) -> None:
        """The slot's block was written or read: it leaves last."""
        self._order[slot] = None
        self._order.move_to_end(slot)

    def give(self, slot: int) -> None:
        """The slot's block is forgotten: its header is wiped, the slot is free."""
        self._order.pop(slot, None)
        self._wipe(slot)
        self._free.append(slot)

    # Bytes

    def write(self, slot: int, memory: npt.NDArray[np.uint8], header: SlotHeader) -> None:
        """Write a block into a slot.

        Args:
            memory: uint8, page-aligned, whole pages that begin with the block's `header.nbytes` bytes.
        Raises: OSError. After failure the slot holds nothing.
        """
        self._wipe(slot)
        file, first = self._place(slot)
        view, done = memory.data, 0
        while done < len(view):
            done += os.pwrite(file, view[done:], first + done)
        os.pwrite(self._headers, _sealed(msgspec.msgpack.encode(header)), (slot + 1) * HEADER_BYTES)

    def read(self, slot: int, memory: npt.NDArray[np.uint8], header: SlotHeader) -> None:
        """Read a slot's block into page-aligned memory of whole pages, and check it.

        Raises: OSError; IntegrityError if the bytes are not the block's.
        After failure: `memory` holds unspecified bytes.
        """
        file, first = self._place(slot)
        done = 0
        while done < len(memory):
            got = os.preadv(file, [memory.data[done:]], first + done)
            if not got:
                break
            done += got
        if xxhash.xxh3_64_intdigest(memory[: header.nbytes].data) != header.digest:
            raise IntegrityError(
                f"slot {slot} of {self.directory} does not hold block {header.block_hash.hex()} any more: a torn write "
                "or a flipped bit; the block is dropped",
                stage="disk",
            )

    # Inside

    def _place(self, slot: int) -> tuple[int, int]:
        """The file of a slot, and where the slot begins in it."""
        row, number = divmod(slot, NUM_FILES)
        return self._blocks[number], row * self.slab_bytes

    def _open(self, name: str, flags: int) -> int:
        fd = os.open(self.directory / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | flags, 0o600)
        self._files.callback(os.close, fd)
        return fd

    def _open_direct(self, name: str) -> int:
        try:
            return self._open(name, os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            _log.warning("this file system has no direct I/O; the disk tier goes through the page cache",
                         directory=str(self.directory))  # fmt: skip
            return self._open(name, 0)

    def _preallocate(self) -> None:
        head = os.pread(self._headers, HEADER_BYTES, 0)
        wanted = Geometry(self.slab_bytes)
        if any(head):
            body = _unsealed(head)
            try:
                seen = None if body is None else msgspec.msgpack.decode(body, type=Geometry)
            except msgspec.MsgspecError:
                seen = None
            if seen != wanted:
                raise ConfigError(
                    f"{self.directory} holds {seen}, and this node wants {wanted}: use the same slab size, or another "
                    "directory"
                )
        try:
            for file, number in zip(self._blocks, range(min(NUM_FILES, self.num_slots)), strict=False):
                os.posix_fallocate(file, 0, len(range(number, self.num_slots, NUM_FILES)) * self.slab_bytes)
            os.posix_fallocate(self._headers, 0, (self.num_slots + 1) * HEADER_BYTES)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise PoolExhausted(
                f"no room for a disk tier of {self.num_slots * self.slab_bytes} bytes in {self.directory} "
                f"({error.strerror}); give it less, or free space"
            ) from error
        if not any(head):
            os.pwrite(self._headers, _sealed(msgspec.msgpack.encode(wanted)), 0)

    def _read_headers(self) -> list[FoundSlot]:
        raw = os.pread(self._headers, self.num_slots * HEADER_BYTES, HEADER_BYTES)
        decoder = msgspec.msgpack.Decoder(SlotHeader)
        empty, found = bytes(HEADER_BYTES), list[FoundSlot]()
        for slot in range(len(raw) // HEADER_BYTES):
            record = raw[slot * HEADER_BYTES : (slot + 1) * HEADER_BYTES]
            if record == empty:
                continue
            body = _unsealed(record)
            try:
                header = None if body is None else decoder.decode(body)
            except msgspec.MsgspecError:
                header = None
            if header is None or not 0 < header.nbytes <= self.slab_bytes:
                self.broken += 1
                self._wipe(slot)
                continue
            found.append(FoundSlot(slot, header))
        if self.broken:
            _log.warning("torn headers on disk; their blocks are misses", count=self.broken)
        return found

    def _wipe(self, slot: int) -> None:
        os.pwrite(self._headers, bytes(HEADER_BYTES), (slot + 1) * HEADER_BYTES)


def pages(nbytes: int) -> int:
    """`nbytes` rounded up to whole pages, as direct I/O wants it."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


def _sealed(body: bytes) -> bytes:
    sized = len(body).to_bytes(2, "little") + body
    record = xxhash.xxh3_64_digest(sized) + sized
    if len(record) > HEADER_BYTES:
        raise ConfigError(f"a header of {len(record)} bytes does not fit {HEADER_BYTES}; shorten the namespace")
    return record.ljust(HEADER_BYTES, b"\0")


def _unsealed(record: bytes) -> bytes | None:
    """The body of a whole header; None for a torn one."""
    size = int.from_bytes(record[_CHECKSUM_BYTES : _CHECKSUM_BYTES + 2], "little")
    sized = record[_CHECKSUM_BYTES : _CHECKSUM_BYTES + 2 + size]
    whole = len(sized) == size + 2 and xxhash.xxh3_64_digest(sized) == record[:_CHECKSUM_BYTES]
    return sized[2:] if whole else None
