"""The scheduler half: which blocks to publish, what to load, and when a request's blocks may go. Pure: no vLLM, no I/O.

It lives where vLLM's scheduler runs. It decides; the worker half (`worker.py`) acts on what `step` gives it and
reports back through `reported`. The order of vLLM's calls for one request:

- source (prefill): `on_new_request`, `allocated`, then `step` with each scheduled chunk, `finished`.
- target (decode): `on_new_request`, `num_new_matched_tokens` (again and again while no blocks are free), `allocated`
  with the tokens to load, `step`, then `reported`, `allocated` with 0, `finished`.

Preemption may come between any two of them, `finished` (abort) at any time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import msgspec

from kvferry.clock import Clock, RealClock
from kvferry.connector.vllm.metadata import (
    Cancel,
    GroupBlocks,
    Offer,
    Publish,
    Pull,
    RankReport,
    StepPlan,
    with_remaining,
)
from kvferry.connector.vllm.requests import Ending, RequestLike, Scheduled, SourceRequest, TargetRequest
from kvferry.hashing import hash_list_digest, root_hash
from kvferry.layout import Fingerprint
from kvferry.types import HandoffTicket, Outcome, Stage, TerminalState, ticket_from_params

__all__ = ["Ending", "RequestLike", "Scheduled", "SchedulerHalf"]

NULL_BLOCK = 0
"""What stands in a table where vLLM has freed a block, or never had one."""

_log = logging.getLogger("kvferry.vllm")


class SchedulerHalf:
    """Book of all requests with a ticket. Called from vLLM's scheduler thread only.

    Args:
        num_ranks: tensor-parallel size: so many reports end a load.
        recompute: vLLM's policy for failed loads, `recompute` or else `fail`.
        on_outcome: called once for each handoff of the target side: (outcome, prompt tokens that this instance
            computes in spite of the handoff).
        max_loading_blocks: blocks that may wait for handoffs at a time; a request beyond that waits in vLLM's queue
            without blocks, so that requests which can run now find some. One load is always admitted.
        windows: for each KV cache group the tokens of its sliding window, or None. A token attends to so many, itself
            included; vLLM frees what none will attend to any more without telling, even as a request ends.
        keep, let_go: hold blocks beyond what vLLM does with them, and end that: blocks of windows that were published.
    """

    def __init__(
        self,
        *,
        fingerprint: Fingerprint,
        num_ranks: int,
        recompute: bool,
        on_outcome: Callable[[Outcome, int], None],
        max_loading_blocks: int | None = None,
        namespace: str = "default",
        windows: Sequence[int | None] = (None,),
        keep: Callable[[Sequence[int]], None] = lambda block_ids: None,
        let_go: Callable[[Sequence[int]], None] = lambda block_ids: None,
        clock: Clock | None = None,
    ) -> None:
        self._block_size = fingerprint.block_size
        self._fingerprint_digest = fingerprint.digest()
        self._namespace = namespace
        self._num_ranks = num_ranks
        self._recompute = recompute
        self._on_outcome = on_outcome
        self._max_loading_blocks = max_loading_blocks
        self._windows = tuple(windows)
        self._keep, self._let_go = keep, let_go
        self._kept: dict[str, list[int]] = {}
        self._clock = clock or RealClock()
        self._sources: dict[str, SourceRequest] = {}
        self._targets: dict[str, TargetRequest] = {}
        self._handoffs: set[str] = set()
        self._plan = StepPlan()

    def is_idle(self) -> bool:
        """Whether no request with a ticket is known."""
        return not self._sources and not self._targets and not self._handoffs and not self._kept

    @property
    def num_sources(self) -> int:
        return len(self._sources)

    @property
    def num_targets(self) -> int:
        return len(self._targets)

    # vLLM's calls

    def on_new_request(self, request: RequestLike, *, identity: str = "") -> None:
        """Look for a ticket. A source offers at once, so that a target that asks early finds the handoff known.

        Args:
            identity: what makes equal tokens different prompts (adapter, cache salt, images); both sides must agree.
        """
        ticket = self._ticket_of(request)
        if ticket is None:
            return
        tokens = request.prompt_token_ids
        if not tokens:
            _log.warning("request %s has a ticket but no prompt tokens; it is computed here", request.request_id)
            return
        if ticket.handoff in self._handoffs:
            # Parallel samples of one request share its parameters; only one of them can be the handoff's.
            _log.warning("handoff %s is taken already; request %s is computed here", ticket.handoff, request.request_id)
            return
        self._handoffs.add(ticket.handoff)
        root = root_hash(self._fingerprint_digest, f"{self._namespace}\0{identity}")
        digest = hash_list_digest(tokens, self._block_size, root)
        if ticket.side == "source":
            source = SourceRequest(
                ticket,
                len(tokens),
                self._blocks_for(len(tokens)),
                tables=[[] for _ in self._windows],
                num_published=[0] * len(self._windows),
            )
            self._sources[request.request_id] = source
            self._plan.offers.append(Offer(request.request_id, ticket, digest, source.num_blocks))
        else:
            deadline_s = self._clock.now_s() + ticket.remaining_s
            self._targets[request.request_id] = TargetRequest(ticket, digest, len(tokens), deadline_s)

    def num_new_matched_tokens(self, request_id: str, num_computed: int) -> int | None:
        """Tokens that the handoff will bring beyond the `num_computed` that are here. May be asked any number of times.

        All of the prompt but its last token, which is computed here to sample from. 0 where there is no handoff, it
        is over, too late, or not needed; None where too many blocks wait for handoffs already: ask again later.
        """
        target = self._targets.get(request_id)
        if target is None or target.stage != "queued":
            return 0
        target.num_local_tokens = num_computed
        num_missing = target.num_tokens - 1 - num_computed
        if num_missing <= 0 or self._clock.now_s() >= target.deadline_s:
            return 0
        loading = sum(self._room_for(t.num_tokens) for t in self._targets.values() if t.stage == "loading")
        wanted = self._room_for(target.num_tokens)
        if self._max_loading_blocks is not None and loading and loading + wanted > self._max_loading_blocks:
            return None
        return num_missing

    def allocated(
        self, request_id: str, block_ids: list[int], num_external: int, *, other_groups: Sequence[list[int]] = ()
    ) -> None:
        """Blocks were reserved.

        Args:
            block_ids: the request's whole table, local prefix hits included.
            num_external: tokens to load, as `num_new_matched_tokens` said, or 0.
            other_groups: the tables of the other KV cache groups.
        """
        target = self._targets.get(request_id)
        if target is None or target.stage != "queued":
            return
        num_wanted = target.num_tokens - 1
        if num_external > 0:
            target.num_local_tokens = num_wanted - num_external
            first_lacking = target.num_local_tokens // self._block_size
            wanted = []
            for window, table in zip(self._windows, (block_ids, *other_groups), strict=True):
                first = max(first_lacking, self._first_block(window, num_wanted))
                wanted.append(GroupBlocks(first, table[first : self._blocks_for(num_wanted)]))
            target.stage = "loading"
            self._plan.pulls.append(self._pull(request_id, target, wanted))
            return
        target.stage = "over"
        late = self._clock.now_s() >= target.deadline_s
        if not late:
            self._plan.pulls.append(self._pull(request_id, target))
        if num_wanted - target.num_local_tokens < self._block_size:
            # What the handoff could bring is here, or in a block that vLLM completes itself: the source may release.
            self._conclude(request_id, target, TerminalState.DELIVERED)
        elif late:
            why = "the deadline passed before blocks were free"
            self._conclude(request_id, target, TerminalState.RECOMPUTED, Stage.QUEUE, "transfer_timeout", why)
        else:
            why = "vLLM chose to compute the prompt, as it does for prompt logprobs"
            self._conclude(request_id, target, TerminalState.RECOMPUTED, Stage.RESERVING, "handoff_unused", why)

    def step(self, scheduled: Sequence[Scheduled], preempted: Iterable[str]) -> StepPlan:
        """The plan for the step that vLLM is about to run; what was gathered since the last one goes with it."""
        plan, self._plan = self._plan, StepPlan()
        for request_id in preempted:
            self._revoke(request_id, plan)
        for item in scheduled:
            self._publish(item, plan)
        return replace(plan, is_empty_step=not scheduled, num_tokens=sum(item.num_scheduled for item in scheduled))

    def finished(self, request_id: str, ending: Ending, *, has_blocks: bool = True) -> bool:
        """The request is over. True: the source's blocks stay until the worker half reports them as sent.

        Args:
            has_blocks: False where a preemption freed them already.
        """
        source = self._sources.pop(request_id, None)
        if source is not None:
            self._handoffs.discard(source.ticket.handoff)
            whole = source.is_whole() and has_blocks
            if ending != "answered" or not whole:
                reason = "blocks freed before they were complete" if ending == "answered" else f"request {ending}"
                self._plan.cancels.append(Cancel(request_id, reason))
            return True
        target = self._targets.get(request_id)
        if target is None:
            return False
        target.finished = True
        target.aborted = ending == "aborted"
        if target.stage == "loading":
            # vLLM keeps the blocks until the worker half reports that nothing is written into them any more.
            self._plan.cancels.append(Cancel(request_id, f"request {ending}"))
            return False
        if target.stage == "queued":
            self._plan.pulls.append(self._pull(request_id, target))
            state = TerminalState.ABORTED if target.aborted else TerminalState.FAILED
            why = f"the request was {ending} before it had room"
            self._conclude(request_id, target, state, Stage.QUEUE, "handoff_aborted", why)
        self._forget(request_id)
        return False

    def sent(self, request_ids: Iterable[str]) -> None:
        """Nobody reads these sources' blocks any more."""
        for request_id in request_ids:
            self._end_keeping(request_id)

    def reported(self, reports: Iterable[RankReport]) -> None:
        """Take the worker half's reports; the last rank's one ends the handoff."""
        for report in reports:
            target = self._targets.get(report.request_id)
            if target is None or target.stage != "loading":
                continue
            target.reports[report.rank] = report.outcome
            if len(target.reports) == self._num_ranks:
                target.stage = "over"
                self._combine(report.request_id, target)
                if target.finished:
                    self._forget(report.request_id)

    # Inside

    def _ticket_of(self, request: RequestLike) -> HandoffTicket | None:
        try:
            return ticket_from_params(request.kv_transfer_params)
        except msgspec.ValidationError as error:
            _log.warning("request %s has a ticket that is none (%s); it is computed here", request.request_id, error)
            return None

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _room_for(self, num_tokens: int) -> int:
        """Blocks of all groups that such a prompt fills."""
        return sum(self._blocks_for(num_tokens) - self._first_block(w, num_tokens) for w in self._windows)

    def _first_block(self, window: int | None, num_tokens: int) -> int:
        """The first block that the token after `num_tokens` attends to."""
        return 0 if window is None else max(0, num_tokens - window + 1) // self._block_size

    def _pull(self, request_id: str, target: TargetRequest, wanted: Sequence[GroupBlocks] = ()) -> Pull:
        """Without anything wanted the source is told to let go."""
        first, *others = wanted or [GroupBlocks(0, [])] * len(self._windows)
        left = with_remaining(target.ticket, target.deadline_s - self._clock.now_s())
        return Pull(request_id, left, target.digest, *first, others)

    def _revoke(self, request_id: str, plan: StepPlan) -> None:
        source = self._sources.get(request_id)
        if source is None:
            return
        if any(source.num_published):
            plan.revokes.append(request_id)
        self._end_keeping(request_id)
        source.num_published = [0] * len(self._windows)
        source.tables = [[] for _ in self._windows]

    def _publish(self, item: Scheduled, plan: StepPlan) -> None:
        source = self._sources.get(item.request_id)
        if source is None:
            return
        added = (item.block_ids, *item.other_groups)
        if item.replaces:
            self._revoke(item.request_id, plan)
            source.tables = [list(block_ids) for block_ids in added]
        else:
            for table, block_ids in zip(source.tables, added, strict=False):
                table += block_ids
        for group in range(len(self._windows)):
            self._publish_group(item, source, group, plan)

    def _publish_group(self, item: Scheduled, source: SourceRequest, group: int, plan: StepPlan) -> None:
        window, table = self._windows[group], source.tables[group]
        done = item.num_computed + item.num_scheduled
        whole = done >= source.num_tokens
        if window is None:
            first, stop = source.num_published[group], source.num_blocks if whole else done // self._block_size
        else:
            # vLLM frees what leaves the window without notice: nothing of it is published before the prompt is whole.
            first, stop = self._first_block(window, source.num_tokens - 1), source.num_blocks if whole else 0
        if stop <= source.num_published[group]:
            return
        block_ids = table[first:stop]
        if len(block_ids) < stop - first or (window is not None and NULL_BLOCK in block_ids):
            # vLLM computed what it has no block for: never publish a guess, let the lease end this handoff.
            _log.error("request %s: %d blocks complete, known are %s", item.request_id, stop, table)
            return
        if window is not None:
            self._keep(block_ids)
            self._kept.setdefault(item.request_id, []).extend(block_ids)
        plan.publishes.append(Publish(item.request_id, first, block_ids, whole, group))
        source.num_published[group] = stop

    def _end_keeping(self, request_id: str) -> None:
        if kept := self._kept.pop(request_id, None):
            self._let_go(kept)

    def _combine(self, request_id: str, target: TargetRequest) -> None:
        outcomes = list(target.reports.values())
        bad = next((o for o in outcomes if o.state is not TerminalState.DELIVERED), None)
        if bad is None:
            state = TerminalState.ABORTED if target.aborted else TerminalState.DELIVERED
        elif target.aborted:
            state = TerminalState.ABORTED
        else:
            state = TerminalState.RECOMPUTED if self._recompute else TerminalState.FAILED
        worst = bad or outcomes[0]
        self._conclude(
            request_id,
            target,
            state,
            worst.stage if bad else None,
            worst.cause if bad else None,
            worst.detail if bad else None,
            bytes_moved=sum(o.bytes_moved for o in outcomes),
            duration_s=max(o.duration_s for o in outcomes),
            transport=worst.transport,
        )

    def _conclude(
        self,
        request_id: str,
        target: TargetRequest,
        state: TerminalState,
        stage: Stage | None = None,
        cause: str | None = None,
        detail: str | None = None,
        *,
        bytes_moved: int = 0,
        duration_s: float = 0.0,
        transport: str | None = None,
    ) -> None:
        computed_anyway = {
            TerminalState.DELIVERED: 1,
            TerminalState.RECOMPUTED: target.num_tokens - target.num_local_tokens,
        }
        outcome = Outcome(
            handoff=target.ticket.handoff,
            state=state,
            stage=stage,
            cause=cause,
            detail=detail,
            tokens_computed=computed_anyway.get(state, 0),
            bytes_moved=bytes_moved,
            duration_s=duration_s,
            transport=transport,
            attempt=target.ticket.attempt,
        )
        if state in (TerminalState.RECOMPUTED, TerminalState.FAILED):
            _log.warning(
                "handoff %s of request %s from %s: %s in stage %s: %s",
                outcome.handoff, request_id, target.ticket.source.instance_id, state, stage,
                f"{cause}: {detail}" if detail else cause,
            )  # fmt: skip
        in_spite = outcome.tokens_computed - 1 if state is TerminalState.RECOMPUTED else 0
        self._on_outcome(outcome, in_spite)

    def _forget(self, request_id: str) -> None:
        target = self._targets.pop(request_id)
        self._handoffs.discard(target.ticket.handoff)
