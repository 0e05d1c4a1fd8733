"""The request machine: what each event makes it do, as lists of actions."""

from __future__ import annotations

import random

import pytest

from kvferry.errors import InvalidTransition
from kvferry.router.machine import RequestMachine
from kvferry.router.steps import (
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
    Unplaced,
)
from kvferry.types import HandoffId, Outcome, Stage, TerminalState

PAIR = Placed("d0", "p0")
LOST = Failure("peer_gone", "gone")
NOT_TAKEN = Failure("peer_gone", "refused", taken=False)
NONE = frozenset[str]()


def outcome(state: str = "delivered", **fields: object) -> Outcome:
    return Outcome(HandoffId("ab" * 16), TerminalState(state), **fields)  # type: ignore[arg-type]


def machine(*events: Event, attempts: int = 3) -> RequestMachine:
    made = RequestMachine("r", max_attempts=attempts)
    assert made.start() == [Place(0, NONE)]
    for event in events:
        made.handle(event)
    return made


def ended(m: RequestMachine) -> tuple[TerminalState, Stage | None, str | None]:
    assert m.verdict is not None
    return m.verdict.state, m.verdict.stage, m.verdict.cause


def test_a_delivered_stream() -> None:
    m = machine()
    assert m.stage is Stage.QUEUE
    assert m.handle(PAIR) == [OpenLegs(0, True)]
    assert m.stage is Stage.PREFILL
    assert m.handle(PrefillEnded(0)) == []
    assert m.stage is Stage.DECODE
    assert m.handle(OutcomeArrived(0, outcome())) == []
    assert m.handle(DecodeStarted(0)) == [Forward(0)]
    assert m.stage is Stage.STREAMING
    assert m.handle(DecodeEnded(0, 200)) == [Deliver(0), CloseLegs(0), Finish()]
    assert ended(m) == ("delivered", None, None)


def test_prefill_s_token_begins_the_stream() -> None:
    m = machine(PAIR)
    assert m.handle(FirstTokenCame(0)) == [ForwardFirst(0)]
    assert m.stage is Stage.STREAMING
    assert m.handle(PrefillEnded(0)) == []
    assert m.handle(DecodeStarted(0)) == [ForwardRest(0)]
    assert m.handle(OutcomeArrived(0, outcome())) == []
    assert m.handle(DecodeEnded(0, 200)) == [Deliver(0), CloseLegs(0), Finish()]


def test_decode_may_be_the_quicker_one() -> None:
    m = machine(PAIR, DecodeStarted(0))
    assert m.handle(FirstTokenCame(0)) == []


@pytest.mark.parametrize("before", [[], [DecodeStarted(0)]])
def test_after_prefill_s_token_decode_is_never_replaced(before: list[Event]) -> None:
    m = machine(PAIR, FirstTokenCame(0), *before)
    assert m.handle(DecodeFailed(0, LOST)) == [CloseLegs(0), BreakOff(), Finish()]
    assert ended(m) == ("failed", "streaming", "peer_gone")


def test_an_answer_waits_for_the_outcome() -> None:
    m = machine(PAIR)
    assert m.handle(DecodeEnded(0, 200)) == [AwaitOutcome(0)]
    assert m.handle(DecodeEnded(0, 200)) == []
    assert m.handle(DecodeFailed(0, LOST)) == []
    # Prefill is still answering, and may end by itself.
    assert m.handle(OutcomeArrived(0, outcome())) == [Deliver(0), ReleasePrefill(0), Finish()]


@pytest.mark.parametrize("last", [OutcomeOverdue(0), DeadlinePassed("deadline", "")])
def test_an_unknown_outcome_is_not_called_delivered(last: Event) -> None:
    m = machine(PAIR, DecodeEnded(0, 200))
    assert m.handle(last) == [Deliver(0), CloseLegs(0), Finish()]
    assert ended(m) == ("recomputed", Stage.DECODE, "outcome_unknown")


def test_the_target_s_own_verdict_is_the_request_s() -> None:
    report = outcome("recomputed", stage=Stage.WAITING, cause="transfer_timeout", tokens_computed=9)
    m = machine(PAIR, OutcomeArrived(0, report), DecodeStarted(0), DecodeEnded(0, 200))
    assert ended(m) == ("recomputed", Stage.WAITING, "transfer_timeout")
    assert m.verdict is not None and m.verdict.as_header() == report.as_header()


def test_direct_placements_need_no_outcome() -> None:
    m = machine(Placed("d0", None, "one_instance"))
    assert m.handle(DecodeEnded(0, 200)) == [Deliver(0), CloseLegs(0), Finish()]
    assert ended(m) == ("delivered", None, "one_instance")
    m = machine(Placed("d0", None, "no_prefill_instance"), DecodeEnded(0, 200))
    assert ended(m) == ("recomputed", Stage.QUEUE, "no_prefill_instance")


def test_decode_lost_before_the_first_byte_is_replaced_with_a_new_attempt() -> None:
    m = machine(PAIR)
    assert m.handle(DecodeFailed(0, LOST)) == [CloseLegs(0), Place(1, frozenset({"d0"}))]
    assert m.handle(Placed("d1", "p0")) == [OpenLegs(1, True)]
    # R9: whatever still comes from the first attempt changes nothing.
    for stale in (DecodeStarted(0), DecodeEnded(0, 200), PrefillFailed(0, LOST), OutcomeArrived(0, outcome())):
        assert m.handle(stale) == []
    assert m.handle(DecodeStarted(1)) == [Forward(1)]
    assert m.handle(OutcomeArrived(1, outcome())) == []
    assert m.handle(DecodeEnded(1, 200))[0] == Deliver(1)
    assert m.num_failovers == 1


def test_decode_lost_after_the_first_byte_is_never_replaced() -> None:
    m = machine(PAIR, DecodeStarted(0))
    assert m.handle(DecodeFailed(0, LOST)) == [CloseLegs(0), BreakOff(), Finish()]
    assert ended(m) == ("failed", Stage.STREAMING, "peer_gone")


def test_attempts_are_bounded() -> None:
    m = machine(PAIR, DecodeFailed(0, LOST), Placed("d1", "p0"), DecodeFailed(1, LOST), Placed("d2", "p0"))
    assert m.handle(DecodeFailed(2, LOST)) == [CloseLegs(2), Refuse(502), Finish()]


def test_no_other_decode_instance() -> None:
    m = machine(PAIR, DecodeFailed(0, LOST))
    assert m.handle(Unplaced("none")) == [CloseLegs(1), Refuse(503), Finish()]
    assert ended(m) == ("failed", Stage.DECODE, "peer_gone")
    m = machine()
    assert m.handle(Unplaced("none")) == [Refuse(503), Finish()]
    assert ended(m) == ("failed", Stage.QUEUE, "no_instance_available")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_refusing_decode_instance_is_replaced_or_its_answer_passed_on(status: int) -> None:
    m = machine(PAIR)
    assert m.handle(DecodeEnded(0, status)) == [CloseLegs(0), Place(1, frozenset({"d0"}))]
    assert m.handle(Unplaced("none")) == [Deliver(1), CloseLegs(1), Finish()]
    assert ended(m) == ("failed", Stage.DECODE, f"http_{status}")
    last = machine(PAIR, attempts=1)
    assert last.handle(DecodeEnded(0, status)) == [Deliver(0), CloseLegs(0), Finish()]


def test_the_client_s_own_error_is_not_tried_elsewhere() -> None:
    m = machine(PAIR)
    assert m.handle(DecodeEnded(0, 400)) == [Deliver(0), CloseLegs(0), Finish()]
    assert ended(m) == ("failed", Stage.DECODE, "http_400")


def test_a_failed_handoff_names_its_own_stage_and_cause() -> None:
    report = outcome("failed", stage=Stage.PULLING, cause="integrity_error")
    m = machine(PAIR, OutcomeArrived(0, report), attempts=1)
    m.handle(DecodeEnded(0, 500))
    assert ended(m) == ("failed", Stage.PULLING, "integrity_error")


def test_prefill_that_did_not_take_the_request_is_replaced_if_there_is_another() -> None:
    m = machine(PAIR)
    assert m.handle(PrefillFailed(0, NOT_TAKEN)) == [Place(1, frozenset({"p0"}), pair_only=True)]
    assert m.handle(Placed("d0", "p1")) == [CloseLegs(0), OpenLegs(1, True)]
    alone = machine(PAIR, PrefillFailed(0, NOT_TAKEN))
    assert alone.handle(Unplaced("none")) == []
    # The target goes on by itself.
    assert alone.attempt == 0 and alone.handle(DecodeStarted(0)) == [Forward(0)]


def test_prefill_lost_on_the_way_or_after_decode_began_is_not_replaced() -> None:
    assert machine(PAIR).handle(PrefillFailed(0, LOST)) == []
    assert machine(PAIR, DecodeStarted(0)).handle(PrefillFailed(0, NOT_TAKEN)) == []
    assert machine(PAIR, DecodeEnded(0, 200)).handle(PrefillFailed(0, NOT_TAKEN)) == []


def test_what_an_instance_said_is_in_the_verdict() -> None:
    said = machine(PAIR, DecodeEnded(0, 500, said="out of memory"), attempts=1).verdict
    assert said is not None and said.detail == "d0 answered 500: out of memory"
    refused = Failure("http_503", "p0 answered 503: 64 requests wait already", taken=False)
    late = outcome("recomputed", stage=Stage.WAITING, cause="deadline_exceeded", detail="p0 did not begin with it")
    m = machine(PAIR, PrefillFailed(0, refused), Unplaced("none"), OutcomeArrived(0, late), DecodeEnded(0, 200))
    told = "p0 did not begin with it; the prefill leg ended early: p0 answered 503: 64 requests wait already"
    assert m.verdict is not None and m.verdict.detail == told


def test_a_prefill_that_failed_before_is_not_named_after_another_took_over() -> None:
    report = outcome("recomputed", stage=Stage.WAITING, cause="source_silent", detail="nothing was heard of p1")
    m = machine(PAIR, PrefillFailed(0, NOT_TAKEN), Placed("d0", "p1"), OutcomeArrived(1, report), DecodeEnded(1, 200))
    assert m.verdict is not None and m.verdict.detail == "nothing was heard of p1"


@pytest.mark.parametrize(
    ("events", "closing", "stage"),
    [
        ([], [], Stage.QUEUE),
        ([PAIR], [CloseLegs(0)], Stage.PREFILL),
        ([PAIR, PrefillEnded(0)], [CloseLegs(0)], Stage.DECODE),
        ([PAIR, DecodeStarted(0)], [CloseLegs(0)], Stage.STREAMING),
        ([PAIR, DecodeEnded(0, 200)], [CloseLegs(0)], Stage.STREAMING),
    ],
)
def test_a_client_that_leaves_closes_both_legs(events: list[Event], closing: list[object], stage: Stage) -> None:
    m = machine(*events)
    assert m.handle(ClientGone()) == [*closing, Finish()]
    assert ended(m) == ("aborted", stage, "client_gone")
    assert m.handle(ClientGone()) == []


def test_the_deadline_is_told_in_the_form_that_is_still_possible() -> None:
    passed = DeadlinePassed("deadline", "late")
    assert machine(PAIR).handle(passed) == [CloseLegs(0), Refuse(504), Finish()]
    assert machine(PAIR, DecodeStarted(0)).handle(passed) == [CloseLegs(0), BreakOff(), Finish()]


def test_an_error_event_in_the_stream_is_a_failure() -> None:
    m = machine(PAIR, OutcomeArrived(0, outcome()), DecodeStarted(0))
    assert m.handle(DecodeEnded(0, 200, error_event=True))[0] == Deliver(0)
    assert ended(m) == ("failed", Stage.STREAMING, "instance_error")
    assert m.verdict is not None and m.verdict.as_header() == "failed; stage=streaming; cause=instance_error; path=pair"


def test_a_bug_of_the_caller_tells_the_request_s_story() -> None:
    m = machine(PAIR, DecodeStarted(0))
    with pytest.raises(InvalidTransition, match="Placed"):
        m.handle(Placed("d1", None))


def test_any_order_of_events_ends_once_and_sends_one_attempt() -> None:
    """Random lives: exactly one Finish, last; bytes from one attempt only; every attempt but the last is closed."""
    random.seed(5)
    ends = set()
    for _ in range(5000):
        m = RequestMachine("r", max_attempts=3)
        todo, done = m.start(), []
        names = iter(range(100))
        while todo or m.verdict is None:
            while todo:
                action = todo.pop(0)
                done.append(action)
                if isinstance(action, Place):
                    place = random.random() < 0.8
                    placed = Placed(f"d{next(names)}", random.choice(["p", None]), "one_instance")
                    todo += m.handle(placed if place else Unplaced("no"))
            a = random.randint(max(0, m.attempt - 1), m.attempt)
            events: list[Event] = [
                PrefillEnded(a),
                PrefillFailed(a, random.choice([LOST, NOT_TAKEN])),
                DecodeEnded(a, random.choice([200, 200, 400, 503])),
                DecodeFailed(a, LOST),
                OutcomeArrived(a, outcome(random.choice(["delivered", "recomputed", "failed"]))),
                OutcomeOverdue(a),
            ]
            if m.state == "running":
                events += [DecodeStarted(a), DecodeStarted(a), FirstTokenCame(a)]
            elif m.state == "forwarding" and not any(isinstance(x, Forward | ForwardRest) for x in done):
                events += [DecodeStarted(a)] * 3
            if random.random() < 0.05:
                events = [ClientGone(), DeadlinePassed("deadline", "")]
            event = random.choice(events)
            if m.state == "forwarding" and isinstance(event, DecodeEnded) and event.status != 200:
                continue
            todo += m.handle(event)
        assert [type(x) for x in done].count(Finish) == 1 and done[-1] == Finish()
        sent = {x.attempt for x in done if isinstance(x, Forward | ForwardFirst | ForwardRest | Deliver)}
        words = [x for x in done if isinstance(x, Deliver | Refuse | BreakOff)]
        assert len(sent) <= 1 and len(words) <= 1
        opened = [x.attempt for x in done if isinstance(x, OpenLegs)]
        closed = {x.attempt for x in done if isinstance(x, CloseLegs | ReleasePrefill)}
        assert set(opened) <= closed and opened == sorted(set(opened))
        ends.add(m.verdict.state if m.verdict else None)
    assert ends == set(TerminalState)
