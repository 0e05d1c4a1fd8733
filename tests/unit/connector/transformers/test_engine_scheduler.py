from typing import Any

import pytest

from kvferry.connector.transformers.params import RequestError, SamplingParams
from kvferry.connector.transformers.pool import BlockPool
from kvferry.connector.transformers.scheduler import Scheduler
from kvferry.connector.transformers.sequence import GenerationRequest, Sequence, State
from kvferry.hashing import block_hashes


def make(num_blocks: int = 64, **overrides: Any) -> Scheduler:
    settings = {"block_size": 16, "chunk_tokens": 64, "max_running": 8, "max_waiting": 8, **overrides}
    return Scheduler(BlockPool(num_blocks), **settings)


def sequence(num_prompt: int, max_tokens: int = 1) -> Sequence:
    prompt = list(range(num_prompt))
    request = GenerationRequest(
        request_id="r", prompt=prompt, params=SamplingParams(max_tokens=max_tokens), sink=lambda event: None
    )
    return Sequence(request, 0, block_hashes(prompt[: (num_prompt - 1) // 16 * 16], 16, b"root"))


def passes(scheduler: Scheduler, seq: Sequence) -> list[tuple[int, int, int, int]]:
    """Run `seq` up to its first token."""
    seen = []
    while True:
        (work,) = [w for w in scheduler.schedule() if w.sequence is seq]
        seen.append((work.grid_start, work.num_rows, work.first, work.stop))
        scheduler.advance(work)
        if work.yields_token:
            return seen


@pytest.mark.parametrize(
    ("num_prompt", "expected"),
    [
        (1, [(0, 1, 0, 1)]),
        (2, [(0, 64, 0, 1), (1, 1, 1, 2)]),
        (64, [(0, 64, 0, 63), (63, 1, 63, 64)]),
        (65, [(0, 64, 0, 64), (64, 1, 64, 65)]),
        (130, [(0, 64, 0, 64), (64, 64, 64, 128), (128, 64, 128, 129), (129, 1, 129, 130)]),
    ],
)
def test_chunks_have_one_size_and_the_last_prompt_token_runs_alone(
    num_prompt: int, expected: list[tuple[int, int, int, int]]
) -> None:
    scheduler, seq = make(), sequence(num_prompt)
    scheduler.add(seq)
    scheduler.admit()
    assert passes(scheduler, seq) == expected


def test_a_prefix_hit_in_the_middle_of_a_chunk_keeps_the_grid() -> None:
    scheduler = make()
    first, longer = sequence(50), sequence(100)
    scheduler.add(first)
    scheduler.admit()
    passes(scheduler, first)
    scheduler.remove(first)
    scheduler.release(first)
    scheduler.add(longer)
    scheduler.admit()
    assert longer.num_cached == 48
    assert passes(scheduler, longer) == [(0, 64, 48, 64), (64, 64, 64, 99), (99, 1, 99, 100)]


def test_the_block_of_the_last_prompt_token_is_never_reused() -> None:
    scheduler, seq = make(), sequence(32)
    scheduler.add(seq)
    scheduler.admit()
    passes(scheduler, seq)
    assert scheduler.pool.num_cached == 1


def test_admission_reserves_all_blocks_and_nobody_overtakes() -> None:
    scheduler = make(num_blocks=8)
    large, larger, small = sequence(64, 17), sequence(64, 33), sequence(1, 1)
    for seq in (large, larger, small):
        scheduler.add(seq)
    assert scheduler.admit() == [large]
    assert len(large.block_table) == 5
    assert scheduler.admit() == []
    scheduler.remove(large)
    scheduler.release(large)
    assert scheduler.admit() == [larger, small]


def test_what_can_never_fit_is_refused_and_a_full_queue_is_503() -> None:
    scheduler = make(num_blocks=4, max_waiting=1)
    with pytest.raises(RequestError, match="need 5 blocks of 16 tokens, this instance has 4") as refused:
        scheduler.add(sequence(64, 2))
    assert refused.value.status == 400
    scheduler.add(sequence(60, 1))
    with pytest.raises(RequestError, match="1 requests wait already") as refused:
        scheduler.add(sequence(1, 1))
    assert refused.value.status == 503


def test_one_chunk_a_step_beside_every_answer_in_progress() -> None:
    scheduler = make()
    sequences = [sequence(1, 4), sequence(1, 4), sequence(200), sequence(300)]
    for seq in sequences:
        scheduler.add(seq)
    scheduler.admit()
    assert [w.sequence for w in scheduler.schedule()] == sequences[:3]


def test_parked_sequences_hold_their_blocks_and_take_no_turn() -> None:
    scheduler = make(max_running=1)
    parked, other = sequence(40), sequence(1)
    scheduler.add(parked)
    scheduler.add(other)
    scheduler.admit()
    scheduler.park(parked)
    assert parked.state is State.PARKED and len(parked.block_table) == 3
    assert scheduler.admit() == [other]
    assert [w.sequence for w in scheduler.schedule()] == [other]
    scheduler.resume(parked)
    assert parked.state is State.RUNNING
    scheduler.remove(parked)
    scheduler.release(parked)
    scheduler.remove(other)
    scheduler.release(other)
    assert scheduler.pool.num_held == 0
