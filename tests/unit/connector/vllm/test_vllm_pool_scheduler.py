"""The scheduler half's book of the pool, in the order of vLLM's calls, without vLLM."""

from concurrent.futures import Future

import pytest

from kvferry.clock import VirtualClock
from kvferry.connector.vllm.metadata import PoolLoad, PoolSave, StepPlan
from kvferry.connector.vllm.pool_scheduler import PoolSchedulerHalf
from kvferry.connector.vllm.scheduler import Scheduled

BLOCK, WAIT_S = 16, 0.1


class Half:
    """The book with its clock, the pool's open questions, and what was counted."""

    def __init__(self):
        self.clock, self.counted, self.asked, self.prefetched = VirtualClock(), [], [], []
        self.book = PoolSchedulerHalf(
            block_size=BLOCK,
            look_up=self.look_up,
            prefetch=self.prefetched.append,
            wait_s=WAIT_S,
            count=self.counted.append,
            clock=self.clock,
        )

    def look_up(self, hashes):
        answer = Future()
        self.asked.append((hashes, answer))
        return answer

    def add(self, num_tokens, name="r", found=None):
        hashes = hashes_of(num_tokens // BLOCK)
        self.book.on_new_request(name, hashes, num_tokens)
        if found is not None:
            self.asked[-1][1].set_result(found)
        return hashes

    def step(self, *scheduled, preempted=()):
        plan = StepPlan()
        self.book.step(plan, scheduled, preempted)
        return plan


def hashes_of(num_blocks):
    return [b"hash %d" % i for i in range(num_blocks)]


def new(blocks, computed, scheduled, name="r"):
    return Scheduled(name, list(blocks), True, computed, scheduled)


def more(blocks, computed, scheduled, name="r"):
    return Scheduled(name, list(blocks), False, computed, scheduled)


@pytest.fixture
def half():
    return Half()


# Loading


def test_the_pool_is_asked_at_arrival_for_all_full_blocks_but_that_of_the_last_token(half):
    half.add(48)
    assert half.asked[0][0] == hashes_of(2)


def test_what_lies_on_disk_is_fetched_from_arrival_on_unless_a_handoff_brings_it(half):
    half.add(48)
    half.book.on_new_request("brought", hashes_of(3), 48, is_brought=True)
    half.add(10, name="short")
    assert half.prefetched == [hashes_of(2)]
    assert len(half.asked) == 2, "the pool is asked all the same, in case the handoff fails"


@pytest.mark.parametrize("num_tokens", [1, 15, 16])
def test_a_prompt_without_a_block_to_load_asks_nothing(half, num_tokens):
    half.add(num_tokens)
    assert half.asked == []
    assert half.book.num_new_matched_tokens("r", 0, num_tokens) == 0


def test_a_request_waits_for_the_answer_and_loads_what_was_found(half):
    half.add(50)
    assert half.book.num_new_matched_tokens("r", 0, 50) is None
    half.asked[0][1].set_result(2)
    assert half.book.num_new_matched_tokens("r", 0, 50) == 32
    half.book.allocated("r", [7, 8], 32)
    assert half.step().pool_loads == [PoolLoad("r", hashes_of(2), [7, 8])]
    assert half.step().pool_loads == []
    assert half.counted == ["hit"]


def test_blocks_that_are_here_are_not_loaded(half):
    half.add(50, found=3)
    assert half.book.num_new_matched_tokens("r", 16, 50) == 32
    half.book.allocated("r", [1, 7, 8], 32)
    assert half.step().pool_loads == [PoolLoad("r", hashes_of(3)[1:], [7, 8])]


def test_local_hits_beyond_what_the_pool_has_load_nothing(half):
    half.add(50, found=1)
    assert half.book.num_new_matched_tokens("r", 32, 50) == 0


def test_the_last_token_is_never_loaded(half):
    half.add(48, found=2)
    # vLLM asks again after a preemption, when the answer so far counts: its tokens end with a block.
    assert half.book.num_new_matched_tokens("r", 0, 32) == 16


def test_an_answer_that_is_late_is_a_miss(half):
    half.add(50)
    assert half.book.num_new_matched_tokens("r", 0, 50) is None
    half.clock.advance(WAIT_S)
    assert half.book.num_new_matched_tokens("r", 0, 50) == 0
    assert half.asked[0][1].cancelled()
    assert half.counted == ["late"]


def test_after_a_failed_load_the_prompt_is_computed_and_saved_again(half):
    half.add(50, found=3)
    assert half.book.num_new_matched_tokens("r", 0, 50) == 48
    half.book.allocated("r", [7, 8, 9], 48)
    half.step()
    # vLLM asks again when nothing of the load was good: one more load could fail in the same way, for ever.
    assert half.book.num_new_matched_tokens("r", 0, 50) == 0
    half.book.allocated("r", [7, 8, 9, 10], 0)
    assert half.step(new([7, 8, 9, 10], 0, 50)).pool_saves == [PoolSave("r", 0, 3, hashes_of(3), [7, 8, 9])]


def test_a_request_that_leaves_takes_its_question_along(half):
    half.add(50)
    assert half.book.finished("r") is False
    assert half.asked[0][1].cancelled()
    assert half.book.is_idle()


# Saving


def test_each_block_is_offered_once_when_a_step_makes_it_whole(half):
    half.add(40, found=0)
    assert half.step(new([7, 8, 9], 0, 20)).pool_saves == [PoolSave("r", 0, 2, hashes_of(1), [7])]
    assert half.step(more([], 20, 4)).pool_saves == []
    assert half.step(more([], 24, 16)).pool_saves == [PoolSave("r", 1, 2, hashes_of(2)[1:], [8])]
    assert half.book.finished("r") is True
    assert half.book.finished("r") is False


def test_what_the_pool_has_is_not_offered(half):
    half.add(50, found=2)
    half.book.num_new_matched_tokens("r", 0, 50)
    half.book.allocated("r", [7, 8, 9, 10], 32)
    half.step()
    assert half.step(new([7, 8, 9, 10], 32, 18)).pool_saves == [PoolSave("r", 2, 3, hashes_of(3)[2:], [9])]


def test_what_the_pool_has_is_not_offered_either_after_a_handoff(half):
    """A target's prompt comes over the handoff: nobody asks for the pool's answer, but it is there."""
    half.add(50, found=2)
    assert half.step(new([7, 8, 9, 10], 49, 1)).pool_saves == [PoolSave("r", 2, 3, hashes_of(3)[2:], [9])]


def test_local_hits_that_the_pool_lacks_are_offered(half):
    half.add(50, found=0)
    assert half.book.num_new_matched_tokens("r", 32, 50) == 0
    assert half.step(new([1, 2, 9, 10], 32, 18)).pool_saves == [PoolSave("r", 0, 3, hashes_of(3), [1, 2, 9])]


def test_the_answers_blocks_are_offered_once_their_hash_is_known(half):
    hashes = half.add(20, found=0)
    half.step(new([7, 8], 0, 20))
    for computed in range(20, 31):
        assert half.step(more([], computed, 1)).pool_saves == []
    # All 32 tokens are scheduled, but vLLM learns the last one only from this step's output.
    assert half.step(more([], 31, 1)).pool_saves == []
    hashes.append(b"hash 1")
    assert half.step(more([9], 32, 1)).pool_saves == [PoolSave("r", 1, 2, [b"hash 1"], [8])]


def test_a_request_with_nothing_to_save_holds_no_block(half):
    half.add(10)
    half.step(new([7], 0, 10))
    assert half.book.finished("r") is False


def test_a_preemption_stops_the_saves_and_starts_over(half):
    half.add(50, found=0)
    half.book.num_new_matched_tokens("r", 0, 50)
    assert half.step(new([7, 8, 9], 0, 48)).pool_saves != []
    plan = half.step(preempted=["r"])
    assert plan.pool_drops == ["r"]
    assert half.book.finished("r") is False, "its blocks are gone: there is nothing to hold"
    half.add(50, found=0)
    half.step(new([7, 8, 9], 0, 48))
    half.step(preempted=["r"])
    half.asked[-1][1].set_result(2)
    assert half.book.num_new_matched_tokens("r", 0, 50) == 32
    half.book.allocated("r", [3, 4], 32)
    assert half.step().pool_loads == [PoolLoad("r", hashes_of(2), [3, 4])]
    assert half.step(new([3, 4, 5, 6], 32, 18)).pool_saves == [PoolSave("r", 2, 3, hashes_of(3)[2:], [5])]


def test_a_request_that_ends_after_its_blocks_were_taken_stops_its_saves(half):
    """As `reset_prefix_cache` takes them, outside of a step, so that no step names the request as preempted."""
    half.add(50, found=0)
    half.step(new([7, 8, 9], 0, 48))
    assert half.book.finished("r", has_blocks=False) is False
    assert half.step().pool_drops == ["r"]
    assert half.step().pool_drops == []


def test_a_preemption_before_any_save_drops_nothing(half):
    half.add(50, found=0)
    assert half.step(preempted=["r", "a stranger"]).pool_drops == []


def test_unknown_requests_are_nobodys(half):
    assert half.book.num_new_matched_tokens("r", 0, 50) == 0
    half.book.allocated("r", [1], 16)
    assert half.step(new([1], 0, 16)).pool_saves == []
    assert half.book.finished("r") is False
