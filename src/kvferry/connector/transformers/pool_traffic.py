"""Blocks on their way from and to the KV pool, and the sequences that wait for them.

The pool's attachment (kvferry.pool) moves the bytes; this keeps the engine's promises to it: blocks that are being
loaded stay the sequence's, blocks that are being saved stay as they are, until the attachment is done with them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import NamedTuple, Protocol

from kvferry.connector.transformers.scheduler import Pass, Scheduler
from kvferry.connector.transformers.sequence import Sequence, State
from kvferry.pool import Loaded, Pending, Saved

SAVE_BLOCKS = 32
"""While a prompt is being computed, so many blocks gather before they are saved: fewer, larger messages."""


class PoolPort(Protocol):
    """What the engine needs of the pool's attachment. Thread-safe; no call blocks, nothing raises."""

    def prefetch(self, hashes: Seq[bytes]) -> Pending[int]: ...
    def load(self, hashes: Seq[bytes], block_ids: Seq[int]) -> Pending[Loaded]: ...
    def save(self, hashes: Seq[bytes], block_ids: Seq[int], *, first: int = 0, length: int = 0) -> Pending[Saved]: ...


class _Load(NamedTuple):
    """Blocks `first` onwards of a prompt on their way here; `then` is called when their sequence runs again."""

    first: int
    pending: Pending[Loaded]
    then: Callable[[], None]


class PoolTraffic:
    """Loads and saves of one engine. On the engine's thread.

    Args:
        let_go: frees a finished sequence's blocks if nothing binds them.
    """

    def __init__(
        self, port: PoolPort, scheduler: Scheduler, *, block_size: int, let_go: Callable[[Sequence], None]
    ) -> None:
        self._port = port
        self._scheduler = scheduler
        self._block_size = block_size
        self._let_go = let_go
        self._loads: dict[Sequence, _Load] = {}
        self._saves: deque[tuple[list[int], Pending[Saved]]] = deque()
        self.num_loaded_blocks = 0

    @property
    def num_open(self) -> int:
        """Loads and saves under way."""
        return len(self._loads) + len(self._saves)

    def holds(self, sequence: Sequence) -> bool:
        """Whether the sequence's blocks must not be freed yet."""
        return sequence in self._loads

    def expect(self, sequence: Sequence) -> None:
        """The sequence waits for room here: what it will load can come from the pool's disk meanwhile."""
        hashes = sequence.hashes[len(self._scheduler.pool.lookup(sequence.hashes)) :]
        if hashes:
            self._port.prefetch(hashes)

    def load(self, sequence: Sequence, then: Callable[[], None]) -> None:
        """Take from the pool what it has of the prompt's full blocks that are not here.

        The sequence, which is running, waits parked meanwhile. `then` is called when it runs again, whether anything
        came or not, and never if it was cancelled.
        """
        first = sequence.num_computed // self._block_size
        hashes = sequence.hashes[first:]
        if not hashes:
            then()
            return
        load = _Load(first, self._port.load(hashes, sequence.block_table[first : first + len(hashes)]), then)
        if load.pending.done():
            self._arrive(sequence, load)
        else:
            self._loads[sequence] = load
            self._scheduler.park(sequence)

    def after_pass(self, work: Pass) -> None:
        """A pass has run: save the prompt's blocks that it completed."""
        sequence = work.sequence
        first, stop = sequence.num_saved, sequence.full_blocks(self._block_size)
        if stop <= first or (sequence.in_prefill and stop - first < SAVE_BLOCKS):
            return
        block_ids = sequence.block_table[first:stop]
        pending = self._port.save(sequence.hashes[first:stop], block_ids, first=first, length=len(sequence.hashes))
        sequence.num_saved = stop
        if not pending.done():
            self._scheduler.pool.hold(block_ids)
            self._saves.append((block_ids, pending))
        elif pending.result().cause is not None:
            # Refused, and what follows a block that is not there would never be found.
            sequence.num_saved = len(sequence.hashes)

    def cancel(self, sequence: Sequence) -> None:
        """A request is given up; what is being loaded for it ends soon, what is being saved goes on."""
        load = self._loads.get(sequence)
        if load is not None:
            load.pending.cancel()

    def follow(self) -> None:
        """Take up what is done; call it once a step."""
        for sequence, load in list(self._loads.items()):
            if load.pending.done():
                del self._loads[sequence]
                if sequence.state is State.FINISHED:
                    self._let_go(sequence)
                else:
                    self._scheduler.resume(sequence)
                    self._arrive(sequence, load)
        while self._saves and self._saves[0][1].done():
            self._scheduler.pool.release(self._saves.popleft()[0])

    def check_integrity(self) -> None:
        """Raises: RuntimeError if something is under way though the engine is idle."""
        if self.num_open:
            raise RuntimeError(f"{len(self._loads)} loads and {len(self._saves)} saves are open though nothing runs")

    def _arrive(self, sequence: Sequence, load: _Load) -> None:
        num_blocks = load.pending.result().num_blocks
        sequence.num_computed = max(sequence.num_computed, (load.first + num_blocks) * self._block_size)
        sequence.num_cached += num_blocks * self._block_size
        sequence.num_saved = max(sequence.num_saved, load.first + num_blocks)
        self.num_loaded_blocks += num_blocks
        if self._scheduler.prefix_cache:
            self._scheduler.register_prefix(sequence)
        load.then()
