"""The target's machine: each test feeds events and compares the list of actions."""

from __future__ import annotations

from typing import Any

import pytest

from kvferry.errors import InvalidTransition
from kvferry.protocol.events import (
    Action,
    Cancelled,
    Connect,
    Connected,
    ConnectFailed,
    Ended,
    PeerLost,
    Quarantine,
    Queued,
    ReadCompleted,
    ReadFailed,
    Received,
    Refused,
    Selected,
    Send,
    Serving,
    Stalled,
    StartRead,
    StopReads,
    TargetEvent,
    Tick,
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
from kvferry.protocol.target import TargetHandoffs
from kvferry.types import HandoffId, HandoffTicket, Incarnation, InstanceRef, Outcome, Stage, TerminalState, Word

P, D, OTHER = Incarnation(11), Incarnation(22), Incarnation(33)
H = HandoffId("aa" * 16)
DIGEST = b"prompt"
RUNS = (Run.of(range(0, 1), 0, [4, 5, 6], b"x"), Run.of(range(1, 2), 0, [4, 5, 6], b"y"))
SEAL = Manifest(2, 3, manifest_digest(RUNS))
SETTINGS = HandoffSettings(
    lease_ttl_s=3.0, heartbeat_s=0.6, stall_grace_s=0.2, drain_s=2.0, ack_repeats=2, ack_interval_s=0.5
)
W1, W2 = Word(101), Word(102)
SOURCE = InstanceRef("p", P, ("tcp://127.0.0.1:1",))


class Machine:
    """A target of two layers; sequence numbers and read ids count from 1."""

    def __init__(self, settings: HandoffSettings = SETTINGS) -> None:
        self.table = TargetHandoffs(D, settings, 2)
        self.sequence = 0

    def do(self, event: TargetEvent, now_s: float) -> list[Action]:
        actions = self.table.handle(event, now_s)
        self.table.check_integrity()
        return actions

    def hear(self, message: Message, now_s: float, peer: Incarnation = P) -> list[Action]:
        return self.do(Received(peer, message), now_s)

    def state(self, now_s: float, **fields: Any) -> list[Action]:
        """Hear a `State`, in sequence unless told otherwise."""
        self.sequence += 1
        given = {"sequence": self.sequence, "tick_s": 500.0 + now_s, "remaining_s": 3.0, "echo_s": now_s, "word": W1}
        return self.hear(State(**head(**given | fields)), now_s)


def ticket(**fields: Any) -> HandoffTicket:
    given = {"handoff": H, "side": "target", "source": SOURCE, "target": InstanceRef("d", D), "remaining_s": 10.0}
    return HandoffTicket(**given | fields)


def selected(first_block: int = 0, num_blocks: int = 3) -> Selected:
    return Selected(ticket(), DIGEST, first_block, num_blocks)


def head(**fields: Any) -> dict[str, Any]:
    return {"handoff": H, "source": P, "target": D, **fields}


def sent(actions: list[Action]) -> list[Message]:
    return [a.message for a in actions if isinstance(a, Send)]


def kinds(actions: list[Action]) -> list[str]:
    return [type(a.message if isinstance(a, Send) else a).__name__ for a in actions]


def outcome(actions: list[Action]) -> Outcome:
    (ended,) = [a for a in actions if isinstance(a, Ended)]
    assert ended.handoff == H == ended.outcome.handoff
    return ended.outcome


def end(actions: list[Action]) -> tuple[str, str | None, str | None]:
    found = outcome(actions)
    return found.state, found.stage, found.cause


def waiting(settings: HandoffSettings = SETTINGS) -> Machine:
    """Selected at 0, connected at 0.1."""
    machine = Machine(settings)
    machine.do(selected(), 0.0)
    machine.do(Connected(H, P), 0.1)
    return machine


def pulling(settings: HandoffSettings = SETTINGS) -> Machine:
    """Both runs known at 0.2 under W1, reads 1 and 2 under way, not sealed."""
    machine = waiting(settings)
    machine.state(0.2, runs=RUNS)
    return machine


def delivered() -> Machine:
    machine = pulling()
    machine.do(ReadCompleted(H, 1), 0.3)
    machine.do(ReadCompleted(H, 2), 0.4)
    assert kinds(machine.state(0.5, first_run=2, seal=SEAL)) == ["Ack", "Ended"]
    return machine


def test_the_plain_life_word_for_word() -> None:
    machine = Machine()
    assert machine.do(selected(), 0.0) == [Connect(H, SOURCE, 3.0)]
    subscribe = Subscribe(**head(sequence=1, tick_s=0.1, remaining_s=9.9, prompt_digest=DIGEST, num_blocks=3))
    assert machine.do(Connected(H, P), 0.1) == [Send(P, subscribe)]
    first = machine.state(0.2, slot=6, runs=RUNS[:1])
    beat = Heartbeat(**head(sequence=2, tick_s=0.2, echo_s=500.2, remaining_s=9.8, word=W1, runs_known=1))
    assert first == [StartRead(H, 1, RUNS[0], W1, 6, 9.8), Send(P, beat)]
    assert machine.state(0.5, slot=6, first_run=1, runs=RUNS[1:]) == [StartRead(H, 2, RUNS[1], W1, 6, 9.5)]
    assert machine.do(ReadCompleted(H, 2, 100, "shm"), 0.6) == []
    assert machine.state(0.7, slot=6, first_run=2, seal=SEAL) == []
    ack = Ack(**head(sequence=3, tick_s=1.0, echo_s=500.7, remaining_s=9.0, word=W1))
    verdict = Outcome(H, TerminalState.DELIVERED, bytes_moved=300, duration_s=1.0, transport="shm")
    assert machine.do(ReadCompleted(H, 1, 200), 1.0) == [Send(P, ack), Ended(H, verdict)]
    assert machine.hear(Gone(**head(sequence=9, reason="acked")), 1.1) == []
    assert machine.table.next_timer_s() == 13.0
    assert machine.do(Tick(), 13.0) == [] and len(machine.table) == 0


def test_the_ack_is_repeated_until_the_source_confirms() -> None:
    machine = delivered()
    assert [kinds(machine.do(Tick(), t)) for t in (0.9, 1.0, 1.5, 2.0)] == [[], ["Ack"], ["Ack"], []]
    confirmed = delivered()
    confirmed.hear(Gone(**head(sequence=9, reason="acked")), 0.6)
    assert confirmed.do(Tick(), 1.0) == []


def test_blocks_that_are_there_already_are_not_read() -> None:
    machine = Machine()
    machine.do(selected(first_block=2, num_blocks=1), 0.0)
    machine.do(Connected(H, P), 0.1)
    by_block = (Run.of(range(2), 0, [4, 5]), Run.of(range(2), 2, [6]))
    actions = machine.state(0.2, runs=by_block, seal=Manifest(2, 3, manifest_digest(by_block)))
    assert [a.run for a in actions if isinstance(a, StartRead)] == [by_block[1]]
    assert end(machine.do(ReadCompleted(H, 1), 0.3)) == ("delivered", None, None)


def test_a_target_that_has_everything_lets_the_source_go() -> None:
    machine = Machine()
    assert kinds(machine.do(selected(3, 0), 0.0)) == ["Connect", "Ended"]
    (cancel,) = sent(machine.do(Connected(H, P), 0.1))
    assert isinstance(cancel, Cancel) and cancel.reason == "not_needed"


def test_what_was_not_taken_is_never_acknowledged() -> None:
    machine = Machine()
    machine.do(Queued(ticket(), DIGEST), 0.0)
    machine.do(Connected(H, P), 0.1)
    machine.state(0.2, runs=RUNS)
    assert kinds(machine.do(selected(3, 0), 0.3)) == ["Reserved", "Cancel", "Ended"]
    for word in (W1, Word(0)):  # the cancel was lost
        assert kinds(machine.state(0.4, word=word, seal=SEAL)) == ["Cancel"]


def test_a_queued_request_keeps_the_lease_alive_and_reads_once_it_has_room() -> None:
    machine = Machine()
    assert machine.do(Queued(ticket(), DIGEST), 0.0) == [Connect(H, SOURCE, 3.0)]
    (subscribe,) = sent(machine.do(Connected(H, P), 0.1))
    assert isinstance(subscribe, Subscribe) and subscribe.num_blocks == 0
    assert kinds(machine.state(0.2, runs=RUNS, seal=SEAL)) == ["Heartbeat"]
    assert kinds(machine.do(Tick(), 0.8)) == ["Heartbeat"]
    actions = machine.do(selected(), 1.0)
    assert kinds(actions) == ["Reserved", "StartRead", "StartRead"]
    assert sent(actions) == [
        Reserved(**head(sequence=4, tick_s=1.0, echo_s=500.2, remaining_s=9.0, first_block=0, num_blocks=3))
    ]


# Losses heal


def test_subscribe_is_repeated_until_the_source_names_a_word_then_heartbeats_tell_the_progress() -> None:
    machine = waiting()
    assert kinds(machine.do(Tick(), 0.7)) == ["Subscribe"]
    assert kinds(machine.state(0.8, word=Word(0))) == ["Subscribe"]  # parked; the first answer is echoed at once
    assert kinds(machine.do(Tick(), 1.4)) == ["Subscribe"]
    machine.state(1.5, runs=RUNS)
    machine.do(ReadCompleted(H, 1), 1.6)
    (beat,) = sent(machine.do(Tick(), 2.0))
    assert isinstance(beat, Heartbeat) and (beat.word, beat.runs_known, beat.runs_pulled) == (W1, 2, 1)


def test_a_gap_is_asked_for_at_once() -> None:
    machine = waiting()
    machine.state(0.2)
    (beat,) = sent(machine.state(0.3, first_run=1, runs=RUNS[1:]))
    assert isinstance(beat, Heartbeat) and beat.runs_known == 0
    assert kinds(machine.state(0.4, runs=RUNS)) == ["StartRead", "StartRead"]


def test_what_is_known_is_not_read_twice() -> None:
    machine = pulling()
    assert machine.state(0.3, runs=RUNS) == []


def test_an_overtaken_state_changes_nothing() -> None:
    machine = waiting()
    machine.state(0.2, sequence=5, word=W2, runs=RUNS[:1])
    assert machine.state(0.3, sequence=4, word=W1, runs=RUNS) == []
    assert machine.table.progress(H) == (W2, 1, 0)


# Words


def test_a_new_word_discards_progress_and_waits_for_the_own_reads() -> None:
    machine = pulling()
    machine.do(ReadCompleted(H, 1), 0.3)
    assert machine.state(0.4, word=W2, slot=1, runs=RUNS[:1]) == [StopReads(H)]
    assert machine.table.progress(H) == (W2, 1, 0)
    assert machine.state(0.5, word=W2, slot=1, first_run=1, runs=RUNS[1:], seal=SEAL) == []
    actions = machine.do(ReadFailed(H, 2, "handoff_aborted"), 0.6)
    assert actions == [StartRead(H, 3, RUNS[0], W2, 1, 9.4), StartRead(H, 4, RUNS[1], W2, 1, 9.4)]
    machine.do(ReadCompleted(H, 3), 0.7)
    (ack, _) = machine.do(ReadCompleted(H, 4), 0.8)
    assert isinstance(ack, Send) and isinstance(ack.message, Ack) and ack.message.word == W2


def test_a_read_that_completes_while_draining_counts_for_nothing() -> None:
    machine = pulling()
    machine.state(0.3, word=W2)
    machine.do(ReadCompleted(H, 1), 0.4)
    machine.do(ReadCompleted(H, 2), 0.4)
    assert machine.table.progress(H) == (W2, 0, 0)


def test_a_fallen_word_asks_the_source_and_goes_on_under_the_next() -> None:
    machine = pulling()
    machine.do(ReadCompleted(H, 1), 0.3)
    (ask,) = sent(machine.do(ReadFailed(H, 2, "lease_expired"), 0.4))
    assert isinstance(ask, Subscribe)
    assert machine.table.progress(H) == (Word(0), 0, 0)
    assert machine.state(0.5, echo_s=0.3, first_run=2, seal=SEAL) == []  # on its way since before the word fell
    assert kinds(machine.state(0.6, word=W2, runs=RUNS)) == ["StartRead", "StartRead"]


def test_a_source_that_insists_on_a_fallen_word_is_not_believed() -> None:
    machine = pulling()
    machine.do(ReadFailed(H, 2, "lease_expired"), 0.4)
    machine.do(ReadFailed(H, 1, "handoff_aborted"), 0.4)
    actions = machine.state(0.6, echo_s=0.4, runs=RUNS)
    assert end(actions) == ("recomputed", "waiting", "word_mismatch") and kinds(actions) == ["Cancel", "Ended"]


# Verification


@pytest.mark.parametrize(
    ("seal", "detail"),
    [
        (Manifest(2, 3, b"another"), "manifest"),
        (Manifest(1, 3, manifest_digest(RUNS[:1])), "manifest"),
        (Manifest(-1, 3, b""), "manifest"),
    ],
)
def test_a_manifest_that_does_not_fit_is_an_integrity_error(seal: Manifest, detail: str) -> None:
    machine = pulling()
    machine.do(ReadCompleted(H, 1), 0.3)
    machine.do(ReadCompleted(H, 2), 0.3)
    actions = machine.state(0.4, first_run=2, seal=seal)
    assert end(actions) == ("recomputed", "verifying", "integrity_error")
    assert detail in (outcome(actions).detail or "") and kinds(actions) == ["Cancel", "Ended"]


def test_a_prompt_that_was_not_published_whole_is_not_accepted() -> None:
    machine = waiting()
    machine.state(0.2, runs=RUNS[:1], seal=Manifest(1, 3, manifest_digest(RUNS[:1])))
    actions = machine.do(ReadCompleted(H, 1), 0.3)
    assert end(actions) == ("recomputed", "verifying", "integrity_error")
    assert outcome(actions).detail == "what p sealed is not whole: 3 of 6 blocks were never published"


@pytest.mark.parametrize("layers", [range(-1, 1), range(1, 3), range(1, 1)])
def test_layers_that_do_not_exist_are_an_integrity_error(layers: range) -> None:
    actions = waiting().state(0.2, runs=(Run(layers.start, layers.stop, 0, RUNS[0].packed_ids),))
    assert end(actions) == ("recomputed", "verifying", "integrity_error")


def test_places_that_do_not_exist_are_never_read() -> None:
    far = Run.of(range(2), 1 << 62, [1])
    before = Run.of(range(2), -3, [1, 2])
    assert kinds(waiting().state(0.2, runs=(far, before))) == ["Heartbeat"]


# Every wait ends, and names its cause


def test_without_an_answer_the_source_counts_as_silent_after_a_lease() -> None:
    machine = waiting()
    for tenth in range(1, 31):
        assert not [a for a in machine.do(Tick(), tenth / 10) if isinstance(a, Ended)]
    actions = machine.do(Tick(), 3.2)
    assert end(actions) == ("recomputed", "waiting", "source_silent") and kinds(actions) == ["Cancel", "Ended"]


def test_an_answer_counts_from_what_it_answers() -> None:
    machine = waiting()
    machine.state(3.0, word=Word(0), echo_s=1.0, remaining_s=2.5)  # an old answer: the source was there at 1.0
    assert machine.do(Tick(), 3.45)[1:] == []
    assert end(machine.do(Tick(), 3.55)) == ("recomputed", "waiting", "source_silent")


def test_the_deadline_ends_the_wait_also_while_the_source_answers() -> None:
    machine = waiting()
    for tenth in range(2, 100):
        machine.do(Tick(), tenth / 10)
        machine.state(tenth / 10, word=Word(0))
    assert end(machine.do(Tick(), 10.0)) == ("recomputed", "waiting", "deadline_exceeded")


def test_the_deadline_also_ends_a_request_that_never_got_room() -> None:
    machine = Machine()
    machine.do(Queued(ticket(remaining_s=1.0), DIGEST), 0.0)
    assert end(machine.do(Tick(), 1.0)) == ("recomputed", "reserving", "deadline_exceeded")


def test_a_source_that_cannot_be_reached() -> None:
    machine = Machine()
    machine.do(selected(), 0.0)
    actions = machine.do(ConnectFailed(H, "peer_gone", "refused"), 0.1)
    told = "no way to p: refused"
    assert actions == [Ended(H, Outcome(H, TerminalState.RECOMPUTED, Stage.WAITING, "peer_gone", told, duration_s=0.1))]
    silent = Machine()
    silent.do(selected(), 0.0)
    assert end(silent.do(Tick(), 3.0)) == ("recomputed", "waiting", "source_silent")


def test_another_incarnation_at_the_sources_address() -> None:
    machine = Machine()
    machine.do(selected(), 0.0)
    assert end(machine.do(Connected(H, OTHER), 0.1)) == ("recomputed", "waiting", "incarnation_changed")


def test_a_ticket_for_another_incarnation_of_this_instance() -> None:
    actions = Machine().do(Selected(ticket(target=InstanceRef("d", OTHER)), DIGEST, 0, 3), 0.0)
    assert end(actions) == ("recomputed", "reserving", "incarnation_changed") and kinds(actions) == ["Ended"]


@pytest.mark.parametrize(
    ("reason", "cause"),
    [
        ("expired", "source_expired"),
        ("cancelled", "source_cancelled"),
        ("revoked", "source_revoked"),
        ("failed", "source_failed"),
        ("refused", "source_refused"),
        ("unknown", "source_unknown"),
        ("prompt_mismatch", "prompt_mismatch"),
        ("incarnation_changed", "incarnation_changed"),
    ],
)
def test_gone_ends_the_wait_at_once(reason: str, cause: str) -> None:
    actions = waiting().hear(Gone(**head(sequence=1, reason=reason, detail="why")), 0.5)
    told = outcome(actions).detail or ""
    assert end(actions) == ("recomputed", "waiting", cause) and " p " in f" {told} " and told.endswith(": why")


def test_a_source_without_room_to_park_is_asked_again() -> None:
    machine = waiting()
    assert machine.hear(Gone(**head(sequence=1, reason="busy")), 0.5) == []
    assert kinds(machine.do(Tick(), 0.7)) == ["Subscribe"]


@pytest.mark.parametrize("cause", ["peer_gone", "transfer_timeout", "registration_error"])
def test_a_read_that_fails_for_another_reason_ends_the_handoff(cause: str) -> None:
    machine = pulling()
    machine.do(ReadCompleted(H, 1), 0.3)
    assert end(machine.do(ReadFailed(H, 2, cause), 0.4)) == ("recomputed", "pulling", cause)


def test_a_wrong_digest_is_caught_while_verifying() -> None:
    machine = pulling()
    machine.do(ReadCompleted(H, 1), 0.3)
    assert end(machine.do(ReadFailed(H, 2, "integrity_error"), 0.4)) == ("recomputed", "verifying", "integrity_error")


@pytest.mark.parametrize(
    ("event", "told"),
    [
        (Tick(), "nothing was heard of p for 3 s, the lease's time"),
        (
            PeerLost(P, "peer_gone", "it closed the connection"),
            "the connection to p was lost: it closed the connection",
        ),
        (PeerLost(P), "the connection to p was lost"),
        (Received(P, Gone(**head(sequence=9, reason="unknown"))), "p knows nothing of this handoff (any more)"),
        (
            Received(P, Gone(**head(sequence=9, reason="expired", detail="nobody asked"))),
            "p let its blocks go: nobody asked",
        ),
        (Received(P, Gone(**head(sequence=9, reason="of later days"))), "p answered of later days"),
        (Cancelled(H, "the client left"), "the client left"),
    ],
)
def test_each_end_is_told_in_words_with_the_sources_name(event: TargetEvent, told: str) -> None:
    assert outcome(waiting().do(event, 3.2)).detail == told


def test_a_deadline_tells_how_far_it_had_got() -> None:
    within = "within 10.0 s, the time that it had"
    queued = Machine()
    queued.do(Queued(ticket(), DIGEST), 0.0)
    queued.do(Connected(H, P), 0.1)
    unknown, begun = waiting(), waiting()
    for machine, word, told in (
        (queued, Word(0), f"d had no room for its blocks {within}"),
        (unknown, Word(0), f"p did not begin with it {within}"),
        (begun, W1, f"p published nothing of it {within}"),
    ):
        machine.state(0.2, word=word, remaining_s=20.0)
        assert outcome(machine.do(Tick(), 10.0)).detail == told
    moving = waiting()
    moving.state(0.2, runs=RUNS, remaining_s=20.0)
    moving.do(ReadCompleted(H, 1), 0.3)
    moving.do(Tick(), 10.0)
    told = f"1 of the 2 runs that p had published were read {within}; more were to come"
    assert outcome(moving.do(ReadFailed(H, 2, "handoff_aborted"), 10.1)).detail == told


def test_the_policy_may_be_to_fail() -> None:
    machine = waiting(HandoffSettings(recompute_on_failure=False))
    assert end(machine.do(PeerLost(P), 0.5)) == ("failed", "waiting", "peer_gone")


def test_a_hanging_serving_loop_sends_no_heartbeats_and_is_named() -> None:
    machine = waiting()
    machine.do(Serving(False), 0.2)
    assert machine.do(Tick(), 0.8) == []
    assert end(machine.do(Tick(), 3.2)) == ("recomputed", "waiting", "serving_stalled")


def test_after_a_stall_messages_are_heard_before_the_wait_ends() -> None:
    machine = pulling()
    machine.do(ReadCompleted(H, 1), 0.3)
    machine.do(Stalled(20.0), 20.0)
    assert machine.do(Tick(), 20.0) == [] and machine.table.next_timer_s() == pytest.approx(20.2)
    machine.state(20.1, first_run=2, seal=SEAL)
    assert end(machine.do(ReadCompleted(H, 2), 20.1)) == ("delivered", None, None)


# R7: own reads first


@pytest.mark.parametrize(
    ("event", "verdict"),
    [
        (PeerLost(P), ("recomputed", "pulling", "peer_gone")),
        (Cancelled(H, "the client left"), ("aborted", "pulling", "handoff_aborted")),
        (Received(P, Gone(**head(sequence=9, reason="expired"))), ("recomputed", "pulling", "source_expired")),
        (ReadFailed(H, 1, "integrity_error"), ("recomputed", "verifying", "integrity_error")),
    ],
)
def test_nothing_is_reported_before_the_own_reads_have_ended(event: TargetEvent, verdict: tuple[str, str, str]) -> None:
    machine = pulling()
    first = machine.do(event, 1.0)
    assert StopReads(H) in first and not [a for a in first if isinstance(a, Ended)]
    if not isinstance(event, ReadFailed):
        assert machine.do(ReadFailed(H, 1, "handoff_aborted"), 1.1) == []
    last = machine.do(ReadCompleted(H, 2, 5), 1.2)
    assert kinds(last) == ["Ended"] and end(last) == verdict and outcome(last).bytes_moved == 5


def test_reads_that_do_not_stop_are_quarantined_and_still_awaited() -> None:
    machine = pulling()
    machine.do(PeerLost(P), 1.0)
    assert machine.do(Tick(), 3.0) == [Quarantine(H, P)]
    assert machine.table.counts["quarantined"] == 1 and machine.table.next_timer_s() is None
    assert machine.do(Tick(), 100.0) == []
    machine.do(ReadFailed(H, 1, "peer_gone"), 200.0)
    assert kinds(machine.do(ReadFailed(H, 2, "peer_gone"), 200.0)) == ["Ended"]
    machine.do(Tick(), 200.0)
    assert len(machine.table) == 0


def test_the_deadline_also_holds_while_a_new_word_waits_for_old_reads() -> None:
    machine = pulling()
    for tenth in range(3, 100):
        machine.state(tenth / 10, word=W2)
        machine.do(Tick(), tenth / 10)
    actions = machine.do(Tick(), 10.0)
    assert kinds(actions) == ["Cancel"] and machine.table.counts["quarantined"] == 1
    machine.do(ReadFailed(H, 1, "handoff_aborted"), 10.1)
    last = machine.do(ReadFailed(H, 2, "handoff_aborted"), 10.1)
    assert end(last) == ("recomputed", "pulling", "deadline_exceeded")


def test_a_client_that_leaves_during_the_drain_makes_it_an_abort() -> None:
    machine = pulling()
    machine.do(PeerLost(P), 1.0)
    assert machine.do(Cancelled(H, "client_gone"), 1.1) == []
    machine.do(ReadFailed(H, 1, "handoff_aborted"), 1.2)
    last = machine.do(ReadFailed(H, 2, "handoff_aborted"), 1.2)
    assert end(last) == ("aborted", "draining", "handoff_aborted") and outcome(last).detail == "client_gone"


# After the end


def test_a_closed_handoff_ends_once_whatever_comes() -> None:
    machine = waiting()
    machine.do(Cancelled(H, "client_gone"), 0.5)
    events: list[TargetEvent] = [
        Cancelled(H),
        PeerLost(P),
        Connected(H, P),
        ConnectFailed(H, "peer_gone"),
        Received(P, Gone(**head(sequence=9, reason="expired"))),
        Tick(),
    ]
    for event in events:
        assert machine.do(event, 1.0) == []
    assert machine.do(selected(), 1.0) == [Refused(H, "target", "closed")]
    assert machine.do(Queued(ticket(), DIGEST), 1.0) == [Refused(H, "target", "closed")]


def test_a_second_copy_of_an_open_request_is_refused() -> None:
    assert waiting().do(selected(), 1.0) == [Refused(H, "target", "duplicate")]


def test_a_source_that_still_talks_of_a_closed_handoff_is_told() -> None:
    machine = delivered()
    (ack,) = sent(machine.state(0.9, seal=SEAL))
    assert isinstance(ack, Ack) and ack.word == W1
    (cancel,) = sent(machine.state(0.9, word=W2))  # it was preempted and would compute again
    assert isinstance(cancel, Cancel) and cancel.reason == "closed"


def test_a_cancel_that_overtakes_its_request_keeps_it_out() -> None:
    machine = Machine()
    assert machine.do(Cancelled(H, "client_gone", 10.0), 0.0) == []
    assert machine.do(selected(), 5.0) == [Refused(H, "target", "closed")]
    machine.do(Tick(), 13.0)
    assert not machine.table.knows(H)


def test_a_stranger_has_no_influence() -> None:
    machine = waiting()
    assert machine.hear(Gone(**head(source=OTHER, sequence=1, reason="expired")), 0.5, peer=OTHER) == []
    assert machine.hear(Gone(**head(sequence=1, reason="expired")), 0.5, peer=OTHER) == []
    assert machine.hear(Ack(**head(word=W1)), 0.5) == []
    assert machine.table.counts == {"unknown": 1, "misaddressed": 2}
    assert machine.do(PeerLost(OTHER), 0.6) == []
    assert [v.stage for v in machine.table.views(0.6)] == ["waiting"]


# Bugs of the caller


def test_a_read_that_was_never_started_is_a_bug_and_the_error_tells_the_story() -> None:
    machine = pulling()
    with pytest.raises(InvalidTransition, match="number 77, which is not under way") as caught:
        machine.do(ReadCompleted(H, 77), 0.3)
    assert [line.split(": ")[1] for line in caught.value.story] == [
        "opened", "selected 3 blocks from 0 on", "connected", "the first word",
    ]  # fmt: skip
    machine.do(ReadCompleted(H, 1), 0.3)
    with pytest.raises(InvalidTransition):
        machine.do(ReadCompleted(H, 1), 0.3)
    with pytest.raises(InvalidTransition, match="unknown"):
        machine.do(ReadFailed(HandoffId("bb" * 16), 1, "x"), 0.3)
