"""Huge pages under shared memory, where the kernel gives them only to those who ask for each range.

Most systems leave shared memory at small pages (`shmem_enabled` is `never`), and a copy of scattered blocks then walks
the page table for every 4 KiB. Linux 6.1 and later collapse a range that a process names, whatever that setting says.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from kvferry.transport.memory import HUGE_PAGE_BYTES

_MADV_COLLAPSE = 25
_STEP_BYTES = 64 << 20
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def collapse(address: int, nbytes: int, *, stopped: Callable[[], bool] = lambda: False) -> int:
    """Back mapped shared memory with huge pages, without changing a byte of it; some 0.2 s a GiB.

    All of the range becomes resident. Other threads and processes may use the memory meanwhile.

    Args:
        stopped: asked between steps; once True, the rest stays as it is.
    Returns: bytes that huge pages back now; 0 where the kernel has none to give.
    """
    first = -(-address // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    last = (address + nbytes) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    backed = 0
    for at in range(first, last, _STEP_BYTES):
        if stopped():
            break
        step = min(_STEP_BYTES, last - at)
        for page in range(at, at + step, HUGE_PAGE_BYTES):
            # Only what is there can be collapsed. A look suffices: writing might undo what another thread writes.
            ctypes.c_uint8.from_address(page).value  # noqa: B018
        if _libc.madvise(at, step, _MADV_COLLAPSE):
            break
        backed += step
    return backed
