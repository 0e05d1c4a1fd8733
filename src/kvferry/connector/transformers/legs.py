"""The two legs of a handoff inside one engine: when they begin, what becomes of a request when they end."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from kvferry.config import HandoffSettings
from kvferry.connector.transformers.handoffs import Handoffs
from kvferry.connector.transformers.params import RequestError
from kvferry.connector.transformers.scheduler import Pass, Scheduler
from kvferry.connector.transformers.sequence import Sequence, State
from kvferry.errors import CompatibilityError, KVError
from kvferry.types import HandoffTicket, Outcome, Stage, TerminalState


class Legs:
    """Source: offered at admission, published while it runs, held until released. Target: announced on arrival,
    selected and parked at admission, resumed by the outcome: delivered, or to compute the prompt itself.

    Args:
        fail: ends a request with an error. let_go: frees a finished sequence's blocks if nothing binds them.
        recover: gets what it can of a prompt whose handoff failed, then calls back, now or later.
        report: takes each outcome of the target side.
    """

    def __init__(
        self,
        handoffs: Handoffs,
        scheduler: Scheduler,
        settings: HandoffSettings,
        *,
        fail: Callable[[str, RequestError], None],
        let_go: Callable[[Sequence], None],
        recover: Callable[[Sequence, Callable[[], None]], None],
        report: Callable[[Outcome], None],
        clock: Callable[[], float],
    ) -> None:
        self._handoffs = handoffs
        self._scheduler = scheduler
        self._settings = settings
        self._fail = fail
        self._let_go = let_go
        self._recover = recover
        self._recovering: dict[Sequence, Outcome] = {}
        self._report = report
        self._clock = clock
        self.holds = handoffs.holds
        self.check_integrity = handoffs.check_integrity

    @property
    def num_open(self) -> int:
        return self._handoffs.num_open

    def brings(self, sequence: Sequence) -> bool:
        """Whether a handoff is to bring the sequence's KV."""
        ticket = sequence.request.ticket
        return ticket is not None and ticket.side == "target" and sequence.index == 0

    def expect(self, sequence: Sequence) -> None:
        """A request has arrived: the source learns at once that its blocks will be pulled, though there may be no
        room here yet."""
        ticket = sequence.request.ticket
        if ticket is None or ticket.side == "source":
            return
        try:
            self._handoffs.expect(sequence, self._now(ticket, sequence))
        except KVError as error:
            sequence.outcome = _not_begun(ticket, Stage.QUEUE, error)

    def begin(self, sequence: Sequence) -> None:
        """A sequence got its blocks and is running."""
        ticket = sequence.request.ticket
        if ticket is None or sequence.index > 0:
            return
        if ticket.side == "source":
            self._begin_source(sequence, ticket)
        else:
            self._begin_target(sequence, ticket)

    def publisher(self, works: list[Pass]) -> Callable[[int], None]:
        """What to call with each layer whose KV of these passes is in memory."""
        publishers = [self._handoffs.publisher(w) for w in works if w.sequence.publishing]

        def publish(layer: int) -> None:
            for publisher in publishers:
                publisher(layer)

        return publish

    def after_pass(self, work: Pass) -> None:
        """A pass has run; seals what is complete."""
        self._handoffs.after_pass(work)
        if not work.sequence.in_prefill:
            work.sequence.recomputing = False

    def cancel(self, sequence: Sequence, reason: str) -> None:
        """A request is given up on this side."""
        outcome = self._recovering.pop(sequence, None)
        if outcome is not None:
            self._report(msgspec.structs.replace(outcome, state=TerminalState.ABORTED))
        self._handoffs.cancel(sequence, reason, self._remaining_s(sequence))

    def follow(self) -> None:
        """Take up what the handoff node says is over; call it once a step."""
        self._handoffs.beat()
        for ended in self._handoffs.released():
            sequence = ended.sequence
            if sequence.state is State.FINISHED:
                self._let_go(sequence)
                continue
            # The other side has gone, or the lease ran out: nobody will pull what is computed from here on.
            ticket, why = sequence.request.ticket, f": {ended.cause}" if ended.cause else ""
            target = ticket.target.instance_id if ticket is not None else "the decode instance"
            error = RequestError(
                f"the handoff to {target} ended ({ended.reason}) while its prompt was being computed{why}",
                code="handoff_ended",
                status=503,
            )
            self._fail(sequence.request.request_id, error)
        for sequence, outcome in self._handoffs.outcomes():
            self._take_outcome(sequence, outcome)

    def _begin_source(self, sequence: Sequence, ticket: HandoffTicket) -> None:
        late = self._now(ticket, sequence)
        if late.remaining_s <= 0:
            error = RequestError(
                f"the handoff's deadline of {ticket.remaining_s:.1f} s passed while the request waited for room",
                code="deadline_exceeded",
                status=503,
            )
            self._fail(sequence.request.request_id, error)
            return
        try:
            self._handoffs.offer(sequence, late)
        except KVError as error:
            status = 409 if isinstance(error, CompatibilityError) else 503
            self._fail(sequence.request.request_id, RequestError(str(error), code=error.cause, status=status))

    def _begin_target(self, sequence: Sequence, ticket: HandoffTicket) -> None:
        if sequence.outcome is not None:
            # It ended while the request waited for room; nothing was pulled.
            self._without_handoff(sequence, sequence.outcome)
            return
        try:
            self._handoffs.drop_select(sequence, self._now(ticket, sequence))
        except KVError as error:
            self._without_handoff(sequence, _not_begun(ticket, Stage.RESERVING, error))
        else:
            self._scheduler.park(sequence)

    def _take_outcome(self, sequence: Sequence, outcome: Outcome) -> None:
        if sequence.state is State.FINISHED:
            self._report(outcome)
            self._let_go(sequence)
        elif sequence.state is State.WAITING:
            sequence.outcome = outcome
        elif outcome.state is TerminalState.DELIVERED:
            self._scheduler.resume(sequence)
            sequence.num_computed = sequence.prefill_end
            # The source saves them in the KV pool, as it is the one that computed them.
            sequence.num_saved = len(sequence.hashes)
            self._scheduler.register_prefix(sequence)
            # The last token's pass gives the first token of the answer, so it always runs here.
            self._settle(sequence, msgspec.structs.replace(outcome, tokens_computed=1))
        else:
            self._scheduler.resume(sequence)
            self._without_handoff(sequence, outcome)

    def _without_handoff(self, sequence: Sequence, outcome: Outcome) -> None:
        """The KV did not come: compute the prompt here, or fail, as the settings say. The sequence is running."""
        num_recomputing = sum(s.recomputing for s in self._scheduler.running)
        crowded = num_recomputing >= self._settings.max_recomputing
        if self._settings.on_failure == "fail" or crowded:
            why = f", and {num_recomputing} prompts are being recomputed already" if crowded else ""
            ticket, cause = sequence.request.ticket, outcome.cause or outcome.state
            source = ticket.source.instance_id if ticket is not None else "the prefill instance"
            told = f"{outcome.detail} ({cause})" if outcome.detail else cause
            error = RequestError(
                f"the KV cache of {source} did not arrive: {told}{why}",
                code=outcome.cause or "handoff_failed",
                status=503 if crowded else 502,
            )
            self._settle(sequence, msgspec.structs.replace(outcome, state=TerminalState.FAILED))
            self._fail(sequence.request.request_id, error)
            return
        sequence.recomputing = True
        self._recovering[sequence] = outcome

        def recompute() -> None:
            del self._recovering[sequence]
            num_missing = sequence.num_prompt - sequence.num_computed
            self._settle(
                sequence, msgspec.structs.replace(outcome, state=TerminalState.RECOMPUTED, tokens_computed=num_missing)
            )

        self._recover(sequence, recompute)

    def _settle(self, sequence: Sequence, outcome: Outcome) -> None:
        sequence.outcome = outcome
        self._report(outcome)
        sequence.request.sink(outcome)

    def _remaining_s(self, sequence: Sequence) -> float:
        deadline_s = sequence.request.deadline_s
        return 0.0 if deadline_s is None else deadline_s - self._clock()

    def _now(self, ticket: HandoffTicket, sequence: Sequence) -> HandoffTicket:
        """The ticket with the time that is left now."""
        return msgspec.structs.replace(ticket, remaining_s=self._remaining_s(sequence))


def _not_begun(ticket: HandoffTicket, stage: Stage, error: KVError) -> Outcome:
    return Outcome(ticket.handoff, TerminalState.FAILED, stage, error.cause, str(error), attempt=ticket.attempt)
