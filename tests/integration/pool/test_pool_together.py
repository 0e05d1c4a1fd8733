"""Nodes of one directory: removals reach all of them, hot blocks get copies, a node is drained; prefetch from disk."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from kvferry.errors import LeaseExpired, PoolError
from kvferry.pool import BlockSpace, PoolClient, PoolNode, PoolSettings, Tier
from kvferry.pool import removal as removal_module
from kvferry.pool import replicas as replicas_module
from kvferry.pool.directory import Directory
from kvferry.pool.epochs import Epoch
from pool_processes import BLOCK, SPACE, WAIT_S, client_of, eventually, get, name, put

Views = Callable[[], Directory]


@pytest.fixture(autouse=True)
def patient_removals(monkeypatch: pytest.MonkeyPatch) -> None:
    """All nodes here live in one process, which may get no CPU for seconds."""
    monkeypatch.setattr(removal_module, "TELL_S", WAIT_S)


def make_node(view: Directory, **more: Any) -> PoolNode:
    asked = {"arena_bytes": 40 * BLOCK, "slab_bytes": BLOCK, "node_ttl_s": 60.0, "max_copies": 1}
    return PoolNode(settings=PoolSettings(**{**asked, **more}), directory=view)


@contextlib.asynccontextmanager
async def nodes_of(directories: Views, count: int, **more: Any) -> AsyncIterator[list[PoolNode]]:
    nodes = [make_node(directories(), **more) for _ in range(count)]
    watcher = directories()
    for node in nodes:
        await node.start()

    async def all_joined() -> bool:
        return len(await watcher.nodes()) == count

    try:
        await eventually(all_joined)
        yield nodes
    finally:
        for node in nodes:
            await node.close()
            node.check_integrity()


async def tiers(client: PoolClient, *numbers: int) -> list[Tier | None]:
    return await client.exists([name(number) for number in numbers])


async def test_a_removal_told_to_one_node_reaches_all(directories: Views) -> None:
    async with nodes_of(directories, 3) as nodes, contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(client_of(node.address)) for node in nodes]
        other = await stack.enter_async_context(client_of(nodes[2].address, BlockSpace(SPACE.fingerprint, "tenant-b")))
        for client in (*clients, other):
            await put(client, [1, 2, 3])
        # Told to a node that need not have them.
        assert await clients[0].remove([name(1), name(9)]) == 3
        for client in clients:
            assert await tiers(client, 1, 2) == [None, Tier.HOST]
        assert await clients[1].clear() == 6
        for client in clients:
            assert await tiers(client, 1, 2, 3) == [None] * 3
        assert await tiers(other, 1, 2, 3) == [Tier.HOST] * 3
        # Removals one after the other through several nodes: nobody forgets more than he was told to.
        for round_ in range(3):
            for client in clients:
                await put(client, [1, 2])
            assert await clients[round_].remove([name(1)]) == 3
        assert [await tiers(client, 2) for client in clients] == [[Tier.HOST]] * 3
        assert len({node._index.epochs.current(SPACE) for node in nodes}) == 1


async def test_removals_from_all_sides_at_once_all_come_true(directories: Views) -> None:
    async with nodes_of(directories, 3) as nodes, contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(client_of(node.address)) for node in nodes]
        for client in clients:
            await put(client, [1, 2, 3, 4])
        await asyncio.gather(*(client.remove([name(number)]) for number, client in enumerate(clients, 1)))
        for client in clients:
            assert await tiers(client, 1, 2, 3) == [None] * 3


async def test_what_a_node_missed_while_it_was_away_is_gone_when_it_is_back(directories: Views, tmp_path: Path) -> None:
    disk = {"disk_path": str(tmp_path / "away"), "disk_bytes": 40 * BLOCK}
    async with nodes_of(directories, 1) as (stays,):
        away = make_node(directories(), **disk)
        await away.start()
        async with client_of(away.address) as client, client_of(away.address, BlockSpace(b"n" * 32)) as other:
            await put(client, [1, 2])
            await put(other, [5])
        await away.close()
        async with client_of(stays.address) as client:
            assert await client.remove([name(1)]) == 0
        back = make_node(directories(), **disk)
        await back.start()
        try:
            async with client_of(back.address) as client, client_of(back.address, BlockSpace(b"n" * 32)) as other:

                async def serves_its_disk() -> bool:
                    return await tiers(other, 5) == [Tier.DISK]

                await eventually(serves_its_disk)
                # It can't know which of the namespace's blocks were meant.
                assert await tiers(client, 1, 2) == [None, None]
                assert (await get(other, [5])).found == [True]
                await put(client, [1])
                assert (await get(client, [1])).found == [True]
        finally:
            await back.close()
            back.check_integrity()


async def test_without_its_directory_a_node_serves_nothing_of_its_disk(tmp_path: Path) -> None:
    pytest.importorskip("redis")
    from kvferry.pool.directory_redis import RedisDirectory

    disk = {"disk_path": str(tmp_path), "disk_bytes": 40 * BLOCK}
    alone = PoolNode(settings=PoolSettings(arena_bytes=40 * BLOCK, slab_bytes=BLOCK, **disk))
    await alone.start()
    async with client_of(alone.address) as client:
        await put(client, [1])
    await alone.close()
    directory = RedisDirectory("redis://127.0.0.1:9/0", timeout_s=0.2)
    node = make_node(directory, **disk)
    await node.start()
    try:
        async with client_of(node.address) as client:
            # Blocks may have been removed while it was away.
            assert await tiers(client, 1) == [None]
            assert (await put(client, [1, 2])).stored == 2
            assert (await get(client, [1, 2])).found == [True, True]
            with pytest.raises(PoolError, match="the directory can't be asked"):
                await client.remove([name(2)])
            assert await tiers(client, 1, 2) == [Tier.HOST, None]
    finally:
        await node.close()
        await directory.close()
        node.check_integrity()


async def test_a_removal_that_the_directory_did_not_hear_of_reaches_others_when_it_does(directories: Views) -> None:
    async with (
        nodes_of(directories, 2, node_ttl_s=6.0) as (one, two),
        client_of(one.address) as here,
        client_of(two.address) as there,
    ):
        await put(here, [1, 2])
        await put(there, [1, 2])
        # As `remove` does where the directory can't be asked.
        one._index.apply_removal(SPACE, [name(1)])

        async def forgotten() -> bool:
            return await tiers(there, 1, 2) == [None, None]

        await eventually(forgotten)
        assert await tiers(here, 1, 2) == [None, Tier.HOST]


async def test_hot_blocks_get_a_copy_which_serves_when_their_node_is_gone(
    directories: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas_module, "PERIOD_S", 0.1)
    async with (
        nodes_of(directories, 2, max_copies=2) as (one, two),
        client_of(one.address) as here,
        client_of(two.address) as there,
    ):
        await put(here, [1, 2, 3, 4])

        async def copied() -> bool:
            await get(here, [1, 2], prefix=True)
            return two.counts["replicas_taken"] >= 2

        await eventually(copied)
        assert await tiers(there, 1, 2, 3, 4) == [Tier.HOST, Tier.HOST, None, None]
        assert (one.counts["replicas_given"], two.stat().replicas) == (2, 2)
        await one.close()
        assert (await get(there, [1, 2])).found == [True, True]
        # A copy knows where it stands in its prompt.
        (entry,) = two._index.find(SPACE, [name(2)])
        assert entry is not None
        assert (entry.place.depth, entry.replica, two._index.roots_of([entry])) == (1, True, [name(1)])


async def test_no_copy_is_taken_across_a_removal_or_with_other_bytes(directories: Views) -> None:
    async with nodes_of(directories, 2) as (one, two):
        assert one._replicas is not None and two._replicas is not None
        async with client_of(one.address) as here, client_of(two.address) as there:
            await put(here, [1, 2])
            entries = [entry for entry in one._index.find(SPACE, [name(1), name(2)]) if entry is not None]
            # One of the two heard of a removal that the other did not.
            two._index.epochs.enter(SPACE, Epoch(7), one._index.epochs.current(SPACE))
            assert (await one._replicas.offer_all(two.address, entries)).there == []
            assert two.counts["failed_lease_expired"] == 1
            one._index.epochs.enter(SPACE, Epoch(7), one._index.epochs.current(SPACE))
            # A bit flips in the memory of the node that offers.
            assert entries[0].slab is not None
            one._arena.view(entries[0].slab, BLOCK)[17] ^= 1
            assert (await one._replicas.offer_all(two.address, entries)).there == []
            assert (two.counts["replicas_wrong"], await tiers(there, 1, 2)) == (1, [None, None])
            one._arena.view(entries[0].slab, BLOCK)[17] ^= 1
            # A removal while the copy is under way: it is dropped when it commits.
            read = two._engine.read_sync

            def removed_meanwhile(*args: Any, **kwargs: Any) -> Any:
                done = read(*args, **kwargs)
                two._index.apply_removal(SPACE, [name(9)])
                return done

            two._engine.read_sync = removed_meanwhile  # type: ignore[method-assign]
            assert (await one._replicas.offer_all(two.address, entries)).there == []
            assert await tiers(there, 1, 2) == [None, None]
            two._engine.read_sync = read  # type: ignore[method-assign]
            one._index.epochs.enter(SPACE, two._index.epochs.current(SPACE), one._index.epochs.current(SPACE))
            assert (await one._replicas.offer_all(two.address, entries)).there == entries
            assert (await get(there, [1, 2])).found == [True, True]

            async def all_released() -> bool:
                return len(one._leases) == len(two._leases) == 0

            await eventually(all_released)


async def test_a_lease_that_the_offering_node_took_back_is_no_copy(
    directories: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with nodes_of(directories, 2) as (one, two):
        assert one._replicas is not None
        async with client_of(one.address) as here:
            await put(here, [1])
            entries = [entry for entry in one._index.find(SPACE, [name(1)]) if entry is not None]
            read = two._engine.read_sync

            def too_late(*args: Any, **kwargs: Any) -> Any:
                for owner, lease_id in list(one._leases._leases):
                    one._leases.end(owner, lease_id)
                return read(*args, **kwargs)

            monkeypatch.setattr(two._engine, "read_sync", too_late)
            assert (await one._replicas.offer_all(two.address, entries)).left == entries
            assert two.counts[f"failed_{LeaseExpired('').cause}"] == 1


async def test_a_drained_node_hands_on_its_hot_blocks_and_leaves(directories: Views) -> None:
    async with nodes_of(directories, 3) as nodes:
        watcher = directories()
        async with client_of(nodes[0].address) as client:
            for first in range(0, 30, 5):
                await put(client, list(range(first, first + 5)))
            for first in range(0, 15, 5):
                await get(client, list(range(first, first + 5)))
            state = await client.drain(WAIT_S)
            assert (await put(client, [99])).refused == 1

            async def ended() -> bool:
                nonlocal state
                state = await client.drain(WAIT_S)
                return bool(state.ended)

            await eventually(ended)
            assert (state.hot, state.copied, state.left, state.ended) == (15, 15, 0, "all copied")
            # It is out of the directory, where no removal would reach it: so it serves nothing any more.
            assert (await get(client, [0])).found == [False]
            assert await tiers(client, 0) == [None]
            assert (await client.stat()).state == "drained"
        assert nodes[0].address not in (await watcher.nodes()).values()
        found = dict.fromkeys(range(30), 0)
        for node in nodes[1:]:
            async with client_of(node.address) as client:
                for number, there in enumerate((await get(client, list(found))).found):
                    found[number] += there
        assert found == {number: int(number < 15) for number in range(30)}


async def test_a_drain_is_bounded_and_tells_what_is_left(directories: Views) -> None:
    async with nodes_of(directories, 2) as (one, two):
        assert two._replicas is not None
        async with client_of(one.address) as client:
            await put(client, [1, 2])
            await get(client, [1, 2])
            two._replicas.closed_to_more = True
            await client.drain(WAIT_S)

            async def ended() -> bool:
                return bool((await client.drain(WAIT_S)).ended)

            await eventually(ended)
            state = await client.drain(WAIT_S)
            assert (state.copied, state.left, state.ended) == (0, 2, "no other node takes more")


async def test_a_drain_that_nobody_answers_ends_at_its_deadline(directories: Views) -> None:
    async with nodes_of(directories, 2) as (one, two), client_of(one.address) as client:
        await put(client, [1, 2])
        await get(client, [1, 2])
        two._engine.on_message = lambda peer, payload: None
        await client.drain(0.3)

        async def ended() -> bool:
            return bool((await client.drain(0.3)).ended)

        await eventually(ended)
        state = await client.drain(0.3)
        assert (state.left, state.ended) == (2, "the deadline of 0.3 s passed")
        assert len(one._leases) == 0


async def test_a_node_of_no_directory_cannot_be_drained() -> None:
    node = PoolNode(settings=PoolSettings(arena_bytes=40 * BLOCK, slab_bytes=BLOCK))
    await node.start()
    try:
        async with client_of(node.address) as client:
            with pytest.raises(PoolError, match="has no directory"):
                await client.drain(1.0)
            assert (await put(client, [1])).stored == 1
    finally:
        await node.close()


async def test_prefetched_blocks_are_in_memory_when_they_are_asked_for(tmp_path: Path) -> None:
    settings = PoolSettings(
        arena_bytes=9 * BLOCK, slab_bytes=BLOCK, disk_path=str(tmp_path), disk_bytes=40 * BLOCK, eviction="lru"
    )
    node = PoolNode(settings=settings)
    await node.start()
    try:
        async with client_of(node.address) as client:
            for first in range(0, 24, 4):
                await put(client, list(range(first, first + 4)))

                async def written(wanted: int = first + 4) -> bool:
                    return node.counts["disk_written"] >= wanted

                await eventually(written)
            assert await tiers(client, 0, 1, 23) == [Tier.DISK, Tier.DISK, Tier.HOST]
            # A quarter of the memory at once, no more.
            assert await client.prefetch([name(n) for n in (0, 1, 2, 3, 77)]) == node._arena.num_slabs // 4

            async def there() -> bool:
                return await tiers(client, 0, 1) == [Tier.HOST, Tier.HOST]

            await eventually(there)
            result = await get(client, [0, 1])
            assert (result.found, result.from_disk) == ([True, True], 0)
            assert node.counts["prefetched"] == 2
            assert await client.prefetch([name(0)]) == 0
    finally:
        await node.close()
        node.check_integrity()
