"""The source's machine: each test feeds events and compares the list of actions."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from kvferry.errors import InvalidTransition
from kvferry.protocol.details import OTHER_PROMPT
from kvferry.protocol.events import (
    Action,
    Cancelled,
    Failed,
    Offered,
    PeerLost,
    Preempted,
    Published,
    Received,
    Refused,
    ReleaseBlocks,
    ReleaseReason,
    Revoked,
    Sealed,
    Send,
    Serving,
    SourceEvent,
    Stalled,
    StoreWord,
    Tick,
    ZeroWord,
)
from kvferry.protocol.lease import HandoffSettings
from kvferry.protocol.messages import (
    Ack,
    Cancel,
    Gone,
    Heartbeat,
    Manifest,
    Message,
    Reserved,
    Run,
    State,
    Subscribe,
    manifest_digest,
)
from kvferry.protocol.source import SourceHandoffs
from kvferry.types import HandoffId, HandoffTicket, Incarnation, InstanceRef, Word

P, D, OTHER = Incarnation(11), Incarnation(22), Incarnation(33)
H = HandoffId("aa" * 16)
DIGEST = b"prompt"
RUNS = [Run.of(range(0, 1), 0, [4, 5]), Run.of(range(1, 2), 0, [4, 5])]
SETTINGS = HandoffSettings(lease_ttl_s=3.0, heartbeat_s=0.6, stall_grace_s=0.2, max_per_peer=2, num_slots=4)
W1, W2 = Word(101), Word(102)


class Machine:
    """A source whose words are 101, 102, ... and whose sequence numbers count from 1."""

    def __init__(self, settings: HandoffSettings = SETTINGS) -> None:
        words = itertools.count(101)
        self.table = SourceHandoffs(P, settings, lambda: Word(next(words)))

    def do(self, event: SourceEvent, now_s: float) -> list[Action]:
        actions = self.table.handle(event, now_s)
        self.table.check_integrity()
        return actions

    def hear(self, message: Message, now_s: float, peer: Incarnation = D) -> list[Action]:
        return self.do(Received(peer, message), now_s)


def ticket(handoff: HandoffId = H, remaining_s: float = 10.0, source: Incarnation = P) -> HandoffTicket:
    return HandoffTicket(handoff, "source", InstanceRef("p", source), InstanceRef("d", D), remaining_s)


def offered(handoff: HandoffId = H, digest: bytes = DIGEST) -> Offered:
    return Offered(ticket(handoff), digest, 2)


def head(**fields: Any) -> dict[str, Any]:
    return {"handoff": H, "source": P, "target": D, **fields}


def subscribe(**fields: Any) -> Subscribe:
    return Subscribe(
        **head(**{"prompt_digest": DIGEST, "num_blocks": 2, "tick_s": 700.0, "remaining_s": 10.0} | fields)
    )


def sent(actions: list[Action]) -> list[Message]:
    return [a.message for a in actions if isinstance(a, Send)]


def streaming() -> Machine:
    """Offered at 0, subscribed at 0.1, both runs published at 0.2 and 0.3."""
    machine = Machine()
    machine.do(offered(), 0.0)
    machine.hear(subscribe(sequence=1), 0.1)
    machine.do(Published(H, RUNS[0]), 0.2)
    machine.do(Published(H, RUNS[1]), 0.3)
    return machine


def sealed() -> Machine:
    machine = streaming()
    machine.do(Sealed(H), 0.4)
    return machine


SILENCE = "nothing was heard of the decode instance for 3 s, the lease's time"


def released(reason: ReleaseReason, cause: str | None = None, *, slot: int = 0, word: Word = W1) -> list[Action]:
    return [ZeroWord(slot), ReleaseBlocks(H, word, reason, cause)]


def test_the_plain_life_word_for_word() -> None:
    machine = Machine()
    assert machine.do(offered(), 0.0) == [StoreWord(0, W1)]
    assert machine.table.next_timer_s() == 3.0
    first = State(**head(sequence=1, tick_s=0.1, echo_s=700.0, remaining_s=2.9, word=W1, slot=0))
    assert machine.hear(subscribe(sequence=1), 0.1) == [Send(D, first)]
    one = State(**head(sequence=2, tick_s=0.2, echo_s=700.0, remaining_s=2.8, word=W1, runs=(RUNS[0],)))
    assert machine.do(Published(H, RUNS[0]), 0.2) == [Send(D, one)]
    two = State(**head(sequence=3, tick_s=0.5, echo_s=700.0, remaining_s=2.5, word=W1, first_run=1, runs=(RUNS[1],)))
    assert machine.do(Published(H, RUNS[1]), 0.5) == [Send(D, two)]
    seal = Manifest(2, 2, manifest_digest(RUNS))
    (done,) = sent(machine.do(Sealed(H), 1.0))
    assert done == State(**head(sequence=4, tick_s=1.0, echo_s=700.0, remaining_s=2.0, word=W1, first_run=2, seal=seal))
    ack = Ack(**head(sequence=2, tick_s=701.5, word=W1))
    gone = Gone(**head(sequence=5, tick_s=1.5, echo_s=701.5, reason="acked"))
    assert machine.hear(ack, 1.5) == [*released(ReleaseReason.ACKED), Send(D, gone)]
    assert machine.table.knows(H)
    assert machine.do(Tick(), 13.0) == [] and not machine.table.knows(H) and len(machine.table) == 0


def test_nothing_is_sent_before_the_target_asks() -> None:
    machine = Machine()
    assert machine.do(offered(), 0.0) == [StoreWord(0, W1)]
    assert machine.do(Published(H, RUNS[0]), 0.1) == []
    assert machine.do(Sealed(H), 0.2) == []
    (state,) = sent(machine.hear(subscribe(), 0.3))
    assert isinstance(state, State) and state.runs == (RUNS[0],) and state.seal is not None


# Parking


def test_an_early_target_is_parked_and_served_when_the_request_comes() -> None:
    machine = Machine()
    parked = State(**head(sequence=1, tick_s=0.0, echo_s=700.0, remaining_s=3.0, word=Word(0)))
    assert machine.hear(subscribe(sequence=1), 0.0) == [Send(D, parked)]
    assert not machine.table.knows(H)
    state = State(**head(sequence=2, tick_s=1.0, echo_s=700.0, remaining_s=3.0, word=W1))
    assert machine.do(offered(), 1.0) == [StoreWord(0, W1), Send(D, state)]


def test_a_parked_target_that_falls_silent_is_forgotten_within_a_lease() -> None:
    machine = Machine()
    machine.hear(subscribe(), 0.0)
    machine.hear(subscribe(), 2.0)
    assert machine.do(Tick(), 3.0) == [] and len(machine.table) == 1
    machine.do(Tick(), 5.0)
    assert len(machine.table) == 0


def test_parking_is_bounded_for_each_peer_and_refusal_is_not_final() -> None:
    machine = Machine()
    for n in range(2):
        machine.hear(subscribe(handoff=HandoffId(f"{n:032x}")), 0.0)
    assert sent(machine.hear(subscribe(), 0.0)) == [Gone(**head(sequence=3, tick_s=0.0, echo_s=700.0, reason="busy"))]
    theirs = subscribe(handoff=HandoffId("ee" * 16), target=OTHER)
    assert isinstance(sent(machine.hear(theirs, 0.0, peer=OTHER))[0], State)
    machine.do(Tick(), 3.0)
    assert isinstance(sent(machine.hear(subscribe(), 3.1))[0], State)


def test_a_parked_target_of_another_prompt_is_told_at_once() -> None:
    machine = Machine()
    machine.hear(subscribe(prompt_digest=b"other"), 0.0)
    actions = machine.do(offered(), 1.0)
    assert actions[:3] == [StoreWord(0, W1), *released(ReleaseReason.FAILED, OTHER_PROMPT)]
    (gone,) = sent(actions)
    assert isinstance(gone, Gone) and gone.reason == "prompt_mismatch"


def test_a_late_target_of_another_prompt_is_told_at_once() -> None:
    machine = Machine()
    machine.do(offered(), 0.0)
    actions = machine.hear(subscribe(prompt_digest=b"other"), 0.5)
    assert actions[:2] == released(ReleaseReason.FAILED, OTHER_PROMPT)
    assert [m.reason for m in sent(actions) if isinstance(m, Gone)] == ["prompt_mismatch"]


# Losses heal


def test_a_heartbeat_is_answered_with_what_the_target_does_not_know() -> None:
    machine = sealed()
    beat = Heartbeat(**head(sequence=2, tick_s=701.0, echo_s=0.3, word=W1, runs_known=1))
    (state,) = sent(machine.hear(beat, 1.0))
    assert isinstance(state, State) and state.first_run == 1 and state.runs == (RUNS[1],) and state.seal is not None
    assert state.echo_s == 701.0 and state.remaining_s == pytest.approx(2.3)


@pytest.mark.parametrize("known", [-5, 99])
def test_a_progress_that_cannot_be_is_cut_to_what_can(known: int) -> None:
    (state,) = sent(sealed().hear(Heartbeat(**head(word=W1, runs_known=known)), 1.0))
    assert isinstance(state, State) and state.first_run in (0, 2)
    assert len(state.runs) == 2 - state.first_run


def test_a_heartbeat_under_another_word_gets_everything() -> None:
    (state,) = sent(sealed().hear(Heartbeat(**head(word=Word(9), runs_known=2)), 1.0))
    assert isinstance(state, State) and state.first_run == 0 and state.word == W1 and len(state.runs) == 2


# Leases


def test_a_lease_without_heartbeats_expires_and_the_word_falls_first() -> None:
    machine = streaming()
    assert machine.do(Tick(), 2.9) == []
    actions = machine.do(Tick(), 3.0)
    assert actions[:2] == released(ReleaseReason.EXPIRED, SILENCE)
    told = [(m.reason, m.detail) for m in sent(actions) if isinstance(m, Gone)]
    assert told == [("expired", SILENCE)]
    assert machine.do(Published(H, RUNS[0]), 3.1) == [] and machine.do(Sealed(H), 3.1) == []
    assert [(m.reason, m.detail) for m in sent(machine.hear(subscribe(), 3.2)) if isinstance(m, Gone)] == told


def test_a_target_that_never_asks_does_not_keep_blocks() -> None:
    machine = Machine()
    machine.do(offered(), 0.0)
    assert machine.do(Tick(), 3.0) == released(ReleaseReason.EXPIRED, SILENCE)


def test_a_heartbeat_renews_from_its_echo_not_from_its_arrival() -> None:
    machine = sealed()
    machine.hear(Heartbeat(**head(sequence=2, echo_s=2.0, word=W1)), 2.5)
    assert machine.table.next_timer_s() == 5.0
    machine.hear(Heartbeat(**head(sequence=3, echo_s=2.0, word=W1)), 4.9)
    assert machine.do(Tick(), 5.0)[:2] == released(ReleaseReason.EXPIRED, SILENCE)


def test_no_heartbeat_keeps_blocks_beyond_deadline_and_lease() -> None:
    machine = sealed()
    for tenth in range(5, 140):
        machine.hear(Heartbeat(**head(sequence=tenth, echo_s=tenth / 10 - 0.1, word=W1)), tenth / 10)
        if actions := machine.do(Tick(), tenth / 10):
            assert tenth == 130 and actions[:2] == released(ReleaseReason.EXPIRED, SILENCE)
            return
    pytest.fail("still leased")


def test_after_a_stall_messages_are_heard_before_the_lease_falls() -> None:
    machine = sealed()
    machine.do(Stalled(3.0), 3.1)
    assert machine.do(Tick(), 3.1) == [] and machine.table.next_timer_s() == pytest.approx(3.3)
    assert machine.hear(Ack(**head(word=W1)), 3.2)[:2] == released(ReleaseReason.ACKED)


def test_a_heartbeat_that_waited_through_a_stall_revives_nothing() -> None:
    machine = sealed()
    machine.do(Stalled(5.0), 5.4)
    machine.hear(Heartbeat(**head(sequence=2, echo_s=0.4, word=W1)), 5.4)
    assert machine.do(Tick(), 5.7)[:2] == released(ReleaseReason.EXPIRED, SILENCE)


def test_while_the_serving_loop_hangs_heartbeats_are_not_answered_and_renew_nothing() -> None:
    machine = sealed()
    machine.do(Serving(False), 0.5)
    assert machine.hear(Heartbeat(**head(sequence=2, echo_s=0.5, word=W1)), 0.6) == []
    assert machine.table.next_timer_s() == 3.0
    machine.do(Serving(True), 0.7)
    assert len(machine.hear(Heartbeat(**head(sequence=3, echo_s=0.5, word=W1)), 0.8)) == 1


# The ends


def test_an_ack_of_another_word_frees_nothing() -> None:
    machine = sealed()
    assert machine.hear(Ack(**head(word=Word(999))), 1.0) == []
    assert machine.table.counts["stale_ack"] == 1
    assert machine.hear(Ack(**head(word=W1)), 1.1)[:2] == released(ReleaseReason.ACKED)


def test_repeated_acks_free_once_and_are_each_answered() -> None:
    machine = sealed()
    machine.hear(Ack(**head(word=W1)), 1.0)
    for at_s in (1.3, 1.6):
        (gone,) = machine.hear(Ack(**head(word=W1)), at_s)
        assert isinstance(gone, Send) and isinstance(gone.message, Gone) and gone.message.reason == "acked"


def test_preemption_ends_one_lease_and_opens_another_with_a_new_word_in_another_slot() -> None:
    machine = streaming()
    actions = machine.do(Preempted(H), 1.0)
    state = State(**head(sequence=4, tick_s=1.0, echo_s=700.0, remaining_s=2.0, word=W2, slot=1))
    assert actions == [*released(ReleaseReason.PREEMPTED, "preempted"), StoreWord(1, W2), Send(D, state)]
    assert machine.do(Published(H, RUNS[0], W1), 1.1) == []  # computed under the word before
    assert len(machine.do(Published(H, RUNS[0], W2), 1.1)) == 1
    assert machine.hear(Ack(**head(word=W1)), 1.2) == []
    assert machine.do(Tick(), 3.0)[:2] == released(ReleaseReason.EXPIRED, SILENCE, slot=1, word=W2)


@pytest.mark.parametrize(
    ("event", "reason", "cause", "gone"),
    [
        (Revoked(H), ReleaseReason.REVOKED, "other requests needed the room", "revoked"),
        (Failed(H, "out_of_memory"), ReleaseReason.FAILED, "out_of_memory", "failed"),
        (Cancelled(H, "aborted"), ReleaseReason.CANCELLED, "aborted", "cancelled"),
    ],
)
def test_each_end_here_releases_once_and_tells_the_target(
    event: SourceEvent, reason: ReleaseReason, cause: str, gone: str
) -> None:
    machine = streaming()
    actions = machine.do(event, 1.0)
    assert actions[:2] == released(reason, cause)
    assert sent(actions) == [Gone(**head(sequence=4, tick_s=1.0, echo_s=700.0, reason=gone, detail=cause))]
    for again in (event, Revoked(H), Failed(H, "x"), Cancelled(H), Preempted(H), Tick()):
        assert machine.do(again, 1.1) == []


def test_the_targets_cancel_releases_and_needs_no_answer() -> None:
    machine = streaming()
    assert machine.hear(Cancel(**head(reason="deadline_exceeded")), 1.0) == released(
        ReleaseReason.CANCELLED, "deadline_exceeded"
    )


def test_a_lost_target_frees_what_it_had_subscribed_to_and_nothing_else() -> None:
    machine = streaming()
    waiting = HandoffId("bb" * 16)
    machine.do(offered(waiting), 0.5)
    machine.hear(subscribe(handoff=HandoffId("cc" * 16)), 0.5)
    why = "the connection to the decode instance was lost: it closed it"
    assert machine.do(PeerLost(D, "peer_gone", "it closed it"), 1.0) == released(ReleaseReason.FAILED, why)
    assert machine.table.knows(waiting) and len(machine.table) == 2
    assert machine.do(PeerLost(OTHER), 1.0) == []


# Late copies


def test_a_second_copy_of_the_request_is_refused_open_or_closed() -> None:
    machine = streaming()
    assert machine.do(offered(), 1.0) == [Refused(H, "source", "duplicate")]
    machine.do(Cancelled(H), 1.0)
    assert machine.do(offered(), 12.9) == [Refused(H, "source", "closed")]
    machine.do(Tick(), 13.0)
    assert not machine.table.knows(H)


def test_a_cancel_that_overtakes_its_request_keeps_it_out() -> None:
    here, there = Machine(), Machine()
    assert here.do(Cancelled(H, remaining_s=10.0), 0.0) == []
    assert there.hear(Cancel(**head(reason="aborted", remaining_s=10.0)), 0.0) == []
    for machine in (here, there):
        assert machine.do(offered(), 9.0) == [Refused(H, "source", "closed")]
        assert [m.reason for m in sent(machine.hear(subscribe(), 9.0)) if isinstance(m, Gone)] == ["cancelled"]
        machine.do(Tick(), 13.0)
        assert len(machine.table) == 0


def test_tombstones_made_by_a_peers_cancels_are_bounded() -> None:
    machine = Machine()
    for n in range(5):
        machine.hear(Cancel(**head(handoff=HandoffId(f"{n:032x}"), reason="x", remaining_s=math.inf)), 0.0)
    assert len(machine.table) == 2 and machine.table.counts["busy"] == 3
    machine.do(Tick(), 0.0 + SETTINGS.max_remaining_s + SETTINGS.lease_ttl_s)
    assert len(machine.table) == 0


def test_a_request_for_another_incarnation_is_refused_and_leaves_nothing() -> None:
    machine = Machine()
    event = Offered(ticket(source=OTHER), DIGEST, 2)
    assert machine.do(event, 0.0) == [Refused(H, "source", "incarnation_changed")]
    assert len(machine.table) == 0
    message = subscribe(source=OTHER)
    assert [m.reason for m in sent(machine.hear(message, 0.0)) if isinstance(m, Gone)] == ["incarnation_changed"]


def test_without_a_free_slot_the_request_is_refused_and_its_target_told() -> None:
    machine = Machine(HandoffSettings(num_slots=1))
    machine.do(offered(HandoffId("bb" * 16)), 0.0)
    machine.hear(subscribe(), 0.0)
    actions = machine.do(offered(), 0.1)
    assert actions[0] == Refused(H, "source", "busy")
    assert [m.reason for m in sent(actions) if isinstance(m, Gone)] == ["refused"]


def test_a_stranger_gets_neither_state_nor_influence() -> None:
    machine = streaming()
    message = subscribe(target=OTHER)
    assert [m.reason for m in sent(machine.hear(message, 0.5, peer=OTHER)) if isinstance(m, Gone)] == ["not_the_target"]
    assert machine.hear(Cancel(**head(reason="x")), 0.5, peer=OTHER) == []  # claims to be D
    assert machine.hear(State(**head(word=W1)), 0.5) == []  # only a source says that
    assert machine.table.counts["misaddressed"] == 2
    assert [v.stage for v in machine.table.views(0.6)] == ["publishing"]


def test_a_heartbeat_about_nothing_is_told_so() -> None:
    gone = Gone(**head(sequence=1, tick_s=0.0, echo_s=5.0, reason="unknown"))
    assert Machine().hear(Heartbeat(**head(word=W1, tick_s=5.0)), 0.0) == [Send(D, gone)]
    assert Machine().hear(Ack(**head(word=W1, tick_s=5.0)), 0.0) == [Send(D, gone)]


# Bugs of the caller


@pytest.mark.parametrize("event", [Published(H, RUNS[0]), Sealed(H)])
def test_nothing_can_be_published_after_the_seal_and_the_error_tells_the_story(event: SourceEvent) -> None:
    machine = sealed()
    with pytest.raises(InvalidTransition) as caught:
        machine.do(event, 1.0)
    assert caught.value.state == "sealed"
    assert [line.split(": ")[1] for line in caught.value.story] == [
        "added", "offered", "subscribed", "published", "published", "sealed",
    ]  # fmt: skip
    assert machine.hear(Ack(**head(word=W1)), 1.1)[:2] == released(ReleaseReason.ACKED)


# Pressure


def test_pressure_takes_the_unsubscribed_first_then_the_slowest_and_never_one_that_computes() -> None:
    machine = Machine(HandoffSettings(num_slots=8))
    ids = {name: HandoffId(name * 32) for name in "abcde"}
    for at_s, handoff in enumerate(ids.values()):
        machine.do(offered(handoff), at_s / 100)
        for run in RUNS:
            machine.do(Published(handoff, run), 0.1)
    for name in "abce":
        machine.do(Sealed(ids[name]), 0.2)
    for name in "abde":
        machine.hear(subscribe(handoff=ids[name], num_blocks=0), 0.2)
    machine.hear(Heartbeat(**head(handoff=ids["a"], word=W1, runs_known=2, runs_pulled=2)), 0.3)
    machine.hear(Heartbeat(**head(handoff=ids["b"], word=W2, runs_known=2, runs_pulled=1)), 0.3)
    assert machine.table.pressure_order() == [ids[n] for n in "ceba"]
    machine.hear(Reserved(**head(handoff=ids["e"], first_block=0, num_blocks=2)), 0.4)
    assert machine.table.pressure_order() == [ids[n] for n in "cbae"]


def test_views_tell_stage_age_and_time_left() -> None:
    (view,) = streaming().table.views(1.0)
    assert (view.handoff, view.side, view.stage, view.age_s, view.remaining_s) == (H, "source", "publishing", 1.0, 9.0)
    assert view.detail == "2 runs published, 0 pulled"
