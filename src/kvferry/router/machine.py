"""The life of one client request over its attempts: event in, actions out. Pure; the exchange executes the actions.

    placing -> running -> forwarding -> settling -> finished
       ^----------'  a new attempt, as long as the client has seen no byte

An *attempt* is one placement: a decode leg and, where a handoff is promised, a prefill leg beside it. Events of an
attempt that is not the current one change nothing (R9: one client's bytes come from one attempt).

`forwarding` begins with the decode leg's first bytes or, where the router streams it, with the prefill leg's token.
"""

from __future__ import annotations

from kvferry.errors import InvalidTransition
from kvferry.router.steps import (
    PLANNED_DIRECT,
    Action,
    AwaitOutcome,
    BreakOff,
    ClientGone,
    CloseLegs,
    DeadlinePassed,
    DecodeEnded,
    DecodeFailed,
    DecodeStarted,
    Deliver,
    Event,
    Failure,
    Finish,
    FirstTokenCame,
    Forward,
    ForwardFirst,
    ForwardRest,
    OpenLegs,
    OutcomeArrived,
    OutcomeOverdue,
    Place,
    Placed,
    PrefillEnded,
    PrefillFailed,
    Refuse,
    ReleasePrefill,
    State,
    Unplaced,
    Verdict,
)
from kvferry.types import Outcome, Stage, TerminalState


class RequestMachine:
    """One request. `handle` takes an event and gives the actions in the order in which they must be done."""

    def __init__(self, request_id: str, *, max_attempts: int) -> None:
        self.request_id = request_id
        self.state = State.PLACING
        self.attempt = 0
        self.verdict: Verdict | None = None
        self.placed: Placed | None = None
        self.prefill_failure: Failure | None = None
        self.prefill_open = False
        self.num_failovers = 0
        self._decode_open = False
        self._max_attempts = max_attempts
        self._excluded: frozenset[str] = frozenset()
        self._replacing_prefill = False
        self._last_failure: Failure | None = None
        self._held_status: int | None = None
        self._error_event = False
        self._decode_said = ""
        self._prefill_said = ""
        self._first_token_sent = False
        self._outcome: Outcome | None = None
        self._story: list[tuple[State, Event]] = []

    @property
    def stage(self) -> Stage:
        """Where the request is, in the words of types.Stage."""
        if self.placed is None:
            return Stage.QUEUE
        if self.state in (State.FORWARDING, State.SETTLING):
            return Stage.STREAMING
        return Stage.PREFILL if self.prefill_open else Stage.DECODE

    @property
    def promised(self) -> bool:
        """Whether the current attempt has a handoff."""
        return self.placed is not None and self.placed.prefill is not None

    def start(self) -> list[Action]:
        """The first actions."""
        return [Place(0, self._excluded)]

    def handle(self, event: Event) -> list[Action]:
        """Raises: InvalidTransition for an event that the state forbids: a bug of the caller."""
        if self.state is State.FINISHED:
            return []
        if getattr(event, "attempt", self.attempt) != self.attempt:
            return []
        self._story.append((self.state, event))
        match event:
            case Placed():
                return self._on_placed(event)
            case Unplaced():
                return self._on_unplaced(event)
            case PrefillEnded():
                self.prefill_open = False
                return []
            case PrefillFailed():
                return self._on_prefill_failed(event.failure)
            case FirstTokenCame():
                # The decode leg may have been the quicker one.
                if self.state is not State.RUNNING:
                    return []
                self.state = State.FORWARDING
                self._first_token_sent = True
                return [ForwardFirst(self.attempt)]
            case DecodeStarted():
                if self._first_token_sent:
                    self._first_token_sent = False
                    return [ForwardRest(self.attempt)]
                self._require(State.RUNNING, event)
                self.state = State.FORWARDING
                return [Forward(self.attempt)]
            case DecodeEnded():
                return self._on_decode_ended(event)
            case DecodeFailed():
                return self._on_decode_failed(event.failure)
            case OutcomeArrived():
                self._outcome = event.outcome
                return self._deliver() if self.state is State.SETTLING else []
            case OutcomeOverdue():
                return self._deliver() if self.state is State.SETTLING else []
            case ClientGone():
                why = "the client closed its connection"
                return self._end(Verdict(TerminalState.ABORTED, self.stage, "client_gone", why, self._outcome))
            case DeadlinePassed():
                if self.state is State.SETTLING:
                    return self._deliver()
                return self._fail(event.cause, event.detail, event.status)

    def _on_placed(self, event: Placed) -> list[Action]:
        if self._replacing_prefill:
            self._replacing_prefill = False
            closing: list[Action] = [CloseLegs(self.attempt)]
            self.attempt += 1
            self.num_failovers += 1
        else:
            self._require(State.PLACING, event)
            closing = []
        self.placed = event
        self.state = State.RUNNING
        self._outcome = None
        self._held_status = None
        self._prefill_said = ""
        self.prefill_open = event.prefill is not None
        self._decode_open = True
        return [*closing, OpenLegs(self.attempt, self.prefill_open)]

    def _on_unplaced(self, event: Unplaced) -> list[Action]:
        if self._replacing_prefill:
            # No other prefill instance: the target has its own deadline and computes the prompt itself.
            self._replacing_prefill = False
            return []
        self._require(State.PLACING, event)
        if self._held_status is not None:
            return self._deliver()
        if self._last_failure is not None:
            detail = f"{self._last_failure.detail}; {event.detail}"
            return self._fail(self._last_failure.cause, detail, 503, Stage.DECODE)
        return self._fail("no_instance_available", event.detail, 503)

    def _on_prefill_failed(self, failure: Failure) -> list[Action]:
        self.prefill_open = False
        self.prefill_failure = failure
        self._prefill_said = f"the prefill leg ended early: {failure.detail}"
        assert self.placed is not None
        retry = self.state is State.RUNNING and self._decode_open and not failure.taken
        if not retry or self.attempt + 1 >= self._max_attempts or self.placed.prefill is None:
            return []
        self._excluded |= {self.placed.prefill}
        self._replacing_prefill = True
        return [Place(self.attempt + 1, self._excluded, pair_only=True)]

    def _on_decode_ended(self, event: DecodeEnded) -> list[Action]:
        if self.state is State.SETTLING:
            return []
        self._decode_open = False
        self._held_status = event.status
        self._error_event = event.error_event
        said = f": {event.said}" if event.said else ""
        self._decode_said = f"{self._decode} answered {event.status}{said}"
        if self.state is State.RUNNING and (event.status >= 500 or event.status == 429):
            return self._retry(Failure(f"http_{event.status}", self._decode_said))
        if event.status < 400 and self.promised and self._outcome is None:
            self.state = State.SETTLING
            return [AwaitOutcome(self.attempt)]
        return self._deliver()

    def _on_decode_failed(self, failure: Failure) -> list[Action]:
        self._decode_open = False
        if self.state is State.FORWARDING:
            return self._fail(failure.cause, failure.detail, 502)
        if self.state is not State.RUNNING:
            return []
        return self._retry(failure)

    def _retry(self, failure: Failure) -> list[Action]:
        """The decode instance failed before the client saw a byte: another one, with a new handoff."""
        assert self.placed is not None
        self._replacing_prefill = False
        self._last_failure = failure
        self._excluded |= {self.placed.decode}
        closing = CloseLegs(self.attempt)
        if self.attempt + 1 >= self._max_attempts:
            if self._held_status is not None:
                return self._deliver()
            return self._fail(failure.cause, failure.detail, 502)
        self.attempt += 1
        self.num_failovers += 1
        self.state = State.PLACING
        self.prefill_open = False
        return [closing, Place(self.attempt, self._excluded)]

    def _deliver(self) -> list[Action]:
        assert self._held_status is not None and self.placed is not None
        outcome, status = self._outcome, self._held_status
        path = "pair" if self.promised else "direct"
        if status >= 400:
            cause = outcome.cause if outcome is not None and outcome.cause else f"http_{status}"
            stage = outcome.stage if outcome is not None and outcome.stage else Stage.DECODE
            verdict = Verdict(TerminalState.FAILED, stage, cause, self._decode_said, outcome, path)
        elif self._error_event:
            why = f"{self._decode} ended its stream with an error"
            verdict = Verdict(TerminalState.FAILED, Stage.STREAMING, "instance_error", why, outcome, path)
        elif outcome is not None:
            told = [outcome.detail] if outcome.detail else []
            if outcome.state is not TerminalState.DELIVERED and self._prefill_said:
                told.append(self._prefill_said)
            verdict = Verdict(outcome.state, outcome.stage, outcome.cause, "; ".join(told) or None, outcome, path)
        elif self.promised:
            # Never claim a delivery that nobody confirmed.
            verdict = Verdict(
                TerminalState.RECOMPUTED,
                Stage.DECODE,
                "outcome_unknown",
                f"{self._decode} answered but did not report how the handoff ended",
                None,
                path,
            )
        elif self.placed.reason in PLANNED_DIRECT:
            verdict = Verdict(TerminalState.DELIVERED, None, self.placed.reason, None, None, path)
        else:
            why = f"{self._decode} computed the prompt itself: no handoff was tried"
            verdict = Verdict(TerminalState.RECOMPUTED, Stage.QUEUE, self.placed.reason, why, None, path)
        self.verdict = verdict
        self.state = State.FINISHED
        actions: list[Action] = [Deliver(self.attempt)]
        if self.prefill_open and verdict.state is TerminalState.DELIVERED:
            actions.append(ReleasePrefill(self.attempt))
        else:
            actions.append(CloseLegs(self.attempt))
        return [*actions, Finish()]

    def _fail(self, cause: str, detail: str, status: int, stage: Stage | None = None) -> list[Action]:
        sent = self.state is State.FORWARDING
        path = "pair" if self.promised else "direct"
        verdict = Verdict(TerminalState.FAILED, stage or self.stage, cause, detail, self._outcome, path)
        return self._end(verdict, BreakOff() if sent else Refuse(status))

    def _end(self, verdict: Verdict, *last_words: Action) -> list[Action]:
        self.verdict = verdict
        self.state = State.FINISHED
        closing: list[Action] = [CloseLegs(self.attempt)] if self.placed is not None else []
        return [*closing, *last_words, Finish()]

    @property
    def _decode(self) -> str:
        return self.placed.decode if self.placed is not None else "no instance"

    def _require(self, state: State, event: Event) -> None:
        if self.state is not state:
            story = tuple(f"{seen}: {past}" for seen, past in self._story)
            raise InvalidTransition(f"request {self.request_id}", self.state, str(event), story)
