"""The scheduler half in both model runners' orders of calls, without vLLM."""

import pytest
from fake_node import Outcomes, Request, ticket

from kvferry.clock import VirtualClock
from kvferry.connector.vllm.metadata import Publish, RankReport
from kvferry.connector.vllm.scheduler import Scheduled, SchedulerHalf
from kvferry.layout import Fingerprint
from kvferry.types import Outcome, Stage, TerminalState

BLOCK = 16
FINGERPRINT = Fingerprint("m", "bfloat16", BLOCK, 2, 2, 64)


class Half:
    """A scheduler half with its clock and what it reported."""

    def __init__(self, num_ranks=1, recompute=True, max_loading_blocks=None):
        self.clock, self.outcomes = VirtualClock(), Outcomes()
        self.book = SchedulerHalf(
            fingerprint=FINGERPRINT,
            num_ranks=num_ranks,
            recompute=recompute,
            on_outcome=self.outcomes,
            max_loading_blocks=max_loading_blocks,
            clock=self.clock,
        )

    def add(self, side, num_tokens, name="r", **details):
        a_ticket = ticket(side, **details)
        self.book.on_new_request(Request(name, list(range(num_tokens)), a_ticket.as_params()))
        return a_ticket


@pytest.fixture
def half():
    return Half()


def new(blocks, computed, scheduled, name="r"):
    return Scheduled(name, list(blocks), True, computed, scheduled)


def more(blocks, computed, scheduled, name="r"):
    return Scheduled(name, list(blocks), False, computed, scheduled)


# Source


def test_offer_travels_with_the_next_step_even_if_nothing_is_scheduled(half):
    a_ticket = half.add("source", 40)
    plan = half.book.step([], [])
    assert [(o.ticket.handoff, o.num_blocks) for o in plan.offers] == [(a_ticket.handoff, 3)]
    assert plan.is_empty_step
    assert half.book.step([], []).offers == []


def test_chunks_publish_full_blocks_and_the_last_one_its_tail(half):
    half.add("source", 40)
    assert half.book.step([new([7, 8], 0, 20)], []).publishes == [Publish("r", 0, [7], False)]
    assert half.book.step([more([], 20, 4)], []).publishes == []
    assert half.book.step([more([9], 24, 16)], []).publishes == [Publish("r", 1, [8, 9], True)]
    last = half.book.step([more([], 40, 1)], [])
    assert (last.publishes, last.is_empty_step) == ([], False)


def test_a_prefix_hit_is_published_with_the_first_chunk(half):
    half.add("source", 40)
    assert half.book.step([new([3, 4, 9], 32, 8)], []).publishes == [Publish("r", 0, [3, 4, 9], True)]


@pytest.mark.parametrize("num_tokens, num_blocks", [(1, 1), (15, 1), (16, 1), (17, 2)])
def test_short_prompts_publish_one_partial_block(half, num_tokens, num_blocks):
    half.add("source", num_tokens)
    plan = half.book.step([new(range(num_blocks), 0, num_tokens)], [])
    assert plan.offers[0].num_blocks == num_blocks
    assert plan.publishes == [Publish("r", 0, list(range(num_blocks)), True)]


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_preemption_revokes_and_resuming_publishes_again_from_the_new_table(half, runner):
    half.add("source", 48)
    half.book.step([new([1, 2], 0, 32)], [])
    assert half.book.step([], ["r"]).revokes == ["r"]
    # V1: in resumed_req_ids; V2: among the new requests. Both arrive as a table that replaces the old one.
    plan = half.book.step([new([5, 6, 7], 0, 48)], [])
    assert (plan.revokes, plan.publishes) == ([], [Publish("r", 0, [5, 6, 7], True)])


def test_a_resume_without_notice_revokes_first(half):
    half.add("source", 48)
    half.book.step([new([1, 2], 0, 32)], [])
    plan = half.book.step([new([5, 6, 7], 16, 32)], [])
    assert plan.revokes == ["r"]
    assert plan.publishes == [Publish("r", 0, [5, 6, 7], True)]


def test_preemption_before_anything_was_published_revokes_nothing(half):
    half.add("source", 48)
    half.book.step([new([1], 0, 10)], [])
    assert half.book.step([], ["r"]).revokes == []


def test_a_whole_source_holds_its_blocks_and_an_aborted_one_is_cancelled_too(half):
    half.add("source", 16, "whole")
    half.add("source", 32, "aborted")
    half.add("source", 16, "never-scheduled")
    half.book.step([new([1], 0, 16, "whole"), new([2, 3], 0, 16, "aborted")], [])
    assert half.book.finished("whole", "answered") is True
    assert half.book.finished("aborted", "aborted") is True
    assert half.book.finished("never-scheduled", "aborted") is True
    assert [c.request_id for c in half.book.step([], []).cancels] == ["aborted", "never-scheduled"]
    assert half.book.is_idle()


def test_a_source_that_ends_without_its_blocks_is_cancelled(half):
    half.add("source", 16)
    half.book.step([new([1], 0, 16)], [])
    assert half.book.finished("r", "answered", has_blocks=False) is True
    assert [c.request_id for c in half.book.step([], []).cancels] == ["r"]


def test_requests_without_a_ticket_are_none_of_our_business(half):
    half.book.on_new_request(Request("plain", [1, 2, 3]))
    half.book.on_new_request(Request("broken", [1, 2, 3], {"kvferry": {"handoff": 7}}))
    assert half.book.num_new_matched_tokens("plain", 0) == 0
    plan = half.book.step([new([1], 0, 3, "plain"), new([2], 0, 3, "broken")], ["plain"])
    assert not (plan.offers or plan.publishes or plan.revokes)
    assert half.book.finished("plain", "answered") is False


def test_one_handoff_serves_one_request(half):
    a_ticket = half.add("target", 40, "first")
    half.book.on_new_request(Request("second", list(range(40)), a_ticket.as_params()))
    assert half.book.num_new_matched_tokens("first", 0) == 39
    assert half.book.num_new_matched_tokens("second", 0) == 0


# Target


def test_target_loads_all_but_the_last_token_into_its_own_blocks(half):
    half.add("target", 40)
    assert half.book.num_new_matched_tokens("r", 0) == 39
    assert half.book.num_new_matched_tokens("r", 0) == 39  # no blocks were free: asked again
    half.book.allocated("r", [5, 6, 7], 39)
    (pull,) = half.book.step([], []).pulls
    assert (pull.first_block, pull.block_ids) == (0, [5, 6, 7])
    assert half.book.num_new_matched_tokens("r", 0) == 0


def test_a_tail_of_one_token_needs_no_block_of_its_own(half):
    half.add("target", 33)
    assert half.book.num_new_matched_tokens("r", 0) == 32
    half.book.allocated("r", [5, 6, 7], 32)
    assert half.book.step([], []).pulls[0].block_ids == [5, 6]


def test_local_prefix_hits_are_skipped(half):
    half.add("target", 40)
    assert half.book.num_new_matched_tokens("r", 16) == 23
    half.book.allocated("r", [1, 6, 7], 23)
    (pull,) = half.book.step([], []).pulls
    assert (pull.first_block, pull.block_ids) == (1, [6, 7])


def test_delivered_is_reported_once_with_one_token_computed(half):
    a_ticket = half.add("target", 40)
    half.book.num_new_matched_tokens("r", 0)
    half.book.allocated("r", [5, 6, 7], 39)
    half.book.reported([RankReport("r", 0, Outcome(a_ticket.handoff, TerminalState.DELIVERED, bytes_moved=9))])
    half.book.allocated("r", [5, 6, 7], 0)
    half.book.reported([RankReport("r", 0, Outcome(a_ticket.handoff, TerminalState.DELIVERED))])
    ((outcome, recomputed),) = half.outcomes.seen
    assert (outcome.state, outcome.tokens_computed, outcome.bytes_moved, recomputed) == ("delivered", 1, 9, 0)
    assert half.book.finished("r", "answered") is False
    assert half.book.is_idle()


@pytest.mark.parametrize("num_tokens, num_local", [(1, 0), (33, 32), (40, 32)])
def test_a_full_local_hit_tells_the_source_to_release(half, num_tokens, num_local):
    half.add("target", num_tokens)
    matched = half.book.num_new_matched_tokens("r", num_local)
    if matched:  # less than a block is missing, and vLLM preferred its own partial block
        assert matched < BLOCK
    half.book.allocated("r", [1, 2, 3], 0)
    (pull,) = half.book.step([], []).pulls
    assert pull.block_ids == []
    assert half.outcomes.last.state is TerminalState.DELIVERED


def test_the_deadline_before_allocation_recomputes(half):
    half.add("target", 40, remaining_s=2.0)
    assert half.book.num_new_matched_tokens("r", 0) == 39
    half.clock.advance(2.5)
    assert half.book.num_new_matched_tokens("r", 0) == 0
    half.book.allocated("r", [1, 2, 3], 0)
    assert half.book.step([], []).pulls == []
    outcome, recomputed = half.outcomes.seen[0]
    assert (outcome.state, outcome.stage, outcome.cause) == ("recomputed", Stage.QUEUE, "transfer_timeout")
    assert (outcome.tokens_computed, recomputed) == (40, 39)


def test_the_pull_carries_the_time_that_is_left(half):
    half.add("target", 40, remaining_s=5.0)
    half.clock.advance(2.0)
    half.book.allocated("r", [1, 2, 3], half.book.num_new_matched_tokens("r", 0))
    assert half.book.step([], []).pulls[0].ticket.remaining_s == pytest.approx(3.0)


def test_loads_beyond_their_share_wait_without_blocks():
    half = Half(max_loading_blocks=5)
    first = half.add("target", 40, "first")
    half.add("target", 40, "second")
    half.add("target", 20, "small")
    half.book.allocated("first", [1, 2, 3], half.book.num_new_matched_tokens("first", 0))
    assert half.book.num_new_matched_tokens("second", 0) is None
    assert half.book.num_new_matched_tokens("small", 0) == 19
    half.book.reported([RankReport("first", 0, Outcome(first.handoff, TerminalState.DELIVERED))])
    assert half.book.num_new_matched_tokens("second", 0) == 39


def test_one_load_is_admitted_however_large():
    half = Half(max_loading_blocks=1)
    half.add("target", 400)
    assert half.book.num_new_matched_tokens("r", 0) == 399


@pytest.mark.parametrize("recompute, state, computed", [(True, "recomputed", 24), (False, "failed", 0)])
def test_a_failed_load_is_recomputed_or_fails_by_policy(recompute, state, computed):
    half = Half(recompute=recompute)
    a_ticket = half.add("target", 40)
    half.book.allocated("r", [1, 6, 7], half.book.num_new_matched_tokens("r", 16))
    bad = Outcome(a_ticket.handoff, TerminalState.FAILED, Stage.PULLING, "peer_gone", "it died")
    half.book.reported([RankReport("r", 0, bad)])
    outcome = half.outcomes.last
    assert (outcome.state, outcome.stage, outcome.cause, outcome.detail) == (state, "pulling", "peer_gone", "it died")
    assert outcome.tokens_computed == computed
    # vLLM asks again after a load that brought nothing: the answer must be 0, or it would load for ever.
    assert half.book.num_new_matched_tokens("r", 0) == 0


def test_all_ranks_must_report(half):
    half = Half(num_ranks=2)
    a_ticket = half.add("target", 40)
    half.book.allocated("r", [1, 2, 3], half.book.num_new_matched_tokens("r", 0))
    good = Outcome(a_ticket.handoff, TerminalState.DELIVERED, bytes_moved=5)
    half.book.reported([RankReport("r", 1, good)])
    assert half.outcomes.seen == []
    bad = Outcome(a_ticket.handoff, TerminalState.FAILED, Stage.WAITING, "lease_expired")
    half.book.reported([RankReport("r", 0, bad)])
    assert half.outcomes.last.cause == "lease_expired"
    assert half.outcomes.last.bytes_moved == 5


def test_abort_while_loading_cancels_and_is_over_when_the_reads_have_stopped(half):
    a_ticket = half.add("target", 40)
    half.book.allocated("r", [1, 2, 3], half.book.num_new_matched_tokens("r", 0))
    half.book.step([], [])
    assert half.book.finished("r", "aborted") is False
    assert [c.request_id for c in half.book.step([], []).cancels] == ["r"]
    assert half.outcomes.seen == []
    half.book.reported([RankReport("r", 0, Outcome(a_ticket.handoff, TerminalState.ABORTED, Stage.DRAINING))])
    assert half.outcomes.last.state is TerminalState.ABORTED
    assert half.book.is_idle()


def test_abort_in_the_queue_tells_the_source_to_release(half):
    half.add("target", 40)
    assert half.book.finished("r", "aborted") is False
    assert half.book.step([], []).pulls[0].block_ids == []
    assert (half.outcomes.last.state, half.outcomes.last.stage) == ("aborted", "queue")
    assert half.book.is_idle()


def test_vllm_ends_a_failed_load_before_it_passes_the_report_on():
    half = Half(recompute=False)
    a_ticket = half.add("target", 40)
    half.book.allocated("r", [1, 2, 3], half.book.num_new_matched_tokens("r", 0))
    assert half.book.finished("r", "answered") is False
    half.book.reported(
        [RankReport("r", 0, Outcome(a_ticket.handoff, TerminalState.FAILED, Stage.PULLING, "peer_gone"))]
    )
    assert half.outcomes.last.state is TerminalState.FAILED
    assert half.book.is_idle()


def test_prompt_logprobs_make_vllm_refuse_what_it_was_promised(half):
    half.add("target", 80)
    assert half.book.num_new_matched_tokens("r", 0) == 79
    half.book.allocated("r", [1, 2, 3, 4, 5], 0)
    assert half.book.step([], []).pulls[0].block_ids == []
    assert (half.outcomes.last.state, half.outcomes.last.cause) == ("recomputed", "handoff_unused")


def test_both_sides_give_one_prompt_one_digest_and_different_ones_others():
    source, target, salted = Half(), Half(), Half()
    source.add("source", 40)
    target.add("target", 40)
    salted.book.on_new_request(Request("r", list(range(40)), ticket("source").as_params()), identity="lora")
    target.book.allocated("r", [1, 2, 3], target.book.num_new_matched_tokens("r", 0))
    digest = source.book.step([], []).offers[0].digest
    assert digest == target.book.step([], []).pulls[0].digest
    assert digest != salted.book.step([], []).offers[0].digest
