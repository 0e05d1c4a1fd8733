"""Pins: whose they are, and that they end with the block that was pinned."""

from __future__ import annotations

from kvferry.pool.arena import Arena, arena_bytes
from kvferry.pool.index import BlockIndex
from kvferry.pool.keys import BlockSpace, Tier
from kvferry.pool.pins import Pins
from kvferry.transport.base import Region
from kvferry.transport.memory import SharedBuffer

SPACE, SLAB = BlockSpace(b"f" * 32, "a"), 4096
BLOCK = [b"block"]


def make_index() -> BlockIndex:
    buffer = SharedBuffer(arena_bytes(1, SLAB, 8))
    region = Region(1, buffer.address, buffer.nbytes, "0" * 32, buffer=buffer.array)
    return BlockIndex(Arena(region, slab_bytes=SLAB, num_words=8), eviction="lru")


def put(index: BlockIndex, hashes: list[bytes]) -> int:
    begun = index.begin_put(SPACE, hashes, SLAB, first=0, length=len(hashes))
    return len(index.commit_put(begun, [7] * len(begun.blocks)))


def test_a_pin_from_before_a_removal_does_not_release_another_client_s() -> None:
    index = make_index()
    pins = Pins(index)
    put(index, BLOCK)
    assert pins.pin("first", SPACE, BLOCK) == 1
    index.apply_removal(SPACE, BLOCK)
    assert put(index, BLOCK) == 1
    assert pins.pin("second", SPACE, BLOCK) == 1
    assert pins.unpin("first", SPACE, BLOCK) == 0
    pins.end_all("first")
    assert put(index, [b"other"]) == 0
    assert index.tiers(SPACE, BLOCK) == [Tier.HOST]
    pins.end_all("second")
    assert put(index, [b"other"]) == 1
    index.check_integrity()


def test_a_pin_after_a_removal_is_taken_back_before_what_the_removal_ended() -> None:
    index = make_index()
    pins = Pins(index)
    put(index, BLOCK)
    pins.pin("first", SPACE, BLOCK)
    index.apply_removal(SPACE, BLOCK)
    put(index, BLOCK)
    pins.pin("first", SPACE, BLOCK)
    assert pins.unpin("first", SPACE, BLOCK) == 1
    assert pins.unpin("first", SPACE, BLOCK) == 0
    assert put(index, [b"other"]) == 1
    index.check_integrity()


def test_each_pin_is_taken_back_once() -> None:
    index = make_index()
    pins = Pins(index)
    put(index, BLOCK)
    assert [pins.pin("first", SPACE, BLOCK) for _ in range(2)] == [1, 1]
    assert pins.unpin("second", SPACE, BLOCK) == 0
    assert [pins.unpin("first", SPACE, BLOCK) for _ in range(3)] == [1, 1, 0]
    assert put(index, [b"other"]) == 1
    index.check_integrity()
