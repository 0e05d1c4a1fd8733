"""Who is admitted, and whose pass comes next. No torch, no I/O."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from kvferry.connector.transformers.params import RequestError
from kvferry.connector.transformers.pool import BlockPool
from kvferry.connector.transformers.sequence import Sequence, State
from kvferry.errors import PoolExhausted


class Pass(NamedTuple):
    """One forward pass of one sequence.

    Tokens [grid_start, grid_start + num_rows) go in, padded where the prompt ends earlier. The KV of tokens
    [first, stop) is written: what lies before `first` is cached already and comes out as the same bits.
    """

    sequence: Sequence
    grid_start: int
    num_rows: int
    first: int
    stop: int

    @property
    def yields_token(self) -> bool:
        return self.stop > self.sequence.prefill_end


class Scheduler:
    """First come, first served; a sequence is admitted only with all blocks that it can ever need.

    So whatever is admitted finishes without anyone else's room, and two full instances cannot lock each other. Nobody
    overtakes the head of the queue, so that a large request is not starved by small ones.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        chunk_tokens: int,
        max_running: int,
        max_waiting: int,
        prefix_cache: bool = True,
    ) -> None:
        self.pool = pool
        self.block_size = block_size
        self.chunk_tokens = chunk_tokens
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.prefix_cache = prefix_cache
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.parked: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            RequestError: it can never fit (400), or the queue is full (503); it is not queued.
        """
        needed = sequence.max_blocks(self.block_size)
        if needed > self.pool.num_blocks:
            raise RequestError(
                f"prompt ({sequence.num_prompt} tokens) and max_tokens ({sequence.params.max_tokens}) need {needed} "
                f"blocks of {self.block_size} tokens, this instance has {self.pool.num_blocks}; ask for fewer tokens",
                param="max_tokens",
                code="context_length_exceeded",
            )
        if len(self.waiting) >= self.max_waiting:
            raise RequestError(
                f"{len(self.waiting)} requests wait already, the most that may; try again later",
                code="overloaded",
                status=503,
            )
        self.waiting.append(sequence)

    def admit(self) -> list[Sequence]:
        """Move sequences from the queue to `running`, with their blocks reserved. The caller may park them."""
        admitted = []
        while self.waiting and len(self.running) < self.max_running:
            sequence = self.waiting[0]
            cached = self.pool.lookup(sequence.hashes) if self.prefix_cache else []
            try:
                sequence.block_table = self.pool.reserve(sequence.max_blocks(self.block_size), cached)
            except PoolExhausted:
                break
            self.waiting.popleft()
            sequence.num_cached = sequence.num_computed = len(cached) * self.block_size
            sequence.num_registered = sequence.num_saved = len(cached)
            sequence.state = State.RUNNING
            self.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def park(self, sequence: Sequence) -> None:
        """Let a running sequence wait for its KV."""
        self.running.remove(sequence)
        self.parked.append(sequence)
        sequence.state = State.PARKED

    def resume(self, sequence: Sequence) -> None:
        """Its KV came, or it will compute it itself."""
        self.parked.remove(sequence)
        self.running.append(sequence)
        sequence.state = State.RUNNING

    def schedule(self) -> list[Pass]:
        """This step's passes: one token for each answer in progress, one chunk for the oldest prompt.

        One chunk a step, so that a long prompt delays the others' tokens by one chunk and no more.
        """
        decoding = [self._next_pass(s) for s in self.running if not s.in_prefill]
        prefilling = [self._next_pass(s) for s in self.running if s.in_prefill]
        return decoding + prefilling[:1]

    def advance(self, done: Pass) -> None:
        """Record that a pass has written its KV; full blocks of the prompt's chunks become findable."""
        sequence = done.sequence
        sequence.num_computed = done.stop
        if self.prefix_cache:
            self.register_prefix(sequence)

    def register_prefix(self, sequence: Sequence) -> None:
        """Make the computed full blocks of the prompt findable by hash."""
        num_full = sequence.full_blocks(self.block_size)
        for i in range(sequence.num_registered, num_full):
            self.pool.register(sequence.block_table[i], sequence.hashes[i])
        sequence.num_registered = max(sequence.num_registered, num_full)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is. Its blocks stay held until `release`."""
        for queue in (self.waiting, self.running, self.parked):
            if sequence in queue:
                queue.remove(sequence)
        sequence.state = State.FINISHED

    def release(self, sequence: Sequence) -> None:
        """Give a sequence's blocks back, once."""
        blocks, sequence.block_table = sequence.block_table, []
        self.pool.release(blocks)

    def _next_pass(self, sequence: Sequence) -> Pass:
        done = sequence.num_computed
        if not sequence.in_prefill:
            return Pass(sequence, done, 1, done, done + 1)
        start = done - done % self.chunk_tokens
        stop = min(start + self.chunk_tokens, sequence.prefill_end)
        return Pass(sequence, start, self.chunk_tokens, done, stop)
