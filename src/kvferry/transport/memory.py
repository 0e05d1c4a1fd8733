"""Host memory that peers on the same machine can map, and the words that guard leases in it."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import threading
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

from kvferry.errors import PoolExhausted, RegistrationError, TransportError
from kvferry.transport.base import Region
from kvferry.transport.copying import load_word, store_word

PAGE_BYTES = mmap.PAGESIZE
WORD_BYTES = 8
HUGE_PAGE_BYTES = 2 << 20
_MADV_HUGEPAGE = 14
_MAP_SHARED = 1
_MAP_NORESERVE = 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value
_SIZE_SEALS = getattr(fcntl, "F_SEAL_SHRINK", 2) | getattr(fcntl, "F_SEAL_GROW", 4)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Mapping:
    """A shared mapping of a whole file; unmapped when nothing refers to it any more, so that no view can dangle."""

    def __init__(self, fd: int, nbytes: int, *, writable: bool) -> None:
        """Raises: TransportError where the system refuses; the message has its reason."""
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        address = _libc.mmap(_place_for_huge_pages(nbytes), nbytes, protection, _MAP_SHARED, fd, 0)
        if address in (None, _MAP_FAILED):
            raise TransportError(f"mapping {nbytes} bytes failed: {os.strerror(ctypes.get_errno())}; free memory")
        # Huge pages are a wish: where the kernel's policy forbids them the mapping works with small ones.
        _libc.madvise(address, nbytes, _MADV_HUGEPAGE)
        self.address: int = address
        self.nbytes = nbytes
        self.writable = writable
        weakref.finalize(self, _libc.munmap, address, nbytes)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.address, not self.writable), "version": 3}


def _place_for_huge_pages(nbytes: int) -> int | None:
    """Where a mapping may begin so that huge pages fit it: like these a wish, for another thread may take the place."""
    if nbytes < HUGE_PAGE_BYTES:
        return None
    room = nbytes + HUGE_PAGE_BYTES
    found = _libc.mmap(None, room, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)
    if found in (None, _MAP_FAILED):
        return None
    _libc.munmap(found, room)
    return -(-int(found) // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES


class SharedBuffer(Mapping):
    """Page-aligned memory behind an anonymous file (memfd) that peers may map. Its size is sealed: no peer can be
    made to fault by shrinking it. Memory and file live as long as any view of `array` does."""

    def __init__(self, nbytes: int, *, name: str = "kvferry") -> None:
        """Raises: RegistrationError for a size below 1; TransportError where the system refuses."""
        if nbytes < 1:
            raise RegistrationError(f"{nbytes} bytes of shared memory were asked for; at least 1 is needed")
        rounded = -(-nbytes // PAGE_BYTES) * PAGE_BYTES
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, rounded)
            fcntl.fcntl(fd, getattr(fcntl, "F_ADD_SEALS", 1033), _SIZE_SEALS)
            super().__init__(fd, rounded, writable=True)
        except (OSError, TransportError):
            os.close(fd)
            raise
        self.nbytes = nbytes
        self.fd = fd
        self._close_fd = weakref.finalize(self, os.close, fd)
        _live_buffers.add(self)

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """uint8 [nbytes], a view of the memory."""
        return np.asarray(self)

    def close(self) -> None:
        """Close the file, so that no further peer can map it; the memory goes with the last view. Idempotent."""
        self._close_fd()


_live_buffers: weakref.WeakSet[SharedBuffer] = weakref.WeakSet()


def find_backing(address: int, nbytes: int) -> tuple[SharedBuffer, int] | None:
    """The shared buffer that holds this memory and its offset there; None for private memory."""
    for buffer in list(_live_buffers):
        if buffer._close_fd.alive and buffer.address <= address and address + nbytes <= buffer.address + buffer.nbytes:
            return buffer, address - buffer.address
    return None


def size_is_sealed(fd: int) -> bool:
    """Whether the file behind `fd` can neither shrink nor grow any more."""
    try:
        seals = fcntl.fcntl(fd, getattr(fcntl, "F_GET_SEALS", 1034))
    except OSError:
        return False
    return (seals & _SIZE_SEALS) == _SIZE_SEALS


class WordTable:
    """Lease words in a region: 8 bytes each, 8-aligned, addressed by their byte offset in the region. Thread-safe.

    A word is zeroed before any block that it guards is reused (R1); `zero` is visible before any later store (T3).
    """

    def __init__(self, region: Region, *, offset: int = 0, capacity: int | None = None) -> None:
        """
        Args:
            offset: where the table begins, in bytes; a multiple of 8.
            capacity: number of words; by default as many as fit.
        Raises: RegistrationError if the table does not fit the region, or would not be aligned.
        """
        room = (region.nbytes - offset) // WORD_BYTES
        self.capacity = room if capacity is None else capacity
        if region.kind != "host" or offset < 0 or (region.address + offset) % WORD_BYTES or self.capacity < 1:
            raise RegistrationError(f"a word table needs host memory at a multiple of 8; saw {region.kind}, +{offset}")
        if self.capacity > room:
            raise RegistrationError(f"{self.capacity} words do not fit {room * WORD_BYTES} bytes; enlarge the region")
        self._region = region
        self._first = offset
        self._lock = threading.Lock()
        self._free = list(range(self.capacity - 1, -1, -1))
        self._used: set[int] = set()

    def allocate(self, word: int) -> int:
        """Store `word` (non-zero) in a free slot; return its byte offset in the region.

        Raises: PoolExhausted when every slot is in use.
        """
        if word == 0:
            raise ValueError("0 means revoked and cannot be a lease's word; draw 63 random bits")
        with self._lock:
            if not self._free:
                raise PoolExhausted(f"all {self.capacity} lease words are in use; free leases or enlarge the table")
            slot = self._free.pop()
            self._used.add(slot)
        offset = self._first + slot * WORD_BYTES
        store_word(self._region.address + offset, word)
        return offset

    def store(self, offset: int, word: int) -> None:
        """Replace the word at `offset`, allocated or not (an owner may number its slots itself)."""
        self._slot(offset)
        store_word(self._region.address + offset, word)

    def zero(self, offset: int) -> None:
        """Revoke: readers that began before find out, later ones are refused. Visible before any later store."""
        self._slot(offset)
        store_word(self._region.address + offset, 0)

    def load(self, offset: int) -> int:
        """The word at `offset`."""
        self._slot(offset)
        return load_word(self._region.address + offset)

    def free(self, offset: int) -> None:
        """Zero the word and give its slot back."""
        with self._lock:
            slot = self._slot(offset)
            if slot not in self._used:
                raise RegistrationError(f"offset {offset} holds no allocated word; free each word once")
            store_word(self._region.address + offset, 0)
            self._used.discard(slot)
            self._free.append(slot)

    def _slot(self, offset: int) -> int:
        slot, odd = divmod(offset - self._first, WORD_BYTES)
        if odd or not 0 <= slot < self.capacity:
            raise RegistrationError(f"offset {offset} is no word of this table of {self.capacity} words")
        return slot
