"""A node on another host, which a network namespace stands for: what is saved goes there over TCP, and comes back."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from kvferry.errors import ConfigError
from kvferry.layout import Fingerprint, KVLayout, LayerLayout
from kvferry.observe import LISTENING
from kvferry.pool import BlockSpace, PoolAttachment

SECRET = "a secret of this test alone"
BLOCK, NUM_BLOCKS = 65536, 8
LAYOUT = KVLayout(NUM_BLOCKS, 16, BLOCK, 2, (LayerLayout(0, 0, BLOCK),))
SPACE = BlockSpace.of(Fingerprint("model", "float32", 16, 1, 2, 8), LAYOUT, "tenant-a")
WAIT_S = 60.0


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def other_host() -> Iterator[tuple[list[str], str, str]]:
    """What runs a command there, its address, and this host's as seen from there."""
    number = os.getpid() % 250
    name, here, there = f"kvferry-{os.getpid()}", f"10.213.{number}.1", f"10.213.{number}.2"
    try:
        ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespace can be made here: {error}")
    try:
        device = f"kvf{os.getpid()}"
        ip("link", "add", device, "type", "veth", "peer", "name", "net0", "netns", name)
        ip("addr", "add", f"{here}/30", "dev", device)
        ip("link", "set", device, "up")
        ip("-n", name, "addr", "add", f"{there}/30", "dev", "net0")
        ip("-n", name, "link", "set", "net0", "up")
        ip("-n", name, "link", "set", "lo", "up")
        yield ["ip", "netns", "exec", name], there, here
    finally:
        ip("netns", "del", name)


@pytest.fixture
def node(other_host: tuple[list[str], str, str]) -> Iterator[str]:
    enter, there, _ = other_host
    command = [*enter, sys.executable, "-m", "kvferry", "node", "--listen", f"tcp://{there}:0", "--slab-bytes", "64KiB"]
    command += ["--arena-bytes", "4MiB", "--log-level", "warning"]
    environment = os.environ | {"KVFERRY_CLUSTER_SECRET": SECRET}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith(LISTENING), line
        yield line.removeprefix(LISTENING).strip()
    finally:
        process.terminate()
        try:
            process.wait(WAIT_S)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def attach(node: str, memory: np.ndarray, listen: str) -> PoolAttachment:
    # Over TCP only: memory could be shared with a namespace, but not with another host.
    return PoolAttachment(
        [node],
        SPACE,
        LAYOUT,
        {0: memory},
        secret=SECRET.encode(),
        transports=("tcp",),
        listen=listen,
        deadline_s=WAIT_S,
    )


@pytest.mark.parametrize("named", ["every interface", "one address"])
async def test_what_is_saved_is_fetched_by_a_node_elsewhere(
    node: str, other_host: tuple[list[str], str, str], named: str
) -> None:
    memory = np.random.default_rng(3).integers(0, 256, NUM_BLOCKS * BLOCK, dtype=np.uint8)
    wanted, names = memory.copy(), [bytes([i]) * 32 for i in range(4)]
    host = "0.0.0.0" if named == "every interface" else other_host[2]
    pool = await asyncio.to_thread(attach, node, memory, f"tcp://{host}:0")
    try:
        saved = await asyncio.to_thread(pool.save(names, [0, 1, 2, 3]).result, WAIT_S)
        assert (saved.stored, saved.cause) == (4, None)
        memory[:] = 0
        loaded = await asyncio.to_thread(pool.load(names, [4, 5, 6, 7]).result, WAIT_S)
        assert (loaded.num_blocks, loaded.transport, loaded.cause) == (4, "tcp", None)
        assert (memory[4 * BLOCK :] == wanted[: 4 * BLOCK]).all()
    finally:
        await asyncio.to_thread(pool.close)


def test_an_engine_that_listens_on_loopback_only_is_told_at_the_start(other_host: tuple[list[str], str, str]) -> None:
    memory = np.zeros(NUM_BLOCKS * BLOCK, dtype=np.uint8)
    with pytest.raises(ConfigError, match="on another host"):
        attach(f"tcp://{other_host[1]}:7400", memory, "tcp://127.0.0.1:0")
    # This host's own address is no other host.
    attach(f"tcp://{other_host[2]}:7400", memory, "tcp://127.0.0.1:0").close()
