"""What every directory must do, embedded or Redis: leases, live nodes, epochs, and nothing lost by its tidying."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from kvferry.errors import TransportError
from kvferry.pool import BlockSpace
from kvferry.pool.directory import Directory
from kvferry.pool.epochs import FIRST, Epoch, new_epoch
from kvferry.types import Incarnation
from pool_processes import SPACE, WAIT_S, eventually, redis_server

A, B = Incarnation(0xA), Incarnation(0xB)
OTHER = BlockSpace(SPACE.fingerprint, "tenant-b")
Views = Callable[[], Directory]


async def test_only_live_nodes_count_and_each_for_what_it_reported(directories: Views) -> None:
    one, two = directories(), directories()
    assert not await one.renew(A, 60.0)
    await one.report(A, [(SPACE, b"1"), (SPACE, b"2")], [])
    assert await two.lookup(SPACE, [b"1"]) == [()]
    await one.join(A, "tcp://a:1", 60.0)
    await one.report(A, [(SPACE, b"1"), (SPACE, b"2")], [])
    await two.join(B, "tcp://b:1", 60.0)
    await two.report(B, [(SPACE, b"2"), (OTHER, b"1")], [])
    assert await one.renew(A, 60.0)
    assert await one.nodes() == await two.nodes() == {A: "tcp://a:1", B: "tcp://b:1"}
    assert await two.lookup(SPACE, [b"1", b"2", b"3"]) == [("tcp://a:1",), ("tcp://a:1", "tcp://b:1"), ()]
    assert await one.lookup(OTHER, [b"1", b"2"]) == [("tcp://b:1",), ()]
    assert await one.lookup(SPACE, []) == []
    await one.report(A, [], [(SPACE, b"1")])
    assert await two.lookup(SPACE, [b"1"]) == [()]
    await one.leave(A)
    assert await two.nodes() == {B: "tcp://b:1"}
    assert await two.lookup(SPACE, [b"2"]) == [("tcp://b:1",)]


async def test_hashes_of_any_length_are_looked_up_in_one_call_in_order(directories: Views) -> None:
    directory = directories()
    await directory.join(A, "tcp://a:1", 60.0)
    await directory.join(B, "tcp://b:1", 60.0)
    await directory.report(A, [(SPACE, b"12"), (SPACE, b"3" * 64)], [])
    await directory.report(B, [(SPACE, b"1"), (SPACE, b"12")], [])
    asked = [b"12", b"", b"1", b"3" * 64, b"12", b"2"]
    both, a, b = ("tcp://a:1", "tcp://b:1"), ("tcp://a:1",), ("tcp://b:1",)
    assert await directory.lookup(SPACE, asked) == [both, (), b, a, both, ()]


async def test_a_lease_that_lapses_takes_the_node_s_entries_along(directories: Views) -> None:
    one, two = directories(), directories()
    await one.join(A, "tcp://a:1", 0.3)
    await one.report(A, [(SPACE, b"1")], [])
    await one.join(B, "tcp://b:1", 60.0)
    await one.report(B, [(SPACE, b"1")], [])

    async def gone() -> bool:
        return await two.nodes() == {B: "tcp://b:1"} and await two.lookup(SPACE, [b"1"]) == [("tcp://b:1",)]

    await eventually(gone)
    assert not await one.renew(A, 0.3)
    # It was alive all the time: what tidying took away is there again when it has reported.
    await one.join(A, "tcp://a:1", 60.0)
    await one.report(A, [(SPACE, b"1")], [])
    assert await two.lookup(SPACE, [b"1"]) == [("tcp://a:1", "tcp://b:1")]


async def test_an_epoch_changes_once_from_what_it_was(directories: Views) -> None:
    one, two = directories(), directories()
    first, second = new_epoch(), new_epoch()
    assert (await one.epochs())[:2] == (FIRST, {})
    assert await one.change_epoch(SPACE, FIRST, first)
    assert not await two.change_epoch(SPACE, FIRST, second)
    assert await two.change_epoch(SPACE, first, second)
    assert await one.change_epoch(OTHER, FIRST, Epoch((1 << 63) - 1))
    latest = Epoch((1 << 63) - 1)
    assert (await two.epochs())[:2] == (latest, {SPACE: second, OTHER: latest})
    assert (await one.epochs()).born == (await two.epochs()).born != FIRST
    # Who joins has seen the latest one.
    assert not await two.join(A, "tcp://a:1", 60.0, seen=second)
    assert await one.nodes() == {}
    assert await two.join(A, "tcp://a:1", 60.0, seen=latest)
    assert await one.nodes() == {A: "tcp://a:1"}


@pytest.mark.redis
async def test_tidying_spares_a_node_that_lives_again_meanwhile(tmp_path: Path) -> None:
    pytest.importorskip("redis")
    from kvferry.pool.directory_redis import RedisDirectory

    with redis_server(tmp_path) as server:
        directory = RedisDirectory(server.url)
        try:
            await directory.report(A, [(SPACE, b"1")], [])
            await directory.report(B, [(SPACE, b"1")], [])
            forget = directory._forget

            async def late(node: bytes, keys: object) -> None:
                # Between the look at who lives and the tidying, one of the two joins.
                await directory.join(A, "tcp://a:1", 60.0)
                await forget(node, keys)  # type: ignore[arg-type]

            directory._forget = late  # type: ignore[method-assign]
            await directory.lookup(SPACE, [b"1"])
            directory._forget = forget  # type: ignore[method-assign]
            assert await directory.lookup(SPACE, [b"1"]) == [("tcp://a:1",)]
            await directory.join(B, "tcp://b:1", 60.0)
            # The other one was dead: its entry is gone, not only hidden.
            assert await directory.lookup(SPACE, [b"1"]) == [("tcp://a:1",)]
        finally:
            await directory.close()


async def test_a_call_that_is_cancelled_ends_wherever_it_is(directories: Views) -> None:
    directory = directories()

    async def ask_for_ever() -> None:
        while True:
            await directory.nodes()
            await asyncio.sleep(0)

    await directory.join(Incarnation(7), "here", 60.0)
    for steps in range(60):
        asking = asyncio.create_task(ask_for_ever())
        for _ in range(steps):
            await asyncio.sleep(0)
        asking.cancel()
        _, left = await asyncio.wait({asking}, timeout=WAIT_S)
        assert not left, f"cancelled after {steps} steps of the loop, and it goes on"


@pytest.mark.redis
async def test_what_others_wrote_into_redis_is_an_error_of_the_directory(tmp_path: Path) -> None:
    from kvferry.pool.directory_redis import RedisDirectory

    with redis_server(tmp_path) as server:
        directory = RedisDirectory(server.url)
        await directory.epochs()
        await directory.join(A, "here", 60.0)
        await directory._redis.hset("kvferry:epochs", b"no space", "7")
        with pytest.raises(TransportError, match="did not write"):
            await directory.epochs()
        await directory._redis.sadd("kvferry:nodes", "no number")
        await directory._redis.set("kvferry:node:no number", "there")
        with pytest.raises(TransportError, match="did not write"):
            await directory.nodes()
        await directory._redis.hdel("kvferry:epochs", b"no space")
        await directory._redis.srem("kvferry:nodes", "no number")
        assert (await directory.epochs()).spaces == {}
        assert await directory.nodes() == {A: "here"}
        await directory.close()
