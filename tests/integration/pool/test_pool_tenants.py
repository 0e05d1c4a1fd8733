"""Tenants of one pool: equal prompts never meet, and each keeps to its quota."""

from __future__ import annotations

import numpy as np
import pytest

from kvferry.hashing import block_hashes, root_hash
from kvferry.pool import BlockSpace, PoolNode, PoolSettings
from pool_processes import BLOCK, SPACE, client_of, get, name, put

OTHER = BlockSpace(SPACE.fingerprint, "tenant-b")


def make_node(**more: object) -> PoolNode:
    return PoolNode(settings=PoolSettings(arena_bytes=33 * BLOCK, slab_bytes=BLOCK, **more))  # type: ignore[arg-type]


def test_equal_prompts_of_two_tenants_have_no_hash_in_common() -> None:
    prompt = list(range(256))
    hashes = {
        block_hash
        for fingerprint in (b"m" * 32, b"n" * 32)
        for namespace in ("", "a", "b")
        for block_hash in block_hashes(prompt, 16, root_hash(fingerprint, namespace))
    }
    assert len(hashes) == 6 * 16


async def test_equal_prompts_with_equal_hashes_never_meet() -> None:
    node = make_node()
    await node.start()
    try:
        async with client_of(node.address) as a, client_of(node.address, OTHER) as b:
            await put(a, [1, 2])
            assert (await get(b, [1, 2])).found == [False, False]
            assert await b.exists([name(1)]) == [None]
            assert await b.pin([name(1)]) == 0
            assert await b.remove([name(1)]) == 0
            assert await b.prefetch([name(1)]) == 0
            # Stored though the other tenant has blocks of these hashes: nothing shows that it has.
            assert await put(b, [1, 2]) == (2, 0, 0, None)
            # `get` compares each byte with the tenant's own.
            assert (await get(a, [1, 2])).found == [True, True]
            assert (await get(b, [1, 2])).found == [True, True]
            assert await b.clear() == 2
            assert (await get(a, [1, 2])).found == [True, True]
            assert [b.block_hash for b in await b.served_most(10)] == []
    finally:
        await node.close()
        node.check_integrity()


@pytest.mark.parametrize("eviction", ["lru", "hazard"])
async def test_a_tenant_at_its_quota_gives_up_its_own_blocks_only(eviction: str) -> None:
    node = make_node(quotas={"tenant-b": 8 * BLOCK}, eviction=eviction)
    await node.start()
    try:
        async with client_of(node.address) as a, client_of(node.address, OTHER) as b:
            await put(a, list(range(20)))
            for first in range(0, 60, 4):
                await put(b, list(range(first, first + 4)))
                stat = node.stat()
                used = {n.namespace: n.host_bytes for n in stat.namespaces}
                assert used["tenant-b"] <= 8 * BLOCK
            assert (await get(a, list(range(20)))).found == [True] * 20
            assert sum((await get(b, list(range(60)))).found) == 8
            # Pinned, it has nothing to give up: refused, and the other's stay.
            assert await b.pin([name(n) for n in range(60)]) == 8
            assert (await put(b, [77])).refused == 1
            assert (await get(a, list(range(20)))).found == [True] * 20
    finally:
        await node.close()
        node.check_integrity()


async def test_the_quota_holds_over_all_models_of_a_tenant_and_over_copies() -> None:
    node = make_node(quotas={"tenant-b": 4 * BLOCK})
    await node.start()
    models = [BlockSpace(bytes([number]) * 32, "tenant-b") for number in range(3)]
    try:
        for space in models:
            async with client_of(node.address, space) as client:
                await put(client, [1, 2, 3])
        assert sum(s.host_bytes for s in node.stat().spaces) == 4 * BLOCK
        async with client_of(node.address, models[2]) as client:
            region = client.allocate(3 * BLOCK)
            region.buffer[:] = 0
            assert (await get(client, [1, 2, 3])).found == [True] * 3
            assert np.count_nonzero(region.buffer) == 0
    finally:
        await node.close()
