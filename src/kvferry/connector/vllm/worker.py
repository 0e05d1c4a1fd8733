"""The worker half: carries out the scheduler half's plans on this rank's handoff node. Pure: no vLLM, no torch.

It lives in each worker process, next to this rank's KV memory. The order of vLLM's calls in one step, all on the
model runner's thread: `begin_step` before the forward may overwrite anything; `start_pulls` before or after it;
`layer_done` in it, which publishes; `publish` after its launch, for what no layer told of; `finished`,
`take_failed_blocks`, `take_reports` at the end.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from kvferry.connector.vllm.metadata import Pull, RankReport, StepPlan, group_handoff, rank_handoff
from kvferry.connector.vllm.pace import Pace
from kvferry.connector.vllm.sides import SourceSide, TargetSide, combine
from kvferry.connector.vllm.stream import AfterForward
from kvferry.errors import CompatibilityError
from kvferry.layout import overlapping_ranks
from kvferry.types import HandoffId, HandoffTicket, Outcome, Side, Stage, TerminalState

MOST_STEPS_LEFT = 2
"""vLLM runs at most one step ahead of the output that it looks at, so that the scheduler half has come by then."""

_log = logging.getLogger("kvferry.vllm")


class ReleasedLike(Protocol):
    """What the node says of a source handoff whose blocks may go."""

    @property
    def handoff(self) -> HandoffId: ...

    @property
    def reason(self) -> str: ...

    @property
    def at_s(self) -> float: ...


class NodeLike(Protocol):
    """What is used of `kvferry.handoff.node.HandoffNode`. Thread-safe; no call blocks."""

    def offer(
        self, ticket: HandoffTicket, prompt_digest: bytes, num_blocks: int, *, target: tuple[int, int] | None = None
    ) -> None: ...
    def publish(self, handoff: HandoffId, layers: range, first_block: int, block_ids: Sequence[int]) -> None: ...
    def seal(self, handoff: HandoffId) -> None: ...
    def revoke(self, handoff: HandoffId, reason: str) -> None: ...
    def cancel(self, handoff: HandoffId, reason: str, *, side: Side) -> None: ...
    def released(self) -> Sequence[ReleasedLike]: ...
    def drop_select(
        self, ticket: HandoffTicket, prompt_digest: bytes, first_block: int, block_ids: Sequence[int]
    ) -> None: ...
    def outcomes(self) -> Sequence[Outcome]: ...


class WorkerHalf:
    """One rank's side of all handoffs. `scheduler_is_here`: the scheduler half lives on this thread too, and calls
    `take_delivered`.

    Args:
        news: set, from any thread, when the node has outcomes or releases.
        on_loaded: called with the block ids of each delivered load before the request may run.
        on_released: told why each source handoff was released, for metrics.
        pace: chooses how many layers to publish at a time.
        on_paced: told how many pieces each step's publication is made in, for metrics.
        num_groups: KV cache groups, each of which is handed over by itself.
        fail_requests: a failed load is told by its request (`take_failed_requests`), not by its blocks.
    """

    def __init__(
        self,
        node: NodeLike,
        *,
        rank: int,
        num_ranks: int,
        num_layers: int,
        after_forward: AfterForward,
        pace: Pace | None = None,
        on_paced: Callable[[int], None] | None = None,
        num_groups: int = 1,
        fail_requests: bool = False,
        news: threading.Event | None = None,
        on_loaded: Callable[[list[int]], None] | None = None,
        on_released: Callable[[str], None] | None = None,
        trace: Callable[[str, str], None] = lambda request_id, what: None,
    ) -> None:
        self._node = node
        self._rank = rank
        self._num_ranks = num_ranks
        self._layers = range(num_layers)
        self._pace = pace or Pace(num_layers, 0, fixed=0)
        self._on_paced = on_paced
        self._num_groups = num_groups
        self._fail_requests = fail_requests
        self._after_forward = after_forward
        self._on_loaded = on_loaded
        self._on_released = on_released
        self._trace = trace
        self._news = news or threading.Event()
        self._sources: dict[str, SourceSide] = {}
        self._targets: dict[str, TargetSide] = {}
        self._request_of: dict[HandoffId, str] = {}
        self._ended: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._failed_requests: set[str] = set()
        self._reports: list[RankReport] = []
        self.scheduler_is_here = False
        self._left: dict[str, int] = {}
        self._begun: StepPlan | None = None
        self._layers_published = 0
        self._layers_told = 0
        self._layers_a_publish = num_layers
        self._launched_s = 0.0
        # Held while a publication checks its generation and acts on it, so that a revoke is never overtaken by one.
        self._publishing = threading.Lock()

    # A step

    def begin_step(self, plan: StepPlan) -> None:
        """Revoke, offer, cancel. Must run before the step's forward: revoked blocks have new owners in it (rule R1).

        A second call for the same plan does nothing.
        """
        if plan is self._begun:
            return
        self._begun = plan
        self._layers_published = self._layers_told = 0
        self._launched_s = time.monotonic()
        if plan.publishes:
            self._choose_pace(plan)
        for request_id in plan.revokes:
            self._revoke(request_id)
        for offer in plan.offers:
            size = len(offer.ticket.target.addresses) or self._num_ranks
            targets = [(r, size) for r in self._target_ranks(offer.ticket, size)]
            ranks = [rank_handoff(offer.ticket, self._rank, r) for r, _ in targets]
            groups = [[group_handoff(ticket, group) for ticket in ranks] for group in range(self._num_groups)]
            offered = SourceSide([[t.handoff for t in tickets] for tickets in groups], set())
            offered.open.update(offered.handoffs)
            self._sources[offer.request_id] = offered
            for tickets in groups:
                for rank, ticket in zip(targets, tickets, strict=True):
                    self._request_of[ticket.handoff] = offer.request_id
                    self._node.offer(ticket, offer.digest, offer.num_blocks, target=rank)
            self._trace(offer.request_id, "offered")
        for cancel in plan.cancels:
            if (source := self._sources.get(cancel.request_id)) is not None:
                for handoff in source.handoffs:
                    self._node.cancel(handoff, cancel.reason, side="source")
            elif (target := self._targets.get(cancel.request_id)) is not None:
                for handoff in target.handoffs:
                    self._node.cancel(handoff, cancel.reason, side="target")

    def start_pulls(self, plan: StepPlan) -> None:
        """Ask the source ranks that hold this rank's heads for the blocks."""
        self.begin_step(plan)
        for pull in plan.pulls:
            self._start_pull(pull)

    def layer_done(self, plan: StepPlan, number: int) -> None:
        """The forward has enqueued the attention of the first `number` layers: publish those that are not yet, if it is
        time; the last ones as soon as all are told, for what follows (a layer's MLP, sampling) writes no KV."""
        self.begin_step(plan)
        if not plan.publishes:
            return
        self._layers_told += 1
        layers = range(self._layers_published, number)
        if self._layers_told == len(self._layers) and self._num_groups == 1:
            self.publish(plan)
        elif len(layers) >= self._layers_a_publish and number < len(self._layers):
            self._layers_published = number
            self._publish(plan, layers)

    def publish(self, plan: StepPlan) -> None:
        """The whole forward is enqueued: publish the layers that are left, and seal what became whole."""
        self.begin_step(plan)
        if plan.publishes and self._layers_published < len(self._layers):
            self._publish(plan, self._layers[self._layers_published :])
            self._layers_published = len(self._layers)

    def wait_for_news(self, seconds: float, *, also: bool = False) -> None:
        """In a step that computes nothing, wait a little for a load to end, or for blocks to be released.

        So that this is known now and not one step later, and because vLLM takes the next empty step at once: a loop so
        tight that on a busy machine the threads that it waits for get the interpreter too seldom to ever end it.

        Args:
            also: loads or saves elsewhere set `news` too, and are under way.
        """
        loads = [target for target in self._targets.values() if target.block_ids]
        is_held = any(source.open for source in self._sources.values())
        if (also or loads or is_held) and not any(target.is_over() for target in loads):
            self._news.wait(seconds)
        self._news.clear()

    def finished(self, finished_request_ids: Iterable[str]) -> tuple[set[str], set[str]]:
        """What vLLM's `get_finished` asks for: (sources whose blocks may go, targets that wait no longer).

        Each request is named once, a source only after vLLM said that it finished; what was delivered is left for
        `take_delivered` where the scheduler half is here, for a few steps.
        """
        self._ended.update(r for r in finished_request_ids if r in self._sources)
        for released in self._node.released():
            self._note_released(released)
        self._note_outcomes()
        sent = {r for r in self._ended if not self._sources[r].open}
        for request_id in sent:
            self._ended.discard(request_id)
            for handoff in self._sources.pop(request_id).handoffs:
                self._request_of.pop(handoff, None)
        over = [r for r, target in self._targets.items() if target.is_over()]
        delivered = [r for r in over if self.scheduler_is_here and self._targets[r].is_delivered()]
        self._left = {r: self._left.get(r, 0) + 1 for r in delivered}
        return sent, self._expose(r for r in over if self._left.get(r, MOST_STEPS_LEFT + 1) > MOST_STEPS_LEFT)

    def take_delivered(self) -> set[str]:
        """Targets whose whole load is here and that nobody was told of yet.

        For the scheduler half, before vLLM looks at the output of the step before: with `finished` alone vLLM would
        see them a step later, or with asynchronous scheduling two.
        """
        self._note_outcomes()
        return self._expose([r for r, target in self._targets.items() if target.is_delivered()])

    def is_loading(self) -> bool:
        """Whether a request waits for a load, or for somebody to be told of its end."""
        return any(target.block_ids for target in self._targets.values())

    def take_failed_blocks(self) -> set[int]:
        """Blocks that a failed load left undefined. Never later than the `finished` that names their request."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_failed_requests(self) -> set[str]:
        """Requests whose load failed; those that the last `finished` named."""
        failed, self._failed_requests = self._failed_requests, set()
        return failed

    def take_reports(self) -> list[RankReport]:
        """How loads ended since the last call."""
        reports, self._reports = self._reports, []
        return reports

    def holds(self, request_id: str) -> bool:
        """Whether this request's blocks may still be read by a target."""
        return request_id in self._sources

    def is_idle(self) -> bool:
        """Whether no handoff is open on this rank."""
        return not self._sources and not self._targets and not self._request_of

    # Inside

    def _target_ranks(self, ticket: HandoffTicket, size: int) -> list[int]:
        try:
            return [r for r in range(size) if self._rank in overlapping_ranks(r, size, self._num_ranks)]
        except CompatibilityError as error:
            _log.warning("handoff %s: %s", ticket.handoff, error)
            return []

    def _revoke(self, request_id: str) -> None:
        source = self._sources.get(request_id)
        if source is None:
            return
        with self._publishing:
            source.generation += 1
            for handoff in source.handoffs:
                self._node.revoke(handoff, "the request was preempted")

    def _choose_pace(self, plan: StepPlan) -> None:
        num_blocks = sum(len(publish.block_ids) for publish in plan.publishes)
        is_last = any(publish.is_last for publish in plan.publishes)
        at_a_time = self._pace.layers_at_a_time(plan.num_tokens, num_blocks, is_last=is_last)
        # Where groups of layers share memory, the layers of one are not the first of each.
        self._layers_a_publish = at_a_time if self._num_groups == 1 else len(self._layers)
        if self._on_paced is not None:
            self._on_paced(-(-len(self._layers) // self._layers_a_publish))

    def _publish(self, plan: StepPlan, layers: range) -> None:
        last_layers = layers.stop == len(self._layers)
        launched_s = self._launched_s
        work = [(p, s, s.generation) for p in plan.publishes if (s := self._sources.get(p.request_id)) is not None]

        def act() -> None:
            if last_layers:
                self._pace.computed(plan.num_tokens, time.monotonic() - launched_s)
            for publish, source, generation in work:
                with self._publishing:
                    if source.generation != generation:
                        continue
                    for handoff in source.groups[publish.group]:
                        self._node.publish(handoff, layers, publish.first_block, publish.block_ids)
                        if publish.is_last and last_layers:
                            self._node.seal(handoff)
                            source.last = time.monotonic(), len(publish.block_ids), len(layers)
                self._trace(publish.request_id, f"published to layer {layers.stop}, last {publish.is_last}")

        for publish, _, _ in work:
            self._trace(publish.request_id, f"enqueued to layer {layers.stop}")
        self._after_forward.do(act)

    def _start_pull(self, pull: Pull) -> None:
        size = len(pull.ticket.source.addresses) or self._num_ranks
        wanted = [block_id for part in pull.groups for block_id in part.block_ids]
        try:
            ranks = overlapping_ranks(self._rank, self._num_ranks, size)
        except CompatibilityError as error:
            handoff = pull.ticket.handoff
            outcome = Outcome(handoff, TerminalState.FAILED, Stage.RESERVING, error.cause, str(error))
            self._targets[pull.request_id] = TargetSide([handoff], wanted, {handoff: outcome})
            return
        target = self._targets[pull.request_id] = TargetSide([], wanted)
        for group, part in enumerate(pull.groups):
            for ticket in (group_handoff(rank_handoff(pull.ticket, s, self._rank), group) for s in ranks):
                target.handoffs.append(ticket.handoff)
                self._request_of[ticket.handoff] = pull.request_id
                self._node.drop_select(ticket, pull.digest, part.first_block, part.block_ids)
        self._trace(pull.request_id, "asked")

    def _note_released(self, released: ReleasedLike) -> None:
        handoff, reason = released.handoff, released.reason
        source = self._sources.get(self._request_of.get(handoff, ""))
        if source is None or handoff not in source.open:
            _log.warning("released handoff %s (%s) is not known here", handoff, reason)
            return
        source.open.discard(handoff)
        if reason == "acked" and source.last is not None:
            sealed_s, num_blocks, num_layers = source.last
            self._pace.carried(num_blocks, num_layers, released.at_s - sealed_s)
        if self._on_released is not None:
            self._on_released(reason)

    def _note_outcomes(self) -> None:
        for outcome in self._node.outcomes():
            self._note_outcome(outcome)

    def _note_outcome(self, outcome: Outcome) -> None:
        target = self._targets.get(self._request_of.get(outcome.handoff, ""))
        if target is None or outcome.handoff in target.outcomes:
            _log.warning("outcome %s of a handoff that is not known here", outcome.as_header())
            return
        target.outcomes[outcome.handoff] = outcome

    def _expose(self, over: Iterable[str]) -> set[str]:
        """Forget these targets; those of them that were loads."""
        loaded = set()
        for request_id in list(over):
            target = self._targets.pop(request_id)
            for handoff in target.handoffs:
                self._request_of.pop(handoff, None)
            if not target.block_ids:
                continue
            outcome = combine(list(target.outcomes.values()))
            if outcome.state is not TerminalState.DELIVERED:
                if self._fail_requests:
                    self._failed_requests.add(request_id)
                else:
                    self._failed_blocks.update(target.block_ids)
            elif self._on_loaded is not None:
                self._on_loaded(target.block_ids)
            self._reports.append(RankReport(request_id, self._rank, outcome))
            self._trace(request_id, f"exposed after {outcome.duration_s * 1e3:.2f} ms: {outcome.state}")
            loaded.add(request_id)
        return loaded
