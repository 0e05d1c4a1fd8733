"""A disk that fails under a node: blocks stay in memory, nothing wrong comes back, and the errors are counted."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvferry.errors import PoolExhausted
from kvferry.pool import BlockSpace, PoolClient, PoolNode, PoolSettings, whole
from kvferry.pool.disk import DiskTier

BLOCK = 8192
SPACE = BlockSpace(b"m" * 32, "tenant-a")


def settings(path: Path, **more: Any) -> PoolSettings:
    asked = {"arena_bytes": 64 * BLOCK, "slab_bytes": BLOCK, "disk_path": str(path), "disk_bytes": 64 * BLOCK}
    return PoolSettings(**{**asked, **more})


@pytest.mark.parametrize("failing", ["write", "read"])
async def test_a_failing_disk_costs_misses_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC if failing == "write" else errno.EIO, "the disk failed")

    names = [bytes([number]) for number in range(4)]
    for turn in range(2):
        node = PoolNode(settings=settings(tmp_path))
        await node.start()
        client = PoolClient(node.address, SPACE)
        await client.start()
        try:
            region = client.allocate(4 * BLOCK)
            offsets = np.arange(4) * BLOCK
            if turn == 0:
                if failing == "write":
                    monkeypatch.setattr(DiskTier, "write", fail)
                region.buffer[:] = 5
                assert (await client.put(names, whole(region, BLOCK), offsets)).stored == 4
                region.buffer[:] = 0
                assert (await client.get(names, whole(region, BLOCK), offsets)).found == [True] * 4
                assert (region.buffer == 5).all()
            else:
                if failing == "read":
                    monkeypatch.setattr(DiskTier, "read", fail)
                assert (await client.get(names, whole(region, BLOCK), offsets, prefix=False)).found == [False] * 4
            await asyncio.sleep(0.1)
            node.check_integrity()
        finally:
            await client.close()
            await node.close()
        wanted = {("write", 0): "disk_errors", ("read", 1): "disk_broken"}.get((failing, turn))
        assert wanted is None or node.counts[wanted] == 4


async def test_a_disk_without_room_is_told_before_the_node_serves(tmp_path: Path) -> None:
    with pytest.raises(PoolExhausted, match="no room for a disk tier"):
        PoolNode(settings=settings(tmp_path, disk_bytes=1 << 50))
