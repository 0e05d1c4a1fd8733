"""Namespace epochs: who missed a removal, who is ahead of a lost directory, and what an index does about it."""

from __future__ import annotations

from kvferry.policy.eviction import Place
from kvferry.pool.arena import Arena, arena_bytes
from kvferry.pool.epochs import FIRST, REMEMBERED, Epoch, Epochs, new_epoch
from kvferry.pool.index import BlockIndex
from kvferry.pool.keys import BlockSpace
from kvferry.transport.base import Region
from kvferry.transport.memory import SharedBuffer

SPACE, OTHER = BlockSpace(b"f" * 32, "a"), BlockSpace(b"f" * 32, "b")
E1, E2, E3 = Epoch(11), Epoch(22), Epoch(33)


def make_index() -> BlockIndex:
    buffer = SharedBuffer(arena_bytes(4, 4096, 8))
    region = Region(1, buffer.address, buffer.nbytes, "0" * 32, buffer=buffer.array)
    return BlockIndex(Arena(region, slab_bytes=4096, num_words=8), eviction="lru")


def put(index: BlockIndex, *hashes: bytes) -> None:
    began = index.begin_put(SPACE, list(hashes), 4096, first=0, length=len(hashes))
    index.commit_put(began, [1] * len(began.blocks))


def held(index: BlockIndex) -> list[bytes]:
    return sorted(block_hash for _, block_hash in index.names())


def test_a_node_that_hears_of_every_removal_keeps_up() -> None:
    epochs = Epochs()
    assert (epochs.current(SPACE), epochs.compare(SPACE, FIRST)) == (FIRST, "same")
    epochs.enter(SPACE, E1, FIRST)
    epochs.enter(SPACE, E2, E1)
    assert (epochs.current(SPACE), epochs.compare(SPACE, E2)) == (E2, "same")
    assert epochs.compare(OTHER, FIRST) == "same"
    assert epochs.compare(SPACE, E3) == "missed"
    # The directory was lost, or filled again by one that knew less.
    assert epochs.compare(SPACE, FIRST) == "ahead"
    assert epochs.compare(SPACE, E1) == "ahead"


def test_a_removal_that_comes_late_changes_no_epoch() -> None:
    epochs = Epochs()
    epochs.enter(SPACE, E2, E1, emptied=True)
    epochs.enter(SPACE, E1, FIRST)
    assert epochs.current(SPACE) == E2
    assert epochs.descends(SPACE, E2, E1)
    epochs.enter(SPACE, E2, E1)
    assert epochs.current(SPACE) == E2


def test_removals_that_began_from_a_lost_directory_are_a_fork() -> None:
    epochs = Epochs()
    epochs.enter(SPACE, E1, FIRST)
    # Begun by a node that had not heard of E1.
    epochs.enter(SPACE, E2, FIRST)
    assert epochs.current(SPACE) == E1
    assert epochs.compare(SPACE, E2) == "forked"


def test_old_epochs_are_forgotten_which_reads_as_missed() -> None:
    epochs, last, second = Epochs(), FIRST, FIRST
    for number in range(REMEMBERED + 1):
        epoch = new_epoch()
        epochs.enter(SPACE, epoch, last)
        last, second = epoch, epoch if number == 1 else second
    assert not epochs.knows(SPACE, FIRST)
    assert epochs.knows(SPACE, second)


def test_epochs_outlive_the_node_in_a_file() -> None:
    epochs = Epochs()
    epochs.enter(SPACE, E1, FIRST)
    epochs.enter(SPACE, E2, E1)
    again = Epochs.decode(epochs.encode())
    assert again.all() == {SPACE: E2}
    assert again.compare(SPACE, E1) == "ahead"


def test_a_removal_after_one_that_was_missed_takes_the_whole_space() -> None:
    index = make_index()
    put(index, b"1", b"2", b"3")
    assert [entry.key[1] for entry in index.apply_removal(SPACE, [b"1"], previous=FIRST, epoch=E1)] == [b"1"]
    assert held(index) == [b"2", b"3"]
    index.apply_removal(SPACE, [b"2"], previous=E2, epoch=E3)
    assert held(index) == []
    assert index.epochs.current(SPACE) == E3
    index.check_integrity()


def test_a_copy_in_flight_is_dropped_by_any_removal_and_a_put_by_its_own() -> None:
    index = make_index()
    copy = index.begin_put(SPACE, [b"1"], 4096, first=0, length=0, replicas=[Place(0, 1, None)])
    mine = index.begin_put(SPACE, [b"2"], 4096, first=0, length=1)
    index.apply_removal(SPACE, [b"9"], previous=FIRST, epoch=E1)
    assert index.commit_put(copy, [1]) == []
    assert len(index.commit_put(mine, [1])) == 1
    cleared = index.begin_put(SPACE, [b"3"], 4096, first=0, length=1)
    index.apply_removal(SPACE, None)
    assert index.commit_put(cleared, [1]) == []
    assert held(index) == []
    index.check_integrity()


def test_a_copy_keeps_its_place_in_its_prompt_and_is_counted_while_it_is_there() -> None:
    index = make_index()
    put(index, b"root")
    copy = index.begin_put(SPACE, [b"leaf"], 4096, first=0, length=0, replicas=[Place(1, 2, b"root")])
    (entry,) = index.commit_put(copy, [1])
    assert (index.num_replicas, index.roots_of([entry])) == (1, [b"root"])
    put(index, b"a", b"b", b"c", b"d")
    assert (index.num_replicas, held(index)) == (0, [b"a", b"b", b"c", b"d"])
    index.check_integrity()
