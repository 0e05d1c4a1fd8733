"""A node and its clients: in one process over shared memory or TCP, with and without a disk."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from kvferry.errors import RegistrationError
from kvferry.pool import BlockPart, BlockSpace, PoolClient, PoolNode, PoolSettings, Tier, pulling, whole
from kvferry.pool.messages import GetBlocks, PutBlocks, Release
from kvferry.transport.base import Region
from pool_processes import WAIT_S, eventually

BLOCK = 16384
SPACE = BlockSpace(b"m" * 32, "tenant-a")


@contextlib.asynccontextmanager
async def running(node: PoolNode, *clients: PoolClient) -> AsyncIterator[None]:
    await node.start()
    try:
        for client in clients:
            await client.start()
        yield
    finally:
        for client in clients:
            await client.close()
        await node.close()
        node.check_integrity()


@contextlib.asynccontextmanager
async def pair(
    *, num_slabs: int = 64, transports: tuple[str, ...] = ("shm", "tcp"), space: BlockSpace = SPACE, **settings: Any
) -> AsyncIterator[tuple[PoolNode, PoolClient]]:
    asked = {
        "arena_bytes": num_slabs * BLOCK + 8 * 4096,
        "slab_bytes": BLOCK,
        "max_leases": 4096,
        "lease_ttl_s": WAIT_S,
    }
    node = PoolNode(settings=PoolSettings(**{**asked, **settings}), transports=transports)
    await node.start()
    client = PoolClient(node.address, space, transports=transports, deadline_s=WAIT_S)
    await client.start()
    try:
        yield node, client
    finally:
        await client.close()
        await node.close()
        node.check_integrity()


def names(*numbers: int) -> list[bytes]:
    return [number.to_bytes(32, "big") for number in numbers]


def filled(client: PoolClient, *numbers: int) -> tuple[Region, np.ndarray]:
    """Blocks whose bytes are their numbers' own, and where they lie."""
    region = client.allocate(len(numbers) * BLOCK)
    for row, number in zip(region.buffer.reshape(-1, BLOCK), numbers, strict=True):
        row[:] = np.random.default_rng(number).integers(0, 256, BLOCK, dtype=np.uint8)
    return region, np.arange(len(numbers)) * BLOCK


async def put(client: PoolClient, *numbers: int) -> Any:
    region, offsets = filled(client, *numbers)
    return await client.put(names(*numbers), whole(region, BLOCK), offsets, length=len(numbers))


async def get(client: PoolClient, *numbers: int, prefix: bool = True) -> list[bool]:
    """What is found; and found blocks must be the right ones."""
    region = client.allocate(len(numbers) * BLOCK)
    result = await client.get(names(*numbers), whole(region, BLOCK), np.arange(len(numbers)) * BLOCK, prefix=prefix)
    right = filled(client, *numbers)[0].buffer.reshape(-1, BLOCK)
    for row, (seen, expected) in enumerate(zip(region.buffer.reshape(-1, BLOCK), right, strict=True)):
        if result.found[row]:
            assert (seen == expected).all(), f"block {numbers[row]} is another's"
    return result.found


@pytest.mark.parametrize("transports", [("shm", "tcp"), ("tcp",)])
async def test_what_was_put_is_got_and_nothing_else(transports: tuple[str, ...]) -> None:
    async with pair(transports=transports) as (node, client):
        assert (await put(client, 1, 2, 3)).stored == 3
        again = await put(client, 2, 3, 4)
        assert (again.stored, again.duplicates) == (1, 2)
        assert await client.exists(names(1, 4, 5)) == [Tier.HOST, Tier.HOST, None]
        assert await get(client, 1, 2, 3, 4) == [True] * 4
        assert await get(client, 1, 9, 2) == [True, False, False]
        assert await get(client, 1, 9, 2, prefix=False) == [True, False, True]
        assert await get(client, 8) == [False]
        await until(lambda: node.stat().leases == 0)
        stat = await client.stat()
        assert (stat.leases, stat.counts["put_stored"], stat.counts["get_host"]) == (0, 4, 7)
        assert not client.failures


async def test_two_tenants_with_equal_hashes_never_meet() -> None:
    async with pair() as (node, client):
        other = PoolClient(node.address, BlockSpace(SPACE.fingerprint, "tenant-b"))
        await other.start()
        try:
            await put(client, 1)
            assert await get(other, 1) == [False]
            region, offsets = filled(other, 77)
            await other.put(names(1), whole(region, BLOCK), offsets)
            assert await get(client, 1) == [True]
            assert await other.clear() == 1
            assert await get(client, 1) == [True]
        finally:
            await other.close()


async def test_a_working_set_beyond_the_arena_gives_misses_and_right_bytes() -> None:
    async with pair(num_slabs=16, eviction="hazard") as (node, client):
        rng = np.random.default_rng(3)
        hits = 0
        for _ in range(120):
            first = int(rng.integers(0, 10)) * 5
            prompt = range(first, first + 5)
            found = await get(client, *prompt)
            hits += sum(found)
            await put(client, *prompt)
            node.check_integrity()
        assert 50 < hits < 550
        assert (await client.stat()).counts["evictions"] > 50


async def test_pins_keep_blocks_until_the_client_is_gone() -> None:
    async with pair(num_slabs=4, eviction="lru") as (node, client):
        other = PoolClient(node.address, SPACE)
        await other.start()
        await put(client, 1, 2)
        assert await other.pin(names(1, 2, 3)) == 2
        assert await client.unpin(names(1)) == 0
        await put(client, 10, 11, 12, 13)
        assert await get(client, 1, 2) == [True, True]
        pins = node._pins
        assert pins._by_owner
        await other.close()
        await until(lambda: not pins._by_owner)
        await put(client, 20, 21, 22, 23)
        assert await get(client, 1) == [False]


async def test_disk_serves_what_left_memory_and_what_a_restart_lost(tmp_path: Path) -> None:
    disk = {"disk_path": str(tmp_path / "tier"), "disk_bytes": 64 * BLOCK, "num_slabs": 4, "eviction": "lru"}
    async with pair(**disk) as (node, client):
        for number in range(12):
            await put(client, number)
            await settled(client)
        assert (await client.exists(names(0, 11))) == [Tier.DISK, Tier.HOST]
        assert await get(client, 0, 1, 2) == [True] * 3
        assert await client.remove(names(5)) == 1
        node.check_integrity()
    async with pair(**disk) as (node, client):
        assert (await client.exists(names(0, 11, 5))) == [Tier.DISK, Tier.DISK, None]
        for number in (0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11):
            assert await get(client, number) == [True]
        assert (await client.stat()).counts["get_disk"] == 11
        assert await client.clear() == 11
    async with pair(**disk) as (node, client):
        assert await client.exists(names(*range(12))) == [None] * 12


async def test_a_flipped_bit_on_disk_is_a_miss_and_counted(tmp_path: Path) -> None:
    disk = {"disk_path": str(tmp_path), "disk_bytes": 8 * BLOCK, "num_slabs": 8}
    async with pair(**disk) as (_, client):
        await put(client, 1, 2)
        await settled(client)
    with (tmp_path / "blocks-0").open("r+b") as raw:
        raw.seek(100)
        byte = raw.read(1)
        raw.seek(100)
        raw.write(bytes([byte[0] ^ 1]))
    async with pair(**disk) as (_, client):
        found = await get(client, 1, 2, prefix=False)
        assert sorted(found) == [False, True]
        assert (await client.stat()).counts["disk_broken"] == 1
        assert await put(client, 1, 2)
        assert await get(client, 1, 2) == [True, True]


async def test_a_client_without_a_node_sees_misses_until_it_is_there() -> None:
    node = PoolNode(settings=PoolSettings(arena_bytes=8 * BLOCK, slab_bytes=BLOCK))
    client = PoolClient("tcp://127.0.0.1:9", SPACE, deadline_s=1.0)
    await client.start()
    try:
        assert await client.exists(names(1)) == [None]
        assert (await put(client, 1)).cause in ("peer_gone", "transport_error")
        assert await get(client, 1) == [False]
        assert sum(client.failures.values()) == 3
    finally:
        await client.close()
        await node.close()


async def test_a_node_with_another_secret_serves_nothing_and_that_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    node = PoolNode(settings=PoolSettings(arena_bytes=8 * BLOCK, slab_bytes=BLOCK), secret=b"the cluster's own secret")
    await node.start()
    client = PoolClient(node.address, SPACE, secret=b"somebody else's secret")
    await client.start()
    try:
        assert (await put(client, 1)).cause == "authentication_error"
        assert await get(client, 1) == [False]
        assert await client.exists(names(1)) == [None]
        assert await client.prefetch(names(1)) == 0
        assert client.failures == {"authentication_error": 1, "transport_error": 3}
        assert len([record for record in caplog.records if record.name == "kvferry.pool.client"]) == 1
    finally:
        await client.close()
        await node.close()


async def test_wrong_arguments_are_errors_not_misses() -> None:
    async with pair() as (_, client):
        region, offsets = filled(client, 1)
        with pytest.raises(RegistrationError, match="one place for each hash"):
            await client.put(names(1, 2), whole(region, BLOCK), offsets)
        with pytest.raises(RegistrationError, match="leave a region"):
            await client.put(names(1), whole(region, BLOCK), offsets + 1)
        with pytest.raises(RegistrationError, match="larger slabs"):
            big = client.allocate(2 * BLOCK)
            await client.put(names(1), whole(big, 2 * BLOCK), [0])
        with pytest.raises(RegistrationError, match="block hash of 0 bytes"):
            await client.get([b""], whole(region, BLOCK), offsets)


async def test_a_lease_that_ran_out_is_a_miss_and_frees_its_blocks() -> None:
    async with pair(lease_ttl_s=0.2) as (node, client):
        await put(client, 1)
        read = client._engine.read

        async def late(*args: Any, **kwargs: Any) -> Any:
            await asyncio.sleep(0.6)
            return await read(*args, **kwargs)

        client._engine.read = late  # type: ignore[method-assign]
        region = client.allocate(BLOCK)
        result = await client.get(names(1), whole(region, BLOCK), [0])
        assert (result.found, result.cause) == ([False], "lease_expired")
        assert node.counts["leases_expired"] == 1


async def test_a_get_that_is_given_up_before_it_is_served_leaves_no_lease() -> None:
    async with pair() as (node, client):
        region, places = filled(client, 1)
        assert (await client.put(names(1), whole(region, BLOCK), places)).stored == 1
        peer = await client._connect(time.monotonic() + WAIT_S)
        # Both are read before the get is served, so that the release finds no lease yet.
        peer.send(msgspec.msgpack.encode(GetBlocks(7777, SPACE, names(1), BLOCK, True)))
        peer.send(msgspec.msgpack.encode(Release(7777)))
        assert (await client.get(names(1), whole(region, BLOCK), places)).found == [True]
        assert (await client.stat()).leases == 0
        assert not node._wanted


async def test_a_put_that_was_given_up_is_not_stored() -> None:
    async with pair() as (node, client):
        read = node._engine.read_sync

        def late(*args: Any, **kwargs: Any) -> Any:
            time.sleep(0.6)
            return read(*args, **kwargs)

        await client.exists([])
        node._engine.read_sync = late  # type: ignore[method-assign]
        region, offsets = filled(client, 1)
        client.deadline_s = 0.3
        assert (await client.put(names(1), whole(region, BLOCK), offsets)).cause == "transfer_timeout"
        region.buffer[:] = 0
        # The client leaves a node alone that did not answer in time, so the node itself is asked.
        await until(lambda: node.counts["failed_lease_expired"])
        assert node.counts["failed_lease_expired"] == 1
        assert node._index.find(SPACE, names(1)) == [None]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"places": [-1]}, None),
        ({"places": [1 << 63]}, None),
        ({"places": [1 << 40]}, "registration_error"),
        # 2**64 in all, which int64 would take for 0.
        ({"places": [1 << 32], "stride": 1 << 32}, "registration_error"),
        ({"region": 999}, "registration_error"),
        ({"words_region": 999}, "registration_error"),
        ({"nbytes": 0}, "registration_error"),
        ({"places": [0, 0]}, "registration_error"),
        ({"parts": []}, "registration_error"),
        ({"parts": [BlockPart(1, 0, 1, 1)] * 4097}, None),
        ({"word": 5}, "lease_expired"),
        ({"space": BlockSpace(b"short")}, "registration_error"),
    ],
)
async def test_hostile_puts_store_nothing_and_break_nothing(change: dict[str, Any], said: str | None) -> None:
    async with pair() as (node, client):
        region, _ = filled(client, 1)
        assert await client.exists(names(1)) == [None]
        assert client._peer is not None
        piece = {"region": region.region_id, "base": 0, "stride": 1, "nbytes": BLOCK}
        part = BlockPart(**{name: change.get(name, value) for name, value in piece.items()})
        right = {"id": 1, "space": SPACE, "hashes": names(1), "parts": [part], "first": 0, "length": 1}
        right |= {"places": [0], "words_region": client._words_region.region_id, "word_offset": 0, "word": 0}
        request = PutBlocks(**{**right, **{name: value for name, value in change.items() if name not in piece}})
        client._peer.send(msgspec.msgpack.encode(request))
        peer = client._peer
        await until(lambda: node.counts[f"failed_{said}"] or peer.lost is not None)
        assert (client._peer.lost is not None) == (said is None)
        assert said is None or node.counts[f"failed_{said}"] == 1
        assert await client.exists(names(1)) == [None]
        assert node.stat().free_slabs == node.stat().num_slabs


async def settled(client: PoolClient) -> None:
    """Return when the node's disk has nothing to write."""

    async def is_settled() -> bool:
        counts = (await client.stat()).counts
        return counts.get("disk_written", 0) + counts.get("disk_skipped", 0) >= counts["put_stored"]

    await eventually(is_settled)


async def until(condition: Callable[[], object]) -> None:
    async def holds() -> bool:
        return bool(condition())

    await eventually(holds)


async def test_what_comes_over_a_network_is_whole_or_a_miss() -> None:
    async with pair(transports=("tcp",)) as (node, client):
        await put(client, 1, 2, 3, 4, 5)
        assert await get(client, 1, 2, 3, 4, 5) == [True] * 5
        # In the node's memory, behind the back of its digests.
        (entry,) = node._index.find(SPACE, names(5))
        assert entry is not None and entry.slab is not None
        node._arena.view(entry.slab, BLOCK)[77] ^= 1
        assert await get(client, 1, 2, 3, 4, 5) == [False] * 5
        assert client.failures == {"integrity_error": 1}
        assert await get(client, 1, 2, 3, 4) == [True] * 4


@pytest.mark.parametrize("transports", [("shm", "tcp"), ("tcp",)])
async def test_a_put_of_several_steps_is_whole(transports: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulling, "STEP_BYTES", 2 * BLOCK)
    numbers = range(1, 40)
    async with pair(transports=transports) as (node, client):
        assert (await put(client, *numbers)).stored == 39
        far = PoolClient(node.address, SPACE, transports=("tcp",))
        await far.start()
        # Over TCP, where the digests are compared.
        assert await get(far, *numbers) == [True] * 39
        await far.close()
