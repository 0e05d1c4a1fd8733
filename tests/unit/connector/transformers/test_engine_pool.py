import pytest

from kvferry.connector.transformers.pool import BlockPool
from kvferry.errors import PoolExhausted


def h(i: int) -> bytes:
    return i.to_bytes(32, "big")


def test_reserve_and_release_conserve_blocks() -> None:
    pool = BlockPool(8)
    a, b = pool.reserve(3), pool.reserve(5)
    assert sorted(a + b) == list(range(8))
    assert (pool.num_free, pool.num_held) == (0, 8)
    pool.release(a)
    assert (pool.num_free, pool.num_held) == (3, 5)
    pool.check_integrity()


def test_a_reservation_that_does_not_fit_takes_nothing() -> None:
    pool = BlockPool(4)
    pool.reserve(2)
    with pytest.raises(PoolExhausted, match="3 fresh blocks are needed, 2 of 4 are free"):
        pool.reserve(3)
    assert pool.num_free == 2
    pool.check_integrity()


def test_a_cached_free_block_is_not_counted_as_room_for_a_fresh_one() -> None:
    pool = BlockPool(2)
    blocks = pool.reserve(2)
    pool.register(blocks[0], h(0))
    pool.release(blocks)
    with pytest.raises(PoolExhausted):
        pool.reserve(3, pool.lookup([h(0)]))
    assert pool.reserve(2, pool.lookup([h(0)]))[0] == blocks[0]
    pool.check_integrity()


def test_lookup_gives_the_longest_prefix_and_stops_at_the_first_miss() -> None:
    pool = BlockPool(8)
    blocks = pool.reserve(3)
    for i in (0, 2):
        pool.register(blocks[i], h(i))
    assert pool.lookup([h(0), h(1), h(2)]) == [blocks[0]]


def test_shared_blocks_are_free_only_after_the_last_release() -> None:
    pool = BlockPool(4)
    first = pool.reserve(2)
    pool.register(first[0], h(0))
    second = pool.reserve(2, pool.lookup([h(0)]))
    assert second[0] == first[0]
    pool.release(first)
    assert pool.num_held == 2
    pool.release(second)
    assert pool.num_free == 4
    pool.check_integrity()


def test_blocks_without_hash_are_reused_before_cached_ones_and_the_prefix_end_before_its_beginning() -> None:
    pool = BlockPool(4)
    blocks = pool.reserve(4)
    for i in range(3):
        pool.register(blocks[i], h(i))
    pool.release(blocks)
    assert pool.reserve(1) == [blocks[3]]
    assert pool.reserve(1) == [blocks[2]]
    assert pool.lookup([h(0), h(1), h(2)]) == blocks[:2]
    pool.check_integrity()


def test_least_recently_used_prefix_goes_first() -> None:
    pool = BlockPool(2)
    a, b = pool.reserve(1), pool.reserve(1)
    pool.register(a[0], h(1))
    pool.register(b[0], h(2))
    pool.release(a)
    pool.release(b)
    pool.release(pool.reserve(1, pool.lookup([h(1)])))
    pool.reserve(1)
    assert pool.lookup([h(1)]) == a
    assert pool.lookup([h(2)]) == []


def test_a_double_release_is_refused() -> None:
    pool = BlockPool(2)
    blocks = pool.reserve(1)
    pool.release(blocks)
    with pytest.raises(RuntimeError, match="released but is not held"):
        pool.release(blocks)


def test_the_same_content_twice_keeps_the_first_block() -> None:
    pool = BlockPool(2)
    a, b = pool.reserve(1), pool.reserve(1)
    pool.register(a[0], h(7))
    pool.register(b[0], h(7))
    assert pool.lookup([h(7)]) == a
    pool.check_integrity()
    pool.forget_cached()
    assert pool.lookup([h(7)]) == [] and pool.num_held == 2
