"""The embedded directory: leases of nodes, and what a restarted node inherits."""

from __future__ import annotations

from kvferry.clock import VirtualClock
from kvferry.pool.directory import EmbeddedDirectory
from kvferry.pool.epochs import FIRST, Epoch
from kvferry.pool.keys import BlockSpace
from kvferry.types import Incarnation

SPACE, OTHER = BlockSpace(b"f" * 32, "a"), BlockSpace(b"f" * 32, "b")
OLD, NEW = Incarnation(1), Incarnation(2)


async def test_a_node_counts_from_join_until_its_lease_ends() -> None:
    clock = VirtualClock()
    directory = EmbeddedDirectory(clock)
    await directory.report(OLD, [(SPACE, b"1"), (SPACE, b"2")], [])
    assert await directory.lookup(SPACE, [b"1"]) == [()]
    assert not await directory.renew(OLD, 3.0)
    await directory.join(OLD, "tcp://h:1", 3.0)
    assert await directory.lookup(SPACE, [b"1", b"2", b"3"]) == [("tcp://h:1",), ("tcp://h:1",), ()]
    assert await directory.lookup(OTHER, [b"1"]) == [()]
    clock.advance(2.0)
    assert await directory.renew(OLD, 3.0)
    clock.advance(2.9)
    assert await directory.lookup(SPACE, [b"1"]) == [("tcp://h:1",)]
    clock.advance(0.2)
    assert await directory.lookup(SPACE, [b"1"]) == [()]
    assert not await directory.renew(OLD, 3.0)


async def test_a_restarted_node_inherits_nothing_and_leaving_forgets() -> None:
    directory = EmbeddedDirectory(VirtualClock())
    await directory.report(OLD, [(SPACE, b"1")], [])
    await directory.join(OLD, "tcp://h:1", 3.0)
    await directory.join(NEW, "tcp://h:2", 3.0)
    await directory.report(NEW, [(SPACE, b"2")], [(SPACE, b"1")])
    assert await directory.lookup(SPACE, [b"1", b"2"]) == [("tcp://h:1",), ("tcp://h:2",)]
    await directory.leave(OLD)
    assert await directory.lookup(SPACE, [b"1", b"2"]) == [(), ("tcp://h:2",)]
    await directory.report(NEW, [], [(SPACE, b"2")])
    assert await directory.lookup(SPACE, [b"2"]) == [()]


async def test_live_nodes_are_named_until_their_leases_end() -> None:
    clock = VirtualClock()
    directory = EmbeddedDirectory(clock)
    await directory.join(OLD, "tcp://h:1", 3.0)
    clock.advance(2.0)
    await directory.join(NEW, "tcp://h:2", 3.0)
    assert await directory.nodes() == {OLD: "tcp://h:1", NEW: "tcp://h:2"}
    clock.advance(1.5)
    assert await directory.nodes() == {NEW: "tcp://h:2"}
    await directory.leave(NEW)
    assert await directory.nodes() == {}


async def test_an_epoch_is_changed_by_who_knows_it_only() -> None:
    directory = EmbeddedDirectory(VirtualClock())
    one, two = Epoch(11), Epoch(22)
    assert (await directory.epochs())[:2] == (FIRST, {})
    assert await directory.change_epoch(SPACE, FIRST, one)
    assert not await directory.change_epoch(SPACE, FIRST, two)
    assert not await directory.change_epoch(SPACE, two, one)
    assert await directory.change_epoch(OTHER, FIRST, two)
    assert await directory.change_epoch(SPACE, one, two)
    assert (await directory.epochs())[:2] == (two, {SPACE: two, OTHER: two})
    # Who joins has seen the latest one.
    assert not await directory.join(OLD, "tcp://h:1", 3.0, seen=one)
    assert await directory.nodes() == {}
    assert await directory.join(OLD, "tcp://h:1", 3.0, seen=two)
    assert await directory.nodes() == {OLD: "tcp://h:1"}
