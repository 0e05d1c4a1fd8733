"""Nodes that report to a directory, and engines that look up in it: embedded, and a real Redis that is killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvferry.errors import TransportError
from kvferry.pool import BlockSpace, PoolClient, PoolNode, PoolNodes, PoolSettings, whole
from kvferry.pool.directory import Directory, EmbeddedDirectory
from kvferry.types import Incarnation
from pool_processes import WAIT_S, RedisServer, eventually

BLOCK = 8192
SPACE = BlockSpace(b"m" * 32, "tenant-a")


def make_node(directory: Directory, node_ttl_s: float = 30.0) -> PoolNode:
    settings = PoolSettings(arena_bytes=64 * BLOCK, slab_bytes=BLOCK, node_ttl_s=node_ttl_s)
    return PoolNode(settings=settings, directory=directory)


def make_pool(home: PoolNode, directory: Directory) -> PoolNodes:
    far = {"transports": ("tcp",), "deadline_s": WAIT_S}
    return PoolNodes(
        [PoolClient(home.address, SPACE, deadline_s=WAIT_S)],
        directory=directory,
        connect=lambda address: PoolClient(address, SPACE, **far),  # type: ignore[arg-type]
    )


async def put(node: PoolNode, hashes: list[bytes], value: int) -> None:
    client = PoolClient(node.address, SPACE, deadline_s=WAIT_S)
    await client.start()
    region = client.allocate(len(hashes) * BLOCK)
    region.buffer[:] = value
    assert (await client.put(hashes, whole(region, BLOCK), np.arange(len(hashes)) * BLOCK)).stored == len(hashes)
    await client.close()


async def test_blocks_of_other_nodes_are_found_and_got(directories: Callable[[], Directory]) -> None:
    views = [directories() for _ in range(3)]
    nodes = [make_node(view) for view in views[:2]]
    for node in nodes:
        await node.start()
    pool = make_pool(nodes[0], views[2])
    await pool.start()
    region, hashes = pool.allocate(3 * BLOCK), [b"a", b"b", b"c"]
    try:

        async def found(wanted: int) -> bool:
            return (await pool.get(hashes, whole(region, BLOCK), np.arange(3) * BLOCK)).num_prefix == wanted

        await put(nodes[1], hashes, 7)
        await eventually(lambda: found(3))
        assert (region.buffer == 7).all()
        await put(nodes[0], hashes[:1], 9)
        assert await pool.remove([b"b"]) == 1

        async def from_home() -> bool:
            return await found(1) and bool((region.buffer[:BLOCK] == 9).all())

        await eventually(from_home)
        await put(nodes[1], [b"b"], 7)
        await eventually(lambda: found(3))
        await nodes[1].close()
        # A node that says so is gone at once; what the directory still named would be a miss.
        assert await found(1)
    finally:
        await pool.close()
        for node in nodes:
            await node.close()


async def test_a_node_that_falls_silent_vanishes_within_its_lease(directories: Callable[[], Directory]) -> None:
    view, watcher = directories(), directories()
    node = make_node(view, node_ttl_s=0.6)
    await node.start()
    try:
        await put(node, [b"a"], 1)

        async def holders(count: int) -> bool:
            return len((await watcher.lookup(SPACE, [b"a"]))[0]) == count

        await eventually(lambda: holders(1))
        assert node._cluster is not None and node._cluster.reporter._task is not None
        node._cluster.reporter._task.cancel()
        await eventually(lambda: holders(0))
    finally:
        await node.close()


async def test_what_a_dead_node_still_seems_to_hold_is_got_from_home() -> None:
    directory = EmbeddedDirectory()
    home = make_node(directory)
    await home.start()
    pool = make_pool(home, directory)
    await pool.start()
    try:
        await put(home, [b"a"], 5)
        await directory.report(Incarnation(7), [(SPACE, b"a"), (SPACE, b"b")], [])
        await directory.join(Incarnation(7), "tcp://127.0.0.1:9", 60.0)
        region = pool.allocate(2 * BLOCK)
        result = await pool.get([b"a", b"b"], whole(region, BLOCK), [0, BLOCK])
        assert (result.found, result.transport) == ([True, False], "shm")
        assert (region.buffer[:BLOCK] == 5).all()
    finally:
        await pool.close()
        await home.close()


@pytest.mark.redis
async def test_a_redis_that_is_killed_and_comes_back_empty_is_rebuilt(tmp_path: Path) -> None:
    pytest.importorskip("redis")
    from kvferry.pool.directory_redis import RedisDirectory

    server = RedisServer(tmp_path)
    server.start()
    views = [RedisDirectory(server.url, timeout_s=1.0) for _ in range(3)]
    nodes = [make_node(view) for view in views[:2]]
    for node in nodes:
        await node.start()
    pool = make_pool(nodes[0], views[2])
    await pool.start()
    region = pool.allocate(BLOCK)

    async def got(block_hash: bytes, **_: Any) -> bool:
        result = await pool.get([block_hash], whole(region, BLOCK), [0])
        return result.found == [True]

    try:
        await put(nodes[0], [b"here"], 1)
        await put(nodes[1], [b"there"], 2)
        await eventually(lambda: got(b"there"))
        server.kill()
        assert await got(b"here")
        assert not await got(b"there")
        with pytest.raises(TransportError, match="did not answer"):
            await views[2].lookup(SPACE, [b"there"])
        await put(nodes[1], [b"later"], 3)
        server.start()
        await eventually(lambda: got(b"there"))
        assert (region.buffer == 2).all()
        assert await got(b"later")
        assert (region.buffer == 3).all()
    finally:
        await pool.close()
        for node in nodes:
            await node.close()
        for view in views:
            await view.close()
        server.kill()
