"""Copying many blocks inside one address space, off the GIL; the word of a lease, loaded and stored atomically."""

from __future__ import annotations

import contextlib
import ctypes
import select
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future

import numpy as np

from kvferry.errors import HandoffAborted, TransferTimeout
from kvferry.layout import Offsets
from kvferry.transport.base import BlockList, StopToken

try:
    from kvferry.transport import _copy  # type: ignore[attr-defined, unused-ignore]
except ImportError:  # The wheel was built without a C compiler.
    _copy = None

SLICE_BYTES = 64 << 20
"""How much is copied between two looks at the stop token and the deadline: some 6 ms."""

STREAMING_FROM_BYTES = 4 << 20
"""Batches from this size on bypass the caches: the reader's L2 could not hold them anyway."""

SHARED_FROM_BYTES = 64 << 20
SHARED_SLICE_BYTES = 32 << 20
"""Copies from here on are shared by two threads, which take slices of this size: one core alone can't use all of a
machine's memory bandwidth, and what a slower one has left the other one takes."""

SMALL_BYTES = 64 << 10
"""Up to here a single block has ways of its own, which save microseconds around the copy."""

STANDS, UNREGISTERED, DEAD, OTHER_WORD = range(4)
"""What `copy_checked` found: all as it must be; a region's slot with another nonce; no process; another word."""

_fence = threading.Lock()


class Limits:
    """What ends a transfer early: its deadline and its stop token."""

    __slots__ = ("deadline_s", "peer", "stop", "until_s")

    def __init__(self, stop: StopToken, deadline_s: float, peer: str) -> None:
        self.stop, self.deadline_s, self.peer = stop, deadline_s, peer
        self.until_s = time.monotonic() + deadline_s

    def check(self) -> None:
        """Raises: HandoffAborted if asked to stop, TransferTimeout if the deadline has passed."""
        if self.stop.is_set():
            raise HandoffAborted("the transfer was stopped by its caller", peer=self.peer)
        if time.monotonic() > self.until_s:
            raise TransferTimeout(
                f"the transfer was not complete within {self.deadline_s:.3f} s: the peer is stopped or overloaded, the "
                "network slow or cut, or the deadline too short for this many bytes",
                peer=self.peer,
            )

    def remaining_s(self) -> float:
        return self.until_s - time.monotonic()


def slices(blocks: list[BlockList], max_bytes: int, max_blocks: int = 1 << 20) -> Iterator[BlockList]:
    """The same copies in lists of at most `max_bytes` and `max_blocks`; blocks larger than `max_bytes` are cut."""
    for part in blocks:
        if part.nbytes > max_bytes:
            for at in range(0, part.nbytes, max_bytes):
                piece = part._replace(
                    source_offsets=part.source_offsets + at,
                    target_offsets=part.target_offsets + at,
                    nbytes=min(max_bytes, part.nbytes - at),
                )
                yield from slices([piece], max_bytes, max_blocks)
            continue
        count = len(part.source_offsets)
        step = max(1, min(max_blocks, max_bytes // max(1, part.nbytes)))
        if count <= step:
            yield part
            continue
        for first in range(0, count, step):
            yield part._replace(
                source_offsets=part.source_offsets[first : first + step],
                target_offsets=part.target_offsets[first : first + step],
            )


def batches(blocks: list[BlockList], max_bytes: int) -> list[list[BlockList]]:
    """The same copies in order, in batches of at most `max_bytes`; at least one batch, which may be empty."""
    made: list[list[BlockList]] = [[]]
    room = max_bytes
    for part in slices(blocks, max_bytes):
        if part.total_bytes > room and made[-1]:
            made.append([])
            room = max_bytes
        made[-1].append(part)
        room -= part.total_bytes
    return made


def copy_blocks(
    target: int, source: int, target_offsets: Offsets, source_offsets: Offsets, nbytes: int, streaming: bool
) -> None:
    """Copy blocks of `nbytes` between two mapped areas given by their addresses; complete and visible on return.

    Args:
        target_offsets, source_offsets: int64 [num_blocks], C-contiguous, already validated.
    """
    count = len(source_offsets)
    if _copy is not None:
        targets, sources = np.ascontiguousarray(target_offsets), np.ascontiguousarray(source_offsets)
        _copy.copy_blocks(
            target, source, targets.ctypes.data, sources.ctypes.data, count, nbytes, int(streaming and nbytes >= 8192)
        )
        return
    memmove = ctypes.memmove
    for to, origin in zip((target_offsets + target).tolist(), (source_offsets + source).tolist(), strict=True):
        memmove(to, origin, nbytes)


def copy_list(
    part: BlockList, target: int, source: int, limits: Limits, total_bytes: int, helper: Executor | None = None
) -> None:
    """Copy one block list, looking at the limits between slices.

    Args:
        helper: one more thread that takes slices of a large copy, as long as there are any.
    Raises: HandoffAborted, TransferTimeout. After failure some blocks are copied, some are not; none will be.
    """
    if len(part.source_offsets) == 1 and part.nbytes <= STREAMING_FROM_BYTES:
        ctypes.memmove(target + int(part.target_offsets[0]), source + int(part.source_offsets[0]), part.nbytes)
        return
    streaming = total_bytes >= STREAMING_FROM_BYTES
    shared = helper is not None and _copy is not None and part.total_bytes >= SHARED_FROM_BYTES
    # Taken from a list's iterator, which threads may share.
    left = iter(list(slices([part], SHARED_SLICE_BYTES if shared else SLICE_BYTES)))

    def copy_what_is_left() -> None:
        for piece in left:
            limits.check()
            copy_blocks(target, source, piece.target_offsets, piece.source_offsets, piece.nbytes, streaming)

    helping: Future[None] | None = None
    if shared and helper is not None:
        with contextlib.suppress(RuntimeError):  # The link is being closed, or no thread can be had.
            helping = helper.submit(copy_what_is_left)
    try:
        copy_what_is_left()
    finally:
        # Begun, it may be in the middle of a slice; else it has nothing to do any more.
        if helping is not None and not helping.cancel():
            helping.result()


def copy_checked(target: int, source: int, nbytes: int, pidfd: int, *words: int) -> int:
    """Copy one small block out of a process, if what its beacon says stands before and after it.

    Args:
        words: address and nonce of the region's slot; for a lease also those of its word's region, and address and
            value of the word, which is loaded after the block.
    Returns: STANDS, UNREGISTERED, DEAD or OTHER_WORD; the target's bytes mean something only after STANDS.
    """
    if _copy is not None:
        return int(_copy.copy_checked(target, source, nbytes, pidfd, *words))
    slots = list(zip(words[0:4:2], words[1:4:2], strict=True))
    if any(load_word(address) != nonce for address, nonce in slots):
        return UNREGISTERED
    ctypes.memmove(target, source, nbytes)
    stands = not words[4:] or load_word(words[4]) == words[5]
    if is_dead(pidfd):
        return DEAD
    if any(load_word(address) != nonce for address, nonce in slots):
        return UNREGISTERED
    return STANDS if stands else OTHER_WORD


def is_dead(pidfd: int) -> bool:
    """Whether the process has ended, or the descriptor was closed."""
    if _copy is not None:
        return bool(_copy.is_dead(pidfd))
    # A poll object of its own for each call: one that several threads share refuses the second.
    death = select.poll()
    death.register(pidfd, select.POLLIN)
    return bool(death.poll(0))


def load_word(address: int) -> int:
    """8 aligned bytes as a signed integer, atomically, not earlier than anything that this thread loaded before."""
    if _copy is not None:
        return int(_copy.load_word(address))
    _order()
    return ctypes.c_int64.from_address(address).value


def store_word(address: int, word: int) -> None:
    """Store 8 aligned bytes atomically; visible before anything that this thread stores later (T3)."""
    if _copy is not None:
        _copy.store_word(address, word)
        return
    ctypes.c_int64.from_address(address).value = word
    _order()


def _order() -> None:
    # Taking and giving a lock back orders memory on every machine; a plain load or store does so on x86 only.
    with _fence:
        pass
