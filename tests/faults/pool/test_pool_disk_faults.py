"""A disk that is really full, and bits that flip on it and on the wire: misses with a cause, never wrong bytes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvferry.pool import PoolClient, PoolNode, PoolSettings, Tier
from kvferry.testing.faults import FaultyLink
from pool_processes import BLOCK, SPACE, NodeProcess, client_of, content, eventually, get, name, put


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)]).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def disk_flags(path: Path, size: str = "1MiB") -> list[str]:
    return ["--arena-bytes", "2MiB", "--disk-path", str(path), "--disk-bytes", size]


def test_a_disk_that_is_too_small_is_told_before_the_node_serves(small_disk: Path) -> None:
    command = [sys.executable, "-m", "kvferry", "node", "--slab-bytes", "64KiB", *disk_flags(small_disk, "8MiB")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0
    assert "no room for a disk tier of 8388608 bytes" in ended.stderr
    assert ended.stdout == ""


async def test_a_disk_that_fills_up_later_costs_nothing_that_was_promised(small_disk: Path) -> None:
    # Less room in memory than on disk, so that some blocks lie on disk alone.
    with NodeProcess(*disk_flags(small_disk), "--arena-bytes", "512KiB") as node:
        # Others fill what is left: the blocks' room is the node's already.
        with contextlib.suppress(OSError), (small_disk / "others").open("wb") as others:
            while True:
                others.write(bytes(4096))
                others.flush()
        async with client_of(node.address) as client:
            for first in range(0, 60, 5):
                await put(client, list(range(first, first + 5)))

            async def written() -> bool:
                stat = await client.stat()
                return stat.blocks_on_disk == stat.disk_slots and not stat.disk_queued_bytes

            await eventually(written)
            tiers = await client.exists([name(number) for number in range(60)])
            on_disk = [number for number, tier in enumerate(tiers) if tier is Tier.DISK]
            assert on_disk
            assert all([(await get(client, [number])).found == [True] for number in on_disk])
            await put(client, [58, 59])
            # Which removals it heard of can't be noted there any more: counted, and the removal holds.
            assert await client.remove([name(59)]) == 1
            assert (await client.stat()).counts["disk_errors"] >= 1
            assert (await get(client, [58, 59])).found == [True, False]


@pytest.mark.parametrize("where", ["bytes", "header"])
async def test_bits_that_flip_on_disk_are_misses_after_a_restart(tmp_path: Path, where: str) -> None:
    numbers = list(range(8))
    with NodeProcess(*disk_flags(tmp_path)) as node:
        async with client_of(node.address) as client:
            await put(client, numbers)

            async def written() -> bool:
                return (await client.stat()).blocks_on_disk == len(numbers)

            await eventually(written)
        node.kill()
    rng = np.random.default_rng(7)
    for slot in (1, 4):
        # The first slots lie at the beginning of a file each; headers lie in one file, behind the tier's own.
        file, first, size = (
            (tmp_path / f"blocks-{slot}", 0, BLOCK)
            if where == "bytes"
            else (tmp_path / "headers", 512 * (slot + 1), 60)
        )
        with file.open("r+b") as raw:
            at = first + int(rng.integers(0, size))
            raw.seek(at)
            byte = raw.read(1)[0]
            raw.seek(at)
            raw.write(bytes([byte ^ (1 << int(rng.integers(0, 8)))]))
    with NodeProcess(*disk_flags(tmp_path)) as node:
        async with client_of(node.address) as client:
            assert (await get(client, numbers)).found.count(True) == len(numbers) - 2
            counts = (await client.stat()).counts
            assert counts["disk_broken"] == 2
            assert (await put(client, numbers)).stored == 2
            assert all((await get(client, numbers)).found)


async def test_a_torn_write_is_never_served(tmp_path: Path) -> None:
    """A node that is killed while it writes: each block is whole after its restart, or a miss."""
    path = tmp_path / "tier"
    for round_ in range(3):
        with NodeProcess(*disk_flags(path, "4MiB")) as node:
            async with client_of(node.address) as client:
                assert (await get(client, list(range(60)))).cause is None
                puts = [asyncio.create_task(put(client, list(range(n, n + 6)))) for n in range(0, 60, 6)]

                async def begun(wanted: int = 3 + 7 * round_) -> bool:
                    stat = await client.stat()
                    return stat.blocks_on_disk > wanted

                await eventually(begun)
                node.kill()
                await asyncio.gather(*puts)
    with NodeProcess(*disk_flags(path, "4MiB")) as node:
        async with client_of(node.address) as client:
            # `get` compares every byte of what is found.
            assert sum((await get(client, list(range(60)))).found) > 10


@pytest.mark.parametrize("way", ["put", "get"])
async def test_a_bit_that_flips_on_the_wire_is_noticed(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    node = PoolNode(settings=PoolSettings(arena_bytes=64 * BLOCK, slab_bytes=BLOCK))
    await node.start()
    client = PoolClient(node.address, SPACE, transports=("tcp",))
    await client.start()
    # The bytes of a put flow from the client's listener, those of a get from the node's.
    link = FaultyLink(client._engine.address if way == "put" else node.address)
    if way == "put":
        tcp: Any = client._engine._transports["tcp"]
        monkeypatch.setattr(tcp, "offer", lambda: {"address": link.address})
    far = PoolClient(link.address if way == "get" else node.address, SPACE, transports=("tcp",))
    await far.start()
    numbers = list(range(8))
    try:
        if way == "put":
            await client.exists([])
            link.corrupt_after(3 * BLOCK)
            result: Any = await put(client, numbers)
            assert result.stored == 0
        else:
            await put(client, numbers)
            await far.exists([])
            link.corrupt_after(3 * BLOCK)
            result = await get(far, numbers)
            assert result.found == [False] * 8
        assert result.cause in ("pool_error", "integrity_error", "transport_error", "peer_gone")

        async def right() -> bool:
            await put(client, numbers)
            return all((await get(far, numbers)).found)

        await eventually(right)
        assert (node._arena.view(node._index.find(SPACE, [name(3)])[0].slab, BLOCK) == content(3)).all()  # type: ignore
    finally:
        await far.close()
        await client.close()
        await node.close()
        await asyncio.to_thread(link.close)
        node.check_integrity()
