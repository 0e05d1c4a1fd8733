"""The scheduler half's book of what the pool brings and gets. Pure: no vLLM, no I/O.

It lives beside `scheduler.py`, called in the same order. For each request:

- when it arrives, before it queues, the pool is asked for the longest prefix of its full blocks, and told to bring what
  of them lies on disk; `num_new_matched_tokens` says "ask again" until the answer is there, and 0 when it is late;
- what was found is loaded like a handoff: the request waits with its blocks reserved, and a load that fails is
  computed here (`take_failed_blocks` in `pool_worker.py`);
- each block that a step makes whole is offered to the pool with that step's plan, unless the pool has it.

A request is loaded once: what it lacks after that is computed, so that nothing asks in circles. A preemption starts
over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvferry.clock import Clock, RealClock
from kvferry.connector.vllm.metadata import PoolLoad, PoolSave, StepPlan
from kvferry.connector.vllm.scheduler import Scheduled


class Answer(Protocol):
    """A look-up under way, such as a `kvferry.pool.pending.Pending`."""

    def done(self) -> bool: ...
    def result(self) -> int: ...
    def cancel(self) -> object: ...


@dataclass
class PoolRequest:
    """One request. `hashes` is vLLM's own list: it grows as the answer does."""

    hashes: Sequence[bytes]
    answer: Answer | None
    asked_s: float
    num_found: int = 0
    num_local_tokens: int = 0
    may_load: bool = True
    block_ids: list[int] = field(default_factory=list)
    num_offered: int = 0
    is_saving: bool = False


class PoolSchedulerHalf:
    """Book of all requests, for the pool. Called from vLLM's scheduler thread only.

    Args:
        look_up: starts to ask how many of these blocks, from the first on, the pool has; must not block.
        prefetch: starts to bring those on disk into the memory of this host's node; must not block.
        wait_s: how long a request waits for the answer; then it is computed as if there were no pool.
        count: told each look-up's end: `hit`, `miss`, `late`.
    """

    def __init__(
        self,
        *,
        block_size: int,
        look_up: Callable[[Sequence[bytes]], Answer],
        wait_s: float,
        prefetch: Callable[[Sequence[bytes]], object] = lambda hashes: None,
        count: Callable[[str], None] = lambda result: None,
        clock: Clock | None = None,
    ) -> None:
        self._block_size = block_size
        self._look_up, self._prefetch = look_up, prefetch
        self._wait_s = wait_s
        self._count = count
        self._clock = clock or RealClock()
        self._requests: dict[str, PoolRequest] = {}
        self._loads: list[PoolLoad] = []
        self._drops: list[str] = []

    def is_idle(self) -> bool:
        """Whether no request is known."""
        return not self._requests

    def on_new_request(
        self, request_id: str, hashes: Sequence[bytes], num_tokens: int, *, is_brought: bool = False
    ) -> None:
        """Ask the pool at once, so that its answer is there when the request's turn comes, and the blocks in memory.

        Args:
            hashes: vLLM's hashes of the full blocks, a list that grows.
            num_tokens: the prompt's.
            is_brought: a handoff is to bring its KV; only if that fails is anything loaded.
        """
        self._requests[request_id] = request = PoolRequest(hashes, None, self._clock.now_s())
        self._ask(request, num_tokens, prefetch=not is_brought)

    def num_new_matched_tokens(self, request_id: str, num_computed: int, num_tokens: int) -> int | None:
        """Tokens that the pool has beyond the `num_computed` that are here; None: not known yet, ask again.

        Whole blocks only, and never the last token, which is computed here to sample from.
        """
        request = self._requests.get(request_id)
        if request is None or not request.may_load:
            return 0
        if request.answer is not None and not self._take_answer(request):
            return None
        request.num_local_tokens = num_computed
        usable = min(request.num_found, (num_tokens - 1) // self._block_size)
        return max(0, usable * self._block_size - num_computed)

    def allocated(self, request_id: str, block_ids: list[int], num_external: int) -> None:
        """Blocks were reserved.

        Args:
            block_ids: the request's whole table, local prefix hits included.
            num_external: tokens to load, as `num_new_matched_tokens` said, or 0.
        """
        request = self._requests.get(request_id)
        if request is None:
            return
        request.may_load = False
        first = request.num_local_tokens // self._block_size
        stop = first + num_external // self._block_size
        if stop > first:
            load = PoolLoad(request_id, list(request.hashes[first:stop]), block_ids[first:stop])
            self._loads.append(load)

    def step(self, plan: StepPlan, scheduled: Sequence[Scheduled], preempted: Iterable[str]) -> None:
        """Add this step's loads and saves to `plan`, and the saves that must stop: their blocks have new owners."""
        for request_id in preempted:
            if (request := self._requests.get(request_id)) is not None:
                self._start_over(request_id, request, plan)
        plan.pool_loads.extend(self._loads)
        plan.pool_drops.extend(self._drops)
        self._loads, self._drops = [], []
        for item in scheduled:
            if (request := self._requests.get(item.request_id)) is not None:
                self._offer(item, request, plan)

    def finished(self, request_id: str, *, has_blocks: bool = True) -> bool:
        """The request is over. True: its blocks stay until the worker half has saved them, or given up.

        Args:
            has_blocks: False where a preemption freed them already.
        """
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        if request.answer is not None:
            request.answer.cancel()
        if request.is_saving and not has_blocks:
            self._drops.append(request_id)
            return False
        return request.is_saving

    # Inside

    def _ask(self, request: PoolRequest, num_tokens: int, *, prefetch: bool = True) -> None:
        wanted = list(request.hashes[: (num_tokens - 1) // self._block_size])
        request.asked_s = self._clock.now_s()
        request.num_found, request.may_load = 0, True
        request.answer = self._look_up(wanted) if wanted else None
        if wanted and prefetch:
            self._prefetch(wanted)

    def _take_answer(self, request: PoolRequest) -> bool:
        """Whether the question is settled; what was found is noted then."""
        assert request.answer is not None
        if not request.answer.done():
            if self._clock.now_s() - request.asked_s < self._wait_s:
                return False
            request.answer.cancel()
            self._count("late")
        else:
            request.num_found = request.answer.result()
            self._count("hit" if request.num_found else "miss")
        request.answer = None
        return True

    def _start_over(self, request_id: str, request: PoolRequest, plan: StepPlan) -> None:
        if request.is_saving:
            plan.pool_drops.append(request_id)
        if request.answer is not None:
            request.answer.cancel()
        request.block_ids, request.num_offered, request.is_saving = [], 0, False
        self._ask(request, len(request.hashes) * self._block_size + 1)

    def _offer(self, item: Scheduled, request: PoolRequest, plan: StepPlan) -> None:
        if request.answer is not None:
            # Nobody asked for it, as with a handoff that came; it still says what need not be offered.
            self._take_answer(request)
        if item.replaces:
            request.block_ids = list(item.block_ids)
            # Where a load failed, the pool lost what it had: it gets that again.
            request.num_found = min(request.num_found, item.num_computed // self._block_size)
        else:
            request.block_ids += item.block_ids
        # Where vLLM schedules ahead, the newest block's hash may lack its last token: it is offered one step later.
        num_whole = min((item.num_computed + item.num_scheduled) // self._block_size, len(request.hashes))
        first = max(request.num_offered, request.num_found)
        if num_whole <= first or num_whole > len(request.block_ids):
            return
        request.num_offered, request.is_saving = num_whole, True
        hashes, block_ids = list(request.hashes[first:num_whole]), request.block_ids[first:num_whole]
        plan.pool_saves.append(PoolSave(item.request_id, first, len(request.hashes), hashes, block_ids))
