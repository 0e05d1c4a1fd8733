"""The index: atomic puts, holds, quotas, epochs, and books that always add up."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from kvferry.errors import InvalidTransition, RegistrationError
from kvferry.pool.arena import Arena, arena_bytes
from kvferry.pool.entries import Entry
from kvferry.pool.index import BlockIndex
from kvferry.pool.keys import BlockSpace, Tier
from kvferry.transport.base import Region
from kvferry.transport.memory import SharedBuffer

SPACE = BlockSpace(b"f" * 32, "a")
OTHER = BlockSpace(b"f" * 32, "b")
SLAB = 4096


def make_index(num_slabs: int = 4, *, quotas: dict[str, int] | None = None, eviction: str = "lru") -> BlockIndex:
    buffer = SharedBuffer(arena_bytes(num_slabs, SLAB, 8))
    region = Region(1, buffer.address, buffer.nbytes, "0" * 32, buffer=buffer.array)
    return BlockIndex(Arena(region, slab_bytes=SLAB, num_words=8), eviction=eviction, quotas=quotas)


def names(*numbers: int) -> list[bytes]:
    return [number.to_bytes(4, "big") for number in numbers]


def put(index: BlockIndex, space: BlockSpace, hashes: list[bytes]) -> list[Entry]:
    begun = index.begin_put(space, hashes, SLAB, first=0, length=len(hashes))
    return index.commit_put(begun, [7] * len(begun.blocks))


def test_a_block_is_a_miss_until_its_put_is_committed() -> None:
    index = make_index()
    begun = index.begin_put(SPACE, names(1, 2), SLAB, first=0, length=2)
    assert index.tiers(SPACE, names(1, 2)) == [None, None]
    again = index.begin_put(SPACE, names(1, 2), SLAB, first=0, length=2)
    assert (again.blocks, again.duplicates) == ([], 2)
    index.commit_put(begun, [1, 2])
    assert index.tiers(SPACE, names(1, 2, 3)) == [Tier.HOST, Tier.HOST, None]
    assert put(index, SPACE, names(1)) == []
    index.check_integrity()


def test_an_aborted_put_leaves_nothing() -> None:
    index = make_index(1)
    index.abort_put(index.begin_put(SPACE, names(1), SLAB, first=0, length=1))
    assert index.tiers(SPACE, names(1)) == [None]
    assert len(put(index, SPACE, names(2))) == 1
    index.check_integrity()


def test_equal_hashes_of_two_tenants_do_not_meet() -> None:
    index = make_index()
    put(index, SPACE, names(1))
    assert index.tiers(OTHER, names(1)) == [None]
    assert index.find(OTHER, names(1)) == [None]
    assert index.apply_removal(OTHER, names(1)) == []
    assert index.tiers(SPACE, names(1)) == [Tier.HOST]


def test_held_blocks_are_not_evicted_and_a_full_arena_refuses() -> None:
    index = make_index(2)
    first, second = put(index, SPACE, names(1, 2))
    index.hold(first)
    put(index, SPACE, names(3))
    assert index.tiers(SPACE, names(1, 2, 3)) == [Tier.HOST, None, Tier.HOST]
    assert second.removed
    (pinned,) = index.pin(SPACE, names(3, 9))
    assert index.begin_put(SPACE, names(4), SLAB, first=0, length=1).refused == 1
    index.release(first)
    assert len(put(index, SPACE, names(4))) == 1
    assert index.unpin(pinned)
    assert index.evictions == 2
    with pytest.raises(InvalidTransition):
        index.release(first)
    index.check_integrity()


def test_a_removed_block_keeps_its_slab_until_its_reader_is_done() -> None:
    index = make_index(1)
    (entry,) = put(index, SPACE, names(1))
    index.hold(entry)
    assert len(index.apply_removal(SPACE, names(1))) == 1
    assert index.tiers(SPACE, names(1)) == [None]
    assert index.begin_put(SPACE, names(2), SLAB, first=0, length=1).refused == 1
    index.check_integrity()
    index.release(entry)
    assert len(put(index, SPACE, names(2))) == 1
    index.check_integrity()


@pytest.mark.parametrize("end", ["remove", "clear"])
def test_a_put_that_was_overtaken_is_dropped(end: str) -> None:
    index = make_index()
    begun = index.begin_put(SPACE, names(1), SLAB, first=0, length=1)
    index.apply_removal(SPACE, names(1) if end == "remove" else None)
    assert index.commit_put(begun, [1]) == []
    assert index.tiers(SPACE, names(1)) == [None]
    index.check_integrity()


def test_a_namespace_at_its_quota_gives_up_its_own_oldest_block() -> None:
    index = make_index(4, quotas={"a": 2 * SLAB})
    put(index, OTHER, names(8))
    put(index, SPACE, names(1, 2))
    put(index, SPACE, names(3))
    assert index.tiers(SPACE, names(1, 2, 3)) == [None, Tier.HOST, Tier.HOST]
    assert index.tiers(OTHER, names(8)) == [Tier.HOST]
    index.pin(SPACE, names(2, 3))
    assert index.begin_put(SPACE, names(4), SLAB, first=0, length=1).refused == 1
    index.check_integrity()


def test_one_put_may_fill_a_quota_and_go_on_with_its_namespace_s_own_blocks() -> None:
    index = make_index(6, quotas={"a": 3 * SLAB})
    put(index, OTHER, names(7, 8, 9))
    put(index, SPACE, names(1))
    assert len(put(index, SPACE, names(2, 3, 4))) == 3
    assert index.tiers(SPACE, names(1, 2, 3, 4)) == [None, Tier.HOST, Tier.HOST, Tier.HOST]
    assert index.tiers(OTHER, names(7, 8, 9)) == [Tier.HOST] * 3
    index.check_integrity()


def test_a_put_does_not_push_out_what_it_brings_again() -> None:
    index = make_index(3)
    put(index, SPACE, names(1, 2, 3))
    begun = index.begin_put(SPACE, names(4, 1), SLAB, first=0, length=2)
    assert (len(begun.blocks), begun.duplicates) == (1, 1)
    index.commit_put(begun, [7])
    assert index.tiers(SPACE, names(1, 2, 3, 4)) == [Tier.HOST, None, Tier.HOST, Tier.HOST]
    index.check_integrity()


def test_a_hash_that_is_named_twice_in_one_put_is_stored_once() -> None:
    index = make_index()
    begun = index.begin_put(SPACE, names(1, 1), SLAB, first=0, length=2)
    assert (len(begun.blocks), begun.duplicates) == (1, 1)
    index.commit_put(begun, [7])
    index.check_integrity()


def test_used_blocks_leave_later() -> None:
    index = make_index(2)
    entries = put(index, SPACE, names(1, 2))
    index.use(entries[:1])
    put(index, SPACE, names(3))
    assert index.tiers(SPACE, names(1, 2, 3)) == [Tier.HOST, None, Tier.HOST]


def test_a_block_on_disk_comes_back_or_is_forgotten_when_broken() -> None:
    index = make_index(1)
    (entry,) = put(index, SPACE, names(1))
    index.on_disk(entry, 5)
    put(index, SPACE, names(2))
    assert index.tiers(SPACE, names(1)) == [Tier.DISK]
    slab = index.begin_load(entry)
    assert slab is not None
    index.end_load(entry, slab, good=True)
    assert index.tiers(SPACE, names(1, 2)) == [Tier.HOST, None]
    put(index, SPACE, names(2))
    slab = index.begin_load(entry)
    assert slab is not None
    index.end_load(entry, slab, good=False)
    assert index.tiers(SPACE, names(1)) == [None]
    assert index.take_freed_slots() == [5]
    assert index.take_freed_slots() == []
    index.check_integrity()


def test_blocks_that_no_slab_holds_are_refused() -> None:
    with pytest.raises(RegistrationError, match="1 to 4096"):
        make_index().begin_put(SPACE, names(1), SLAB + 1, first=0, length=1)


@pytest.mark.parametrize("eviction", ["lru", "prefix", "hazard", "s3-fifo", "lfu-da"])
def test_books_add_up_whatever_happens(eviction: str) -> None:
    rng = random.Random(11)
    index = make_index(12, quotas={"b": 5 * SLAB}, eviction=eviction)
    puts, held, loads, slot = [], [], [], 0

    def begin() -> None:
        first = rng.randrange(20)
        hashes = names(*range(first, first + rng.randrange(1, 5)))
        puts.append(index.begin_put(rng.choice([SPACE, OTHER]), hashes, SLAB, first=first, length=24))

    def finish() -> None:
        if puts:
            begun = puts.pop(rng.randrange(len(puts)))
            index.commit_put(begun, [7] * len(begun.blocks)) if rng.random() < 0.8 else index.abort_put(begun)

    def hold() -> None:
        found = index.find(rng.choice([SPACE, OTHER]), names(*range(24)))
        here = [e for e in found if e is not None and e.slab is not None]
        index.use(here[:3])
        for entry in here[:3]:
            index.hold(entry)
            held.append(entry)

    def release() -> None:
        if held:
            index.release(held.pop(rng.randrange(len(held))))

    def remove() -> None:
        space = rng.choice([SPACE, OTHER])
        index.apply_removal(space, None if rng.random() < 0.1 else names(rng.randrange(24)))
        index.take_freed_slots()

    def to_disk() -> None:
        nonlocal slot
        for entry in index.find(SPACE, names(rng.randrange(24))):
            if entry is not None and entry.slot is None:
                slot += 1
                index.on_disk(entry, slot)
            elif entry is not None:
                index.leave_disk(entry)

    def load() -> None:
        for entry in index.find(SPACE, names(*range(24))):
            if entry is not None and entry.slab is None and entry not in [e for e, _ in loads]:
                slab = index.begin_load(entry)
                if slab is not None:
                    loads.append((entry, slab))
        while loads and rng.random() < 0.7:
            entry, slab = loads.pop()
            index.end_load(entry, slab, good=rng.random() < 0.8)

    steps: list[Callable[[], None]] = [begin, begin, finish, finish, hold, release, release, remove, to_disk, load]
    for _ in range(4000):
        rng.choice(steps)()
        index.check_integrity()
    assert index.evictions > 20


def test_the_root_of_a_prompt_is_found_along_its_chain_and_never_in_a_circle() -> None:
    index = make_index(num_slabs=8)
    chain = put(index, SPACE, names(*range(6)))
    assert index.roots_of(chain) == names(0) * 6
    index.apply_removal(SPACE, names(2))
    left = [entry for entry in chain if not entry.removed]
    assert index.roots_of(left) == [*names(0, 0), *names(3) * 3]
    # A client told places that lead in a circle.
    for entry, parent in ((left[0], left[1]), (left[1], left[0])):
        entry.place = entry.place._replace(depth=1, parent=parent.key)
    assert index.roots_of(left[:2]) == names(0, 1)
