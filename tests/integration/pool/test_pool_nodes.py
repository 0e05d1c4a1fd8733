"""Several nodes: the longest prefix wins, and a node that is gone is an empty one."""

from __future__ import annotations

import numpy as np
import pytest

from kvferry.errors import ConfigError
from kvferry.pool import BlockSpace, PoolClient, PoolNode, PoolNodes, PoolSettings, Tier, whole

BLOCK = 8192
SPACE = BlockSpace(b"m" * 32, "tenant-a")


def node() -> PoolNode:
    return PoolNode(settings=PoolSettings(arena_bytes=64 * BLOCK, slab_bytes=BLOCK))


async def test_the_longest_prefix_of_all_nodes_is_got() -> None:
    here, there = node(), node()
    await here.start()
    await there.start()
    # The far node is reached over TCP, as one of another host.
    near, far = PoolClient(here.address, SPACE), PoolClient(there.address, SPACE, transports=("tcp",))
    pool = PoolNodes([near, far])
    await pool.start()
    try:
        offsets, hashes = np.arange(4) * BLOCK, [b"a", b"b", b"c", b"d"]
        theirs = far.allocate(4 * BLOCK)
        theirs.buffer.reshape(4, BLOCK)[:] = np.arange(4)[:, None] + 1
        await far.put(hashes, whole(theirs, BLOCK), offsets)
        region = pool.allocate(4 * BLOCK)
        region.buffer[:] = 9
        assert (await pool.put(hashes[:2], whole(region, BLOCK), offsets[:2])).stored == 2
        assert await pool.exists([*hashes, b"e"]) == [Tier.HOST] * 4 + [None]
        result = await pool.get(hashes, whole(region, BLOCK), offsets)
        assert (result.found, result.transport) == ([True] * 4, "tcp")
        assert (region.buffer.reshape(4, BLOCK) == np.arange(4)[:, None] + 1).all()
        result = await pool.get(hashes[:2], whole(region, BLOCK), offsets[:2])
        assert result.transport == "shm"
        assert (region.buffer[: 2 * BLOCK] == 9).all()
        await there.close()
        result = await pool.get(hashes, whole(region, BLOCK), offsets)
        assert result.found == [True, True, False, False]
        assert (await pool.get([b"z"], whole(region, BLOCK), offsets[:1])).found == [False]
    finally:
        await pool.close()
        await here.close()
        await there.close()


def test_clients_of_several_spaces_are_refused() -> None:
    with pytest.raises(ConfigError, match="one client for each node"):
        PoolNodes([])
