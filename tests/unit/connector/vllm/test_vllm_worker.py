"""The worker half against a node that writes down what it is told, without vLLM."""

import threading
import time
from types import SimpleNamespace

import pytest
from fake_node import FakeNode, ticket

from kvferry.clock import VirtualClock
from kvferry.connector.vllm.metadata import Cancel, Offer, Publish, Pull, StepPlan, rank_handoff
from kvferry.connector.vllm.pace import Pace
from kvferry.connector.vllm.stream import AfterForward
from kvferry.connector.vllm.worker import WorkerHalf
from kvferry.types import Stage, TerminalState

LAYERS = 4


def make(node, **details):
    settings = {"rank": 0, "num_ranks": 1, "num_layers": LAYERS, "after_forward": AfterForward()} | details
    return WorkerHalf(node, **settings)


@pytest.fixture
def node():
    return FakeNode()


@pytest.fixture
def half(node):
    return make(node)


def offer(a_ticket, name="r", num_blocks=2):
    return Offer(name, a_ticket, b"digest", num_blocks)


def pull(a_ticket, blocks, name="r", first=0):
    return Pull(name, a_ticket, b"digest", first, list(blocks))


def run_step(half, plan):
    half.begin_step(plan)
    half.start_pulls(plan)
    half.publish(plan)
    return half.finished(set())


def test_source_life(half, node):
    a = ticket("source")
    run_step(half, StepPlan(offers=[offer(a)]))
    run_step(half, StepPlan(publishes=[Publish("r", 0, [5], False)]))
    run_step(half, StepPlan(publishes=[Publish("r", 1, [6], True)]))
    assert node.calls == [
        ("offer", a.handoff, 2),
        ("publish", a.handoff, range(LAYERS), 0, [5]),
        ("publish", a.handoff, range(LAYERS), 1, [6]),
        ("seal", a.handoff),
    ]
    node.release(a.handoff)
    assert half.finished({"r"}) == ({"r"}, set())
    assert half.finished(set()) == (set(), set())
    assert half.is_idle()


def test_a_release_that_comes_before_vllm_finished_the_request_waits_for_it(half, node):
    a = ticket("source")
    half.begin_step(StepPlan(offers=[offer(a)]))
    node.release(a.handoff)
    assert half.finished(set()) == (set(), set())
    assert half.finished({"r", "a stranger"}) == ({"r"}, set())


def test_vllm_finished_first_waits_for_the_release(half, node):
    a = ticket("source")
    half.begin_step(StepPlan(offers=[offer(a)]))
    assert half.finished({"r"}) == (set(), set())
    node.release(a.handoff, "expired")
    assert half.finished(set()) == ({"r"}, set())


def test_cancel_and_offer_of_one_step_reach_the_node_in_order(half, node):
    a = ticket("source")
    half.begin_step(StepPlan(offers=[offer(a)], cancels=[Cancel("r", "aborted"), Cancel("unknown", "")]))
    assert node.calls[1:] == [("cancel", a.handoff, "source")]


def test_begin_step_runs_once_a_plan(half, node):
    plan = StepPlan(offers=[offer(ticket("source"))])
    half.begin_step(plan)
    half.start_pulls(plan)
    half.publish(plan)
    assert node.names() == ["offer"]


def test_target_life(half, node):
    a = ticket("target")
    half.start_pulls(StepPlan(pulls=[pull(a, [5, 6], first=3)]))
    assert node.calls == [("drop_select", a.handoff, a.source.addresses, 3, [5, 6])]
    assert half.finished(set()) == (set(), set())
    node.end(a.handoff, bytes_moved=7)
    assert half.finished(set()) == (set(), {"r"})
    assert half.take_failed_blocks() == set()
    (report,) = half.take_reports()
    assert (report.request_id, report.rank, report.outcome.bytes_moved) == ("r", 0, 7)
    assert half.take_reports() == []
    assert half.finished(set()) == (set(), set())
    assert half.is_idle()


def test_failed_blocks_are_known_in_the_pass_that_exposes_the_request(half, node):
    a, b = ticket("target"), ticket("target")
    half.start_pulls(StepPlan(pulls=[pull(a, [5, 6]), pull(b, [7], "good")]))
    node.end(a.handoff, TerminalState.FAILED, stage=Stage.PULLING, cause="peer_gone")
    node.end(b.handoff)
    assert half.finished(set()) == (set(), {"r", "good"})
    assert half.take_failed_blocks() == {5, 6}
    assert half.take_failed_blocks() == set()


def test_on_loaded_sees_delivered_blocks_only(node):
    loaded = []
    half = make(node, on_loaded=loaded.append)
    a, b = ticket("target"), ticket("target")
    half.start_pulls(StepPlan(pulls=[pull(a, [5]), pull(b, [7], "bad")]))
    node.end(a.handoff)
    node.end(b.handoff, TerminalState.FAILED)
    half.finished(set())
    assert loaded == [[5]]


def test_a_release_without_blocks_is_no_load(half, node):
    a = ticket("target")
    half.start_pulls(StepPlan(pulls=[pull(a, [])]))
    assert node.names() == ["drop_select"]
    node.end(a.handoff)
    assert half.finished(set()) == (set(), set())
    assert half.take_reports() == []
    assert half.is_idle()


def test_abort_while_loading_reports_once(half, node):
    a = ticket("target")
    half.start_pulls(StepPlan(pulls=[pull(a, [5])]))
    half.begin_step(StepPlan(cancels=[Cancel("r", "aborted")]))
    assert node.calls[1] == ("cancel", a.handoff, "target")
    assert half.finished({"r"}) == (set(), set())
    node.end(a.handoff, TerminalState.ABORTED)
    assert half.finished(set()) == (set(), {"r"})
    assert half.take_failed_blocks() == {5}


class Gate:
    """A device event that a test fires."""

    def __init__(self):
        self.fired = threading.Event()

    def synchronize(self):
        assert self.fired.wait(60)


def test_nothing_is_published_before_the_forward_has_completed(node):
    gates = []

    def record():
        gates.append(Gate())
        return gates[-1]

    after = AfterForward(record)
    half = make(node, after_forward=after)
    a = ticket("source")
    half.begin_step(StepPlan(offers=[offer(a)]))
    half.publish(StepPlan(publishes=[Publish("r", 0, [5], True)]))
    assert node.names() == ["offer"]
    gates[0].fired.set()
    after.close()
    assert node.names() == ["offer", "publish", "seal"]


def test_a_publication_that_a_revoke_overtakes_is_dropped(node):
    gate = Gate()
    after = AfterForward(lambda: gate)
    half = make(node, after_forward=after)
    a = ticket("source")
    half.begin_step(StepPlan(offers=[offer(a)]))
    half.publish(StepPlan(publishes=[Publish("r", 0, [5], True)]))
    half.begin_step(StepPlan(revokes=["r"]))
    assert node.names() == ["offer", "revoke"]
    gate.fired.set()
    half.publish(StepPlan(publishes=[Publish("r", 0, [8], True)]))
    after.close()
    assert node.calls[2:] == [("publish", a.handoff, range(LAYERS), 0, [8]), ("seal", a.handoff)]


@pytest.mark.parametrize(
    "at_a_time, ranges",
    [(1, [(0, 1), (1, 2), (2, 3), (3, 4)]), (2, [(0, 2), (2, 4)]), (3, [(0, 3), (3, 4)]), (0, [(0, 4)])],
)
def test_layers_are_published_as_the_forward_goes_and_the_last_ones_with_the_seal(node, at_a_time, ranges):
    paced = []
    half = make(node, pace=Pace(LAYERS, 100, fixed=at_a_time), on_paced=paced.append)
    a = ticket("source")
    half.begin_step(StepPlan(offers=[offer(a)]))
    plan = StepPlan(publishes=[Publish("r", 0, [5], True)])
    half.begin_step(plan)
    for number in range(1, LAYERS + 1):
        half.layer_done(plan, number)
    expected = [("publish", a.handoff, range(*layers), 0, [5]) for layers in ranges]
    assert node.calls[1:] == [*expected, ("seal", a.handoff)]  # not only after what the forward does besides attention
    half.publish(plan)
    assert len(node.calls) == 2 + len(ranges)
    assert paced == [len(ranges)]


@pytest.mark.parametrize("told", [[], [LAYERS]])
def test_layers_that_are_never_told_go_with_the_rest(node, told):
    """A full CUDA graph replays attention without telling of its layers; what some of them may lack is not guessed."""
    half = make(node, pace=Pace(LAYERS, 100, fixed=0))
    a = ticket("source")
    half.begin_step(StepPlan(offers=[offer(a)]))
    plan = StepPlan(publishes=[Publish("r", 0, [5], True)])
    half.begin_step(plan)
    for number in told:
        half.layer_done(plan, number)
    assert node.names() == ["offer"]
    half.publish(plan)
    assert node.calls[1:] == [("publish", a.handoff, range(LAYERS), 0, [5]), ("seal", a.handoff)]


def test_the_pace_is_chosen_by_what_targets_acknowledged_and_how_long_steps_took(node, monkeypatch):
    clock = VirtualClock()
    monkeypatch.setattr("kvferry.connector.vllm.worker.time", SimpleNamespace(monotonic=clock.now_s))
    paced = []
    half = make(node, pace=Pace(LAYERS, 1 << 20), on_paced=paced.append)

    def prefill(name, num_blocks, computed_s, acked_s):
        a = ticket("source")
        half.begin_step(StepPlan(offers=[offer(a, name)]))
        blocks = list(range(num_blocks))
        plan = StepPlan(publishes=[Publish(name, 0, blocks, True)], num_tokens=128 * num_blocks)
        half.begin_step(plan)
        clock.advance(computed_s)
        half.publish(plan)
        clock.advance(acked_s)
        node.release(a.handoff, at_s=clock.now_s())
        clock.advance(10.0)  # vLLM asks much later: that is no slowness of the link
        assert half.finished({name}) == ({name}, set())

    prefill("short", 1, 0.01, 0.003)
    prefill("long", 64, 0.5, 0.4)  # 256 MiB in 0.4 s
    prefill("as long", 64, 0.5, 0.4)
    prefill("short again", 1, 0.01, 0.003)
    assert paced[:2] == [1, 1]  # nothing was known yet; then only what a short one takes
    assert paced[2] == LAYERS
    assert paced[3] == 1


def test_vllm_0_32_publishes_and_pulls_after_the_forward_yet_revokes_before_it(half, node):
    a, b = ticket("source"), ticket("target")
    half.begin_step(StepPlan(offers=[offer(a)]))
    half.publish(StepPlan(publishes=[Publish("r", 0, [5], False)]))
    plan = StepPlan(revokes=["r"], pulls=[pull(b, [9], "t")], publishes=[Publish("r", 0, [6], True)])
    half.begin_step(plan)  # handle_preemptions, in both versions the first call of a step
    assert node.names()[-1] == "revoke"
    half.publish(plan)  # 0.32 without synchronous loads: the forward, wait_for_save and start_load_kv in any order
    half.start_pulls(plan)
    assert node.names()[2:] == ["revoke", "publish", "seal", "drop_select"]


@pytest.mark.parametrize("num_sources, num_targets", [(1, 2), (2, 1), (2, 4), (4, 2), (2, 2)])
def test_rank_pairs_of_both_sides_agree(num_sources, num_targets):
    at_source = ticket("source", sources=num_sources, targets=num_targets)
    offered, asked = set(), set()
    for rank in range(num_sources):
        node = FakeNode()
        make(node, rank=rank, num_ranks=num_sources).begin_step(StepPlan(offers=[offer(at_source)]))
        offered |= {call[1] for call in node.calls}
    for rank in range(num_targets):
        node = FakeNode()
        make(node, rank=rank, num_ranks=num_targets).start_pulls(StepPlan(pulls=[pull(at_source, [1])]))
        asked |= {call[1] for call in node.calls}
        assert all(len(call[2]) == 1 for call in node.calls)
    assert offered == asked
    assert len({rank_handoff(at_source, r, 0).source.incarnation for r in range(num_sources)}) == num_sources
    assert len(offered) == max(num_sources, num_targets)


def test_a_target_rank_waits_for_all_its_sources_and_one_failure_fails_it(node):
    a = ticket("target", sources=2, targets=1)
    half = make(node)
    half.start_pulls(StepPlan(pulls=[pull(a, [5])]))
    first, second = (rank_handoff(a, s, 0).handoff for s in (0, 1))
    node.end(first, bytes_moved=3)
    assert half.finished(set()) == (set(), set())
    node.end(second, TerminalState.FAILED, cause="peer_gone")
    assert half.finished(set()) == (set(), {"r"})
    assert half.take_failed_blocks() == {5}
    assert half.take_reports()[0].outcome.cause == "peer_gone"


def test_a_source_waits_for_all_its_targets(node):
    a = ticket("source", sources=1, targets=2)
    half = make(node)
    half.begin_step(StepPlan(offers=[offer(a)]))
    first, second = (rank_handoff(a, 0, t).handoff for t in (0, 1))
    node.release(first)
    assert half.finished({"r"}) == (set(), set())
    node.release(second)
    assert half.finished(set()) == ({"r"}, set())


def test_sizes_that_do_not_divide_fail_the_load_and_hold_nothing(node):
    half = make(node, num_ranks=2)
    half.begin_step(StepPlan(offers=[offer(ticket("source", sources=2, targets=3), "s")]))
    half.start_pulls(StepPlan(pulls=[pull(ticket("target", sources=3, targets=2), [5])]))
    assert node.calls == []
    assert half.finished({"s"}) == ({"s"}, {"r"})
    assert half.take_reports()[0].outcome.cause == "compatibility_error"


@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_an_empty_step_waits_while_blocks_are_held(node, is_elsewhere):
    """vLLM would take the next one at once, and starve the threads that end it."""
    news, held = threading.Event(), ticket("source")
    half = make(node, news=news)
    if not is_elsewhere:
        half.begin_step(StepPlan(offers=[offer(held)]))
        half.finished({"r"})
    began = time.monotonic()
    half.wait_for_news(0.03, also=is_elsewhere)
    assert time.monotonic() - began >= 0.03
    timer = threading.Timer(0.01, lambda: (node.release(held.handoff), news.set()))
    timer.start()
    half.wait_for_news(60, also=is_elsewhere)
    timer.join()
    assert time.monotonic() - began < 30
    if not is_elsewhere:
        assert half.finished(set()) == ({"r"}, set())


def test_an_empty_step_waits_for_a_load_but_never_without_one(node):
    news = threading.Event()
    half = make(node, news=news)
    began = time.monotonic()
    half.wait_for_news(60)  # nothing is being loaded
    a = ticket("target")
    half.start_pulls(StepPlan(pulls=[pull(a, [5])]))
    timer = threading.Timer(0.01, lambda: (node.end(a.handoff), news.set()))
    timer.start()
    half.wait_for_news(60)
    timer.join()
    assert time.monotonic() - began < 30
    assert half.finished(set()) == (set(), {"r"})


@pytest.fixture
def beside_scheduler(half):
    half.scheduler_is_here = True
    return half


def test_a_scheduler_half_on_this_thread_is_told_of_a_load_that_ended_after_the_step(beside_scheduler, node):
    half, a = beside_scheduler, ticket("target")
    half.start_pulls(StepPlan(pulls=[pull(a, [5])]))
    assert half.finished(set()) == (set(), set())
    assert half.is_loading() and half.take_delivered() == set()
    node.end(a.handoff)
    assert half.take_delivered() == {"r"}
    assert [report.request_id for report in half.take_reports()] == ["r"]
    assert half.finished(set()) == (set(), set())
    assert half.take_delivered() == set()
    assert half.is_idle() and not half.is_loading()


def test_a_step_leaves_what_was_delivered_to_the_scheduler_half_and_never_waits_meanwhile(beside_scheduler, node):
    half, a, b = beside_scheduler, ticket("target"), ticket("target")
    half.start_pulls(StepPlan(pulls=[pull(a, [5]), pull(b, [6], "other")]))
    node.end(a.handoff)
    assert half.finished(set()) == (set(), set())
    half.wait_for_news(60)  # vLLM runs one step ahead: the sooner it ends, the sooner "r" is scheduled
    assert half.finished(set()) == (set(), set())
    assert half.take_delivered() == {"r"}
    node.end(b.handoff)
    assert half.take_delivered() == {"other"}


def test_a_scheduler_half_that_does_not_come_is_told_by_a_later_step(beside_scheduler, node):
    half, a = beside_scheduler, ticket("target")
    half.start_pulls(StepPlan(pulls=[pull(a, [5])]))
    node.end(a.handoff)
    named = [half.finished(set())[1] for _ in range(4)]
    assert named == [set(), set(), {"r"}, set()]
    assert half.take_delivered() == set()


def test_a_failed_load_is_only_named_with_its_blocks(beside_scheduler, node):
    half, a = beside_scheduler, ticket("target")
    half.start_pulls(StepPlan(pulls=[pull(a, [5])]))
    node.end(a.handoff, TerminalState.FAILED, cause="peer_gone")
    assert half.take_delivered() == set()
    assert half.finished(set()) == (set(), {"r"})
    assert half.take_failed_blocks() == {5}


def test_a_release_without_a_load_is_nothing_that_a_request_waits_for(beside_scheduler, node):
    half, a = beside_scheduler, ticket("target")
    half.start_pulls(StepPlan(pulls=[pull(a, [])]))
    assert not half.is_loading()
    node.end(a.handoff)
    assert half.take_delivered() == set()
    assert half.is_idle()
