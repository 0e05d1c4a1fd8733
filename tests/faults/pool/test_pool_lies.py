"""A node whose answers don't fit what was asked: a miss with a cause, and not a byte is touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvferry.pool import PoolClient, PoolNode, PoolSettings, whole
from kvferry.pool.messages import Leased, Tiers
from pool_processes import BLOCK, SPACE, eventually, name, put

Lie = Callable[[dict[str, Any]], None]
LIES: dict[str, Lie] = {
    "fewer places than blocks": lambda said: said.update(offsets=said["offsets"][:2]),
    "more places than blocks": lambda said: said.update(offsets=[*said["offsets"], 0]),
    "fewer digests than blocks": lambda said: said.update(digests=said["digests"][:2]),
    "an answer for more than was asked": lambda said: said.update(found=[*said["found"], False]),
    "an answer for less than was asked": lambda said: said.update(found=said["found"][:3]),
    "a place behind the arena": lambda said: said.update(offsets=[*said["offsets"][:3], 40 * BLOCK]),
    "a place that begins in the arena and ends behind it": lambda said: said.update(
        offsets=[*said["offsets"][:3], said["end"] - BLOCK // 2]
    ),
    "a place before the arena": lambda said: said.update(offsets=[-BLOCK, *said["offsets"][1:]]),
}


@pytest.mark.parametrize("transports", [("shm", "tcp"), ("tcp",)])
@pytest.mark.parametrize("lie", LIES)
async def test_a_lease_that_does_not_fit_is_a_miss(
    monkeypatch: pytest.MonkeyPatch, lie: str, transports: tuple[str, ...]
) -> None:
    node = PoolNode(settings=PoolSettings(arena_bytes=40 * BLOCK, slab_bytes=BLOCK))
    await node.start()
    client = PoolClient(node.address, SPACE, transports=transports)
    await client.start()

    def lying(**said: Any) -> Leased:
        said["end"] = node._arena.region.nbytes
        LIES[lie](said)
        del said["end"]
        return Leased(**said)

    try:
        await put(client, [1, 2, 3, 4])
        monkeypatch.setattr("kvferry.pool.gets.Leased", lying)
        region = client.allocate(4 * BLOCK)
        region.buffer[:] = 77
        result = await client.get([name(n) for n in (1, 2, 3, 4)], whole(region, BLOCK), np.arange(4) * BLOCK)
        assert (result.found, result.cause) == ([False] * 4, "pool_error")
        assert (region.buffer == 77).all()

        async def no_leases() -> bool:
            return node.stat().leases == 0

        await eventually(no_leases)
    finally:
        await client.close()
        await node.close()
        node.check_integrity()


async def test_a_lookup_that_is_answered_for_other_blocks_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    node = PoolNode(settings=PoolSettings(arena_bytes=40 * BLOCK, slab_bytes=BLOCK))
    await node.start()
    client = PoolClient(node.address, SPACE)
    await client.start()
    try:
        await put(client, [1, 2])
        monkeypatch.setattr("kvferry.pool.node.Tiers", lambda number, tiers: Tiers(number, [*tiers, tiers[0]]))
        assert await client.exists([name(1), name(2)]) == [None, None]
        assert client.failures == {"pool_error": 1}
    finally:
        await client.close()
        await node.close()
