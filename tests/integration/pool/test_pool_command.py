"""The node as a process of its own, and the commands that look into it."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from kvferry.cli import main
from kvferry.observe import LISTENING
from kvferry.pool import BlockSpace, PoolClient, whole

BLOCK = 8192
SPACE = BlockSpace(b"m" * 32, "tenant-a")


class NodeProcess:
    """`kvferry node` with a small arena and a disk tier."""

    def __init__(self, directory: Path) -> None:
        flags = ["--arena-bytes", "1MiB", "--slab-bytes", "8KiB", "--disk-path", str(directory), "--disk-bytes", "1MiB"]
        command = [sys.executable, "-m", "kvferry", "node", *flags, "--log-level", "warning"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith(LISTENING), line
        self.address = line.removeprefix(LISTENING).strip()

    def __enter__(self) -> NodeProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.stdout is not None
        try:
            assert self.process.wait(60) == 0
        finally:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()


async def put(address: str, number: int) -> None:
    client = PoolClient(address, SPACE, deadline_s=60.0)
    await client.start()
    try:
        region = client.allocate(BLOCK)
        region.buffer[:] = number
        assert (await client.put([bytes([number])], whole(region, BLOCK), [0])).stored == 1
    finally:
        await client.close()


async def test_the_cache_survives_its_engines_and_the_node_itself(tmp_path: Path) -> None:
    with NodeProcess(tmp_path) as node:
        await put(node.address, 1)
        await put(node.address, 2)
    with NodeProcess(tmp_path) as node:
        client = PoolClient(node.address, SPACE, deadline_s=60.0)
        await client.start()
        try:
            region = client.allocate(2 * BLOCK)
            result = await client.get([b"\1", b"\2"], whole(region, BLOCK), np.array([0, BLOCK]))
        finally:
            await client.close()
    assert (result.found, result.from_disk, result.transport) == ([True, True], 2, "shm")
    assert (region.buffer.reshape(2, BLOCK) == [[1], [2]]).all()


def test_the_commands_tell_and_clear(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with NodeProcess(tmp_path) as node:
        asyncio.run(put(node.address, 1))
        assert main(["pool", "stat", "--node", node.address]) == 0
        assert "1 blocks: 1 stored" in capsys.readouterr().out
        assert main(["pool", "ls", "--node", node.address, "--json"]) == 0
        space = msgspec.json.decode(capsys.readouterr().out)
        assert (space["namespace"], space["blocks"]) == ("tenant-a", 1)
        assert main(["pool", "clear", "--node", node.address, "--only", "tenant-b"]) == 0
        assert main(["pool", "clear", "--node", node.address, "--only", "tenant-a"]) == 0
        assert capsys.readouterr().out == "0 blocks of 0 spaces removed\n1 blocks of 1 spaces removed\n"
    assert main(["pool", "stat", "--node", node.address]) == 2
    assert "cannot connect" in capsys.readouterr().err


def test_a_wrong_quota_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["node", "--quotas", "team-a=lots"]) == 2
    assert "NAMESPACE=SIZE" in capsys.readouterr().err
    assert main(["node", "--eviction", "fifo"]) == 2
    assert "choose one of lru" in capsys.readouterr().err
