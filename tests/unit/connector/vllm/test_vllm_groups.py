"""Models with several KV cache groups, in both halves: what a sliding window leaves of a prompt, when it is lost."""

import pytest
from fake_node import FakeNode, Outcomes, Request, ticket

from kvferry.clock import VirtualClock
from kvferry.connector.vllm.metadata import GroupBlocks, Offer, Publish, Pull, StepPlan, group_handoff, rank_handoff
from kvferry.connector.vllm.pace import Pace
from kvferry.connector.vllm.scheduler import Scheduled, SchedulerHalf
from kvferry.connector.vllm.stream import AfterForward
from kvferry.connector.vllm.worker import WorkerHalf
from kvferry.layout import Fingerprint
from kvferry.types import Stage, TerminalState

BLOCK, WINDOW = 16, 40
FINGERPRINT = Fingerprint("m", "bfloat16", BLOCK, 4, 2, 64, kv_groups="all, window 40")


class Book(SchedulerHalf):
    """`kept` has the blocks that it holds now, each as often as it holds it."""

    def __init__(self):
        self.kept = []
        super().__init__(
            fingerprint=FINGERPRINT,
            num_ranks=1,
            recompute=True,
            on_outcome=Outcomes(),
            windows=(None, WINDOW),
            keep=self.kept.extend,
            let_go=lambda block_ids: [self.kept.remove(block_id) for block_id in block_ids],
            clock=VirtualClock(),
        )


@pytest.fixture
def book():
    return Book()


def add(book, side, num_tokens, name="r"):
    book.on_new_request(Request(name, list(range(num_tokens)), ticket(side).as_params()))


def new(whole, window, computed, scheduled):
    return Scheduled("r", list(whole), True, computed, scheduled, (list(window),))


def more(whole, window, computed, scheduled):
    return Scheduled("r", list(whole), False, computed, scheduled, (list(window),))


def test_full_attention_is_published_by_chunks_and_the_window_at_the_end(book):
    add(book, "source", 100)  # seven blocks; the last token, 99, attends to 60 onwards: block 3
    first = book.step([new(range(11, 15), range(21, 25), 0, 64)], [])
    assert first.publishes == [Publish("r", 0, [11, 12, 13, 14], False)]
    last = book.step([more([15, 16, 17], [25, 26, 27], 64, 36)], [])
    assert last.publishes == [
        Publish("r", 4, [15, 16, 17], True),
        Publish("r", 3, [24, 25, 26, 27], True, group=1),
    ]
    assert book.finished("r", "answered") is True
    assert book.step([], []).cancels == []


@pytest.mark.parametrize("num_tokens, first", [(1, 0), (40, 0), (55, 0), (56, 1), (71, 1), (72, 2)])
def test_the_window_begins_with_the_block_of_the_first_token_that_the_last_one_sees(book, num_tokens, first):
    add(book, "source", num_tokens)
    num_blocks = -(-num_tokens // BLOCK)
    plan = book.step([new(range(1, 1 + num_blocks), range(11, 11 + num_blocks), 0, num_tokens)], [])
    assert plan.publishes[1] == Publish("r", first, list(range(11 + first, 11 + num_blocks)), True, group=1)
    add(book, "target", num_tokens, "t")
    if external := book.num_new_matched_tokens("t", 0):
        book.allocated("t", list(range(1, 9)), external, other_groups=[list(range(11, 19))])
        (pull,) = book.step([], []).pulls
        # It pulls all but the last token, and no block that the source does not publish.
        assert pull.other_groups[0].first_block == first
        assert pull.other_groups[0].block_ids == list(range(11 + first, 11 - (-(num_tokens - 1) // BLOCK)))


def test_a_block_that_vllm_has_freed_is_never_published(book, caplog):
    add(book, "source", 100)
    plan = book.step([new(range(11, 18), [0, 0, 0, 0, 25, 26, 27], 80, 20)], [])
    assert [p.group for p in plan.publishes] == [0]
    assert "known are" in caplog.text
    book.finished("r", "answered")
    assert [c.request_id for c in book.step([], []).cancels] == ["r"]  # not whole


def test_published_blocks_of_a_window_are_kept_until_they_are_sent_whatever_vllm_frees(book):
    """As a request ends vLLM frees what its next token would not see: the first block that was handed over, perhaps."""
    add(book, "source", 55)
    book.step([new(range(1, 5), range(11, 15), 0, 55)], [])
    assert book.kept == [11, 12, 13, 14]
    book.step([more([], [], 55, 1)], [])  # it decodes on
    assert book.finished("r", "answered") is True
    assert book.kept == [11, 12, 13, 14] and not book.is_idle()
    book.sent({"r", "another"})
    assert book.kept == [] and book.is_idle()


@pytest.mark.parametrize("ending", ["answered", "aborted"])
def test_preempted_blocks_are_let_go_and_those_computed_again_are_kept(book, ending):
    add(book, "source", 55)
    book.step([new(range(1, 5), range(11, 15), 0, 55)], [])
    book.step([], ["r"])
    assert book.kept == []
    book.step([new(range(5, 9), range(15, 19), 0, 55)], [])
    assert book.kept == [15, 16, 17, 18]
    book.finished("r", ending)
    book.sent({"r"})
    assert book.kept == []


def test_preemption_revokes_both_tables_and_publishes_both_again(book):
    add(book, "source", 64)
    book.step([new(range(1, 5), range(11, 15), 0, 64)], [])
    assert book.step([], ["r"]).revokes == ["r"]
    again = book.step([new(range(5, 9), range(15, 19), 0, 64)], [])
    assert [(p.group, p.block_ids) for p in again.publishes] == [(0, [5, 6, 7, 8]), (1, [16, 17, 18])]


def test_a_local_prefix_is_pulled_in_neither_table(book):
    add(book, "target", 100)
    assert book.num_new_matched_tokens("r", 80) == 19
    book.allocated("r", list(range(1, 8)), 19, other_groups=[[0, 0, 13, 14, 15, 16, 17]])
    (pull,) = book.step([], []).pulls
    assert pull.groups == [GroupBlocks(5, [6, 7]), GroupBlocks(5, [16, 17])]


def test_a_release_without_a_load_is_told_to_each_group(book):
    add(book, "target", 40)
    book.finished("r", "aborted")
    (pull,) = book.step([], []).pulls
    assert pull.groups == [GroupBlocks(0, [])] * 2


def worker(node, **details):
    settings = {"rank": 0, "num_ranks": 1, "num_layers": 2, "after_forward": AfterForward(), "num_groups": 2}
    settings["pace"] = Pace(2, 100, fixed=1)
    return WorkerHalf(node, **settings, fail_requests=True, **details)


def ids_of(a_ticket):
    return [group_handoff(a_ticket, group).handoff for group in range(2)]


def test_each_group_is_a_handoff_of_its_own_with_the_ids_that_the_other_side_finds_too():
    node, a = FakeNode(), ticket("source")
    half = worker(node)
    first, second = ids_of(a)
    assert first == a.handoff != second
    plan = StepPlan(
        offers=[Offer("r", a, b"digest", 3)],
        publishes=[Publish("r", 0, [5, 6, 7], True), Publish("r", 1, [8, 9], True, group=1)],
    )
    half.begin_step(plan)
    for number in (1, 2):
        half.layer_done(plan, number)  # a layer's number means nothing here
    assert node.names() == ["offer", "offer"]
    half.publish(plan)
    assert node.calls == [
        ("offer", first, 3),
        ("offer", second, 3),
        ("publish", first, range(2), 0, [5, 6, 7]),
        ("seal", first),
        ("publish", second, range(2), 1, [8, 9]),
        ("seal", second),
    ]
    node.release(first)
    assert half.finished({"r"}) == (set(), set())
    node.release(second)
    assert half.finished(set()) == ({"r"}, set())
    assert half.is_idle()


def test_with_ranks_too_no_two_handoffs_share_an_id():
    a = ticket("source", sources=2, targets=4)
    names = {
        group_handoff(rank_handoff(a, source, target), group).handoff
        for source in range(2)
        for target in range(4)
        for group in range(3)
    }
    assert len(names) == 24


@pytest.mark.parametrize("bad_group", [0, 1, None])
def test_a_load_is_there_when_all_groups_are_and_failed_when_one_is(bad_group):
    node, a = FakeNode(), ticket("target")
    half = worker(node)
    half.start_pulls(StepPlan(pulls=[Pull("r", a, b"digest", 0, [5, 6], [GroupBlocks(1, [7])])]))
    assert [call[3:] for call in node.calls] == [(0, [5, 6]), (1, [7])]
    for group, handoff in enumerate(ids_of(a)):
        assert half.finished(set()) == (set(), set())
        if group == bad_group:
            node.end(handoff, TerminalState.FAILED, stage=Stage.PULLING, cause="peer_gone")
        else:
            node.end(handoff, bytes_moved=10)
    assert half.finished(set()) == (set(), {"r"})
    assert half.take_failed_blocks() == set()
    assert half.take_failed_requests() == ({"r"} if bad_group is not None else set())
    (report,) = half.take_reports()
    assert report.outcome.state is (TerminalState.DELIVERED if bad_group is None else TerminalState.FAILED)
    assert half.is_idle()
