"""System calls over many blocks: arrays of (address, length) that numpy builds and the kernel reads.

process_vm_readv, sendmsg and recvmsg take up to 1,024 such vectors a call. Going through libc keeps Python objects
out of it (one list of memoryviews would cost an object a block) and gives up the GIL once a call.
"""

from __future__ import annotations

import ctypes
import errno
import os

import numpy as np
import numpy.typing as npt
import xxhash

from kvferry.errors import PeerGone, RegistrationError, TransportError
from kvferry.layout import Offsets

MAX_VECTORS = 1024
"""IOV_MAX of Linux."""

Vectors = npt.NDArray[np.uint64]
"""uint64 [n, 2]: address and length, as struct iovec lies in memory."""

_libc = ctypes.CDLL(None, use_errno=True)


class _MessageHeader(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint32),
        ("iov", ctypes.c_void_p),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    ]


for _name in ("process_vm_readv", "process_vm_writev"):
    _function = getattr(_libc, _name)
    _function.restype = ctypes.c_ssize_t
    _function.argtypes = (
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_ulong,
    )
for _name in ("sendmsg", "recvmsg"):
    _function = getattr(_libc, _name)
    _function.restype = ctypes.c_ssize_t
    _function.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)


def vectors_of(base: int, offsets: Offsets, nbytes: int) -> Vectors:
    """uint64 [n, 2] for blocks of `nbytes` at `base + offsets`."""
    vectors = np.empty((len(offsets), 2), dtype=np.uint64)
    vectors[:, 0] = offsets + base
    vectors[:, 1] = nbytes
    return vectors


def merge_adjacent(vectors: Vectors) -> Vectors:
    """The same bytes in the same order, with runs that are contiguous in memory joined."""
    if len(vectors) < 2:
        return vectors
    ends = vectors[:-1, 0] + vectors[:-1, 1]
    starts = np.flatnonzero(np.concatenate(([True], vectors[1:, 0] != ends)))
    if len(starts) == len(vectors):
        return vectors
    merged = np.empty((len(starts), 2), dtype=np.uint64)
    merged[:, 0] = vectors[starts, 0]
    merged[:, 1] = np.add.reduceat(vectors[:, 1], starts)
    return merged


def copy_process(pid: int, local: Vectors, remote: Vectors, *, writing: bool, peer: str) -> None:
    """Copy between this process and `pid`; row i of `local` and row i of `remote` have one length.

    Args:
        local, remote: at most MAX_VECTORS rows and 2 GiB.
    Raises: PeerGone if the process is dead, RegistrationError if memory is not mapped there (any more).
    """
    name = "process_vm_writev" if writing else "process_vm_readv"
    count, expected = len(local), int(local[:, 1].sum())
    done = getattr(_libc, name)(pid, local.ctypes.data, count, remote.ctypes.data, count, 0)
    if done == expected:
        return
    number = ctypes.get_errno() if done < 0 else errno.EFAULT
    if number == errno.ESRCH:
        raise PeerGone(f"process {pid} is dead", peer=peer)
    if number == errno.EFAULT:
        raise RegistrationError(f"process {pid} has not mapped all of the {expected} bytes; register again", peer=peer)
    raise TransportError(f"{name} of process {pid}: {os.strerror(number)}", peer=peer)


class VectorCursor:
    """A walk over vectors by system calls that may do part of the work."""

    def __init__(self, vectors: Vectors) -> None:
        # A copy, because a call that does part of a block shortens its vector.
        self._vectors = np.array(vectors, dtype=np.uint64, order="C")
        self._address = self._vectors.ctypes.data
        self._next = 0
        self._ends = np.cumsum(self._vectors[:, 1])
        self._total = int(self._ends[-1]) if len(vectors) else 0
        self._done = 0
        self._header = _MessageHeader()

    @property
    def finished(self) -> bool:
        return self._done >= self._total

    def call(self, name: str, fd: int, flags: int, max_vectors: int) -> int:
        """One `sendmsg` or `recvmsg` over the next vectors; the number of bytes it moved.

        Raises: OSError as the system says it; BlockingIOError when the socket's time-out passed.
        """
        self._header.iov = self._address + 16 * self._next
        self._header.iovlen = min(max_vectors, len(self._vectors) - self._next)
        moved = int(getattr(_libc, name)(fd, ctypes.addressof(self._header), flags))
        if moved < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self._advance(moved)
        return moved

    def _advance(self, moved: int) -> None:
        self._done += moved
        following = int(np.searchsorted(self._ends, self._done, side="right"))
        if following < len(self._vectors):
            remaining = int(self._ends[following]) - self._done
            length = int(self._vectors[following, 1])
            if remaining < length:
                self._vectors[following, 0] += np.uint64(length - remaining)
                self._vectors[following, 1] = np.uint64(remaining)
        self._next = following


def digest_of(vectors: Vectors) -> bytes:
    """xxh3-128 over the blocks as they lie in memory, in order."""
    state = xxhash.xxh3_128()
    for address, length in vectors.tolist():
        state.update((ctypes.c_char * length).from_address(address))
    return state.digest()


def view_of(address: int, nbytes: int) -> memoryview:
    """Writable memory at an address, as sockets take it. The caller keeps the memory alive."""
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")
