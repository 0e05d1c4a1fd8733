"""Eviction policies: what every one keeps, and what each is for."""

from __future__ import annotations

import copy
import random

import pytest

from kvferry.errors import ConfigError
from kvferry.policy.eviction import EvictionPolicy, Place
from kvferry.policy.eviction_choice import BEST_POLICY, POLICY_NAMES, create_eviction

FIRST = Place[int]()


def filled(name: str, keys: range, capacity: int | None = None) -> EvictionPolicy[int]:
    policy = create_eviction(name, capacity or len(keys), int)
    for key in keys:
        policy.insert(key, FIRST)
    return policy


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_books_agree_with_a_set_whatever_happens(name: str) -> None:
    rng, capacity = random.Random(5), 40
    policy = create_eviction(name, capacity, int)
    cached: set[int] = set()
    for _ in range(6000):
        depth = rng.randrange(8)
        key = rng.randrange(12) * 8 + depth
        place = Place(depth, 8, key - 1 if depth else None)
        if rng.random() < 0.05:
            policy.discard(key)
            cached.discard(key)
        elif key in cached:
            policy.touch(key, place)
        else:
            held = set(rng.sample(sorted(cached), min(len(cached), 5)))
            while len(policy) >= capacity:
                victim = policy.evict(held)
                assert victim in cached
                assert victim not in held
                cached.discard(victim)
            policy.insert(key, place)
            cached.add(key)
        assert len(policy) == len(cached)
        assert (key in policy) == (key in cached)
    left = set()
    while (victim := policy.evict()) is not None:
        left.add(victim)
    assert left == cached
    assert len(policy) == 0


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_many_leave_as_one_after_the_other_would(name: str) -> None:
    rng, capacity = random.Random(7), 60
    policy = create_eviction(name, capacity, int)
    num_left = 0
    for key in (rng.randrange(120) for _ in range(4000)):
        place = Place(key % 8, 8, key - 1 if key % 8 else None)
        if key in policy:
            policy.touch(key, place)
            continue
        if len(policy) >= capacity:
            held, count = set(rng.sample(range(120), 30)), rng.randrange(1, 50)
            twin = copy.deepcopy(policy)
            one_by_one = [twin.evict(held) for _ in range(count)]
            many = policy.evict_many(count, held)
            assert many == [victim for victim in one_by_one if victim is not None]
            num_left += len(many)
        policy.insert(key, place)
    assert num_left > 200


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_held_blocks_stay_and_leave_later(name: str) -> None:
    policy = filled(name, range(10))
    assert policy.evict(range(10)) is None
    assert len(policy) == 10
    assert policy.evict({k for k in range(10) if k != 7}) == 7
    assert {policy.evict() for _ in range(9)} == set(range(10)) - {7}


def test_lru_evicts_what_was_unused_longest() -> None:
    policy = filled("lru", range(4))
    policy.touch(0, FIRST)
    assert [policy.evict() for _ in range(4)] == [1, 2, 3, 0]


def test_lfu_evicts_the_fewest_uses_and_ageing_forgets_old_fame() -> None:
    for name, famous_stays in (("lfu", True), ("lfu-da", False)):
        policy = filled(name, range(2))
        for _ in range(3):
            policy.touch(0, FIRST)
        for key in range(2, 22):
            policy.evict()
            policy.insert(key, FIRST)
        assert (0 in policy) == famous_stays, name
        assert 21 in policy


def test_s3_fifo_keeps_a_used_block_through_a_scan() -> None:
    policy = filled("s3-fifo", range(20))
    policy.touch(3, FIRST)
    for key in range(100, 300):
        while len(policy) >= 20:
            policy.evict()
        policy.insert(key, FIRST)
    assert 3 in policy
    assert 4 not in policy


def test_s3_fifo_remembers_what_left_the_small_queue() -> None:
    policy = filled("s3-fifo", range(20))
    gone = policy.evict()
    assert gone == 0
    policy.insert(0, FIRST)
    assert [policy.evict() for _ in range(19)] == [*range(1, 19), 0]


def test_prefix_never_evicts_a_block_before_its_successors() -> None:
    policy = create_eviction("prefix", 8, int)
    for depth in range(4):
        policy.insert(depth, Place(depth, 4, depth - 1 if depth else None))
    policy.insert(10, Place(1, 2, 0))
    policy.touch(3, Place(3, 4, 2))
    assert [policy.evict() for _ in range(5)] == [10, 3, 2, 1, 0]


def test_prefix_evicts_an_inner_block_rather_than_none() -> None:
    policy = create_eviction("prefix", 8, int)
    policy.insert(1, Place(1, 2, 0))
    policy.insert(0, Place(0, 2, None))
    assert policy.evict({1}) == 0
    assert policy.evict() == 1


def test_hazard_learns_which_blocks_come_back() -> None:
    # First blocks of prompts return after a gap in which LRU would lose them; the others never return.
    hits = {}
    for name in ("lru", BEST_POLICY):
        policy, capacity, hits[name] = create_eviction(name, 64, int), 64, 0
        for turn in range(3000):
            for depth in (1, 0):
                key = turn % 40 if depth == 0 else 10_000 + 4 * turn
                place = Place(depth, 4, None)
                if key in policy:
                    policy.touch(key, place)
                    hits[name] += 1
                    continue
                while len(policy) >= capacity:
                    policy.evict()
                policy.insert(key, place)
    assert hits["lru"] == 0
    assert hits[BEST_POLICY] > 2000


def test_an_unknown_policy_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'lfru' is unknown; choose one of lru"):
        create_eviction("lfru", 1, int)
