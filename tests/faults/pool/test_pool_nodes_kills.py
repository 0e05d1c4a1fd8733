"""Nodes as processes, and a real Redis, that are killed or stopped in the middle of puts, gets, drains and removals."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from kvferry.errors import KVError
from kvferry.pool import BlockSpace, PoolClient, PoolNodes
from kvferry.pool.parts import whole
from pool_processes import (
    BLOCK,
    SPACE,
    WAIT_S,
    NodeProcess,
    RedisServer,
    client_of,
    content,
    eventually,
    fixed_port,
    get,
    name,
    put,
    stop,
)
from pool_processes import redis_server as running_redis

pytest.importorskip("redis")
from kvferry.pool.directory_redis import RedisDirectory

pytestmark = pytest.mark.redis

NUM_BLOCKS = 12
OTHER = BlockSpace(SPACE.fingerprint, "tenant-b")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path) as server:
        yield server


def start(server: RedisServer, *flags: str) -> NodeProcess:
    return NodeProcess("--arena-bytes", "4MiB", "--directory", server.url, *flags)


def start_drain(address: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "kvferry", "pool", "drain", "--node", address, "--deadline", "30s"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


class Engine:
    """Puts and gets random prompts of one tenant through all nodes, and looks at every byte."""

    def __init__(self, pool: PoolNodes, space: BlockSpace, seed: int) -> None:
        self.pool, self.space, self.rng = pool, space, random.Random(seed)
        self.region = pool.allocate(NUM_BLOCKS * BLOCK)
        self.hits = self.far_hits = self.puts = 0

    async def run(self, stop: asyncio.Event) -> None:
        rows = self.region.buffer.reshape(-1, BLOCK)
        while not stop.is_set():
            first = self.rng.randrange(NUM_BLOCKS * 2)
            numbers = list(range(first, first + self.rng.randrange(1, NUM_BLOCKS)))
            hashes, places = [name(n) for n in numbers], np.arange(len(numbers)) * BLOCK
            result = await self.pool.get(hashes, whole(self.region, BLOCK), places)
            for row, number, found in zip(rows, numbers, result.found, strict=False):
                assert not found or (row == content(number, self.space)).all(), f"block {number} has another's bytes"
            self.hits += sum(result.found)
            for row, number in zip(rows, numbers, strict=False):
                row[:] = content(number, self.space)
            self.puts += (await self.pool.put(hashes, whole(self.region, BLOCK), places)).stored
            await asyncio.sleep(0.002)


def pool_of(server: RedisServer, address: str, space: BlockSpace) -> tuple[PoolNodes, RedisDirectory]:
    directory = RedisDirectory(server.url, timeout_s=1.0)
    pool = PoolNodes(
        [PoolClient(address, space, deadline_s=5.0)],
        directory=directory,
        connect=lambda there: PoolClient(there, space, transports=("tcp",), deadline_s=5.0),
    )
    return pool, directory


async def until(engines: list[Engine], tasks: list[asyncio.Task[None]], hits: int = 60, puts: int = 0) -> None:
    """Wait until each engine had so many more hits and puts; one that failed ends the wait with its error."""
    before = [(engine.hits, engine.puts) for engine in engines]

    async def enough() -> bool:
        for task in tasks:
            if task.done():
                task.result()
        pairs = zip(engines, before, strict=True)
        return all(e.hits >= h + hits and e.puts >= p + puts for e, (h, p) in pairs)

    await eventually(enough)


async def test_redis_and_nodes_killed_under_two_tenants_with_equal_prompts(server: RedisServer, tmp_path: Path) -> None:
    with ExitStack() as stack:
        disks = [("--disk-path", str(tmp_path / str(n)), "--disk-bytes", "4MiB") for n in range(2)]
        homes = [f"tcp://127.0.0.1:{fixed_port()}" for _ in disks]
        nodes = [
            stack.enter_context(start(server, *disk, "--listen", at)) for disk, at in zip(disks, homes, strict=True)
        ]
        pools = [pool_of(server, node.address, space) for node in nodes for space in (SPACE, OTHER)]
        for pool, _ in pools:
            await pool.start()
        engines = [Engine(pool, pool.home.space, seed) for seed, (pool, _) in enumerate(pools)]
        stop = asyncio.Event()
        tasks = [asyncio.create_task(engine.run(stop)) for engine in engines]
        try:
            await until(engines, tasks)
            server.kill()
            # Each host's own node goes on serving; what the others have is out of sight.
            await until(engines, tasks)
            server.start()
            await until(engines, tasks)
            nodes[1].kill()
            await until(engines[:2], tasks)
            # It comes back where it was, with a new arena and its old disk.
            nodes[1] = stack.enter_context(start(server, *disks[1], "--listen", homes[1]))
            await until(engines, tasks)
            directory = pools[0][1]

            async def rebuilt() -> bool:
                holders = await directory.lookup(SPACE, [name(n) for n in range(NUM_BLOCKS)])
                return {node.address for node in nodes} <= set().union(*holders)

            await eventually(rebuilt)
        finally:
            stop.set()
            await asyncio.gather(*tasks, return_exceptions=True)
            for pool, view in pools:
                await pool.close()
                await view.close()
        for task in tasks:
            task.result()


async def test_a_redis_that_is_stopped_costs_a_deadline_not_the_pool(server: RedisServer) -> None:
    with start(server) as node:
        pool, directory = pool_of(server, node.address, SPACE)
        await pool.start()
        try:
            region = pool.allocate(2 * BLOCK)
            region.buffer[:BLOCK] = content(1)
            assert (await pool.put([name(1)], whole(region, BLOCK), [0])).stored == 1
            assert server.process is not None
            server.process.send_signal(signal.SIGSTOP)

            async def served() -> bool:
                async with asyncio.timeout(WAIT_S):
                    result = await pool.get([name(1), name(2)], whole(region, BLOCK), [0, BLOCK])
                return result.found == [True, False]

            await eventually(served)
            server.process.send_signal(signal.SIGCONT)
        finally:
            await pool.close()
            await directory.close()


async def test_a_killed_node_vanishes_from_the_directory_and_its_copies_serve(server: RedisServer) -> None:
    directory = RedisDirectory(server.url)
    try:
        with start(server) as one, start(server) as two:
            async with client_of(one.address) as here, client_of(two.address) as there:
                await put(here, [1, 2, 3])

                async def copied() -> bool:
                    await get(here, [1, 2], prefix=True)
                    return (await there.stat()).counts.get("replicas_taken", 0) >= 2

                await eventually(copied)
                one.kill()

                async def gone() -> bool:
                    return await directory.lookup(SPACE, [name(1), name(3)]) == [(two.address,), ()]

                await eventually(gone)
                assert (await get(there, [1, 2])).found == [True, True]
            assert list((await directory.nodes()).values()) == [two.address]
    finally:
        await directory.close()


@pytest.mark.parametrize("killed", ["command", "node", "target"])
async def test_a_drain_that_is_killed_loses_nothing(server: RedisServer, tmp_path: Path, killed: str) -> None:
    disk = ("--disk-path", str(tmp_path / "disk"), "--disk-bytes", "8MiB", "--max-copies", "1")
    numbers = list(range(40))
    with ExitStack() as stack:
        node = stack.enter_context(start(server, *disk))
        target = stack.enter_context(start(server, "--max-copies", "1"))
        async with client_of(node.address) as client:
            await put(client, numbers)
            await get(client, numbers)

            async def on_disk() -> bool:
                return (await client.stat()).blocks_on_disk == len(numbers)

            await eventually(on_disk)
            drain = start_drain(node.address)
            stack.callback(drain.wait)
            stack.callback(drain.kill)

            async def begun() -> bool:
                try:
                    return (await client.stat()).state != "serving"
                except KVError:
                    return True

            await eventually(begun)
            if killed == "command":
                drain.kill()

                async def ended() -> bool:
                    return (await client.stat()).state == "drained"

                await eventually(ended)
            elif killed == "target":
                target.kill()

                async def given_up() -> bool:
                    return (await client.stat()).state == "drained"

                await eventually(given_up)
            else:
                node.kill()
        if killed == "command":
            async with client_of(target.address) as client:
                assert all((await get(client, numbers)).found)
        # What it had is on its disk, whatever became of the drain.
        if killed != "node":
            node.process.send_signal(signal.SIGTERM)
            assert node.process.wait(WAIT_S) == 0
        again = stack.enter_context(start(server, *disk))
        async with client_of(again.address) as client:

            async def all_there() -> bool:
                return all((await get(client, numbers)).found)

            await eventually(all_there)


async def test_a_node_stopped_during_a_removal_forgets_when_it_goes_on(server: RedisServer) -> None:
    with start(server) as one, start(server) as two:
        async with client_of(one.address) as here, client_of(two.address) as there:
            for client in (here, there):
                await put(client, [1, 2])
            stop(two.process)
            try:
                with pytest.raises(KVError, match="could not be told"):
                    await here.remove([name(1)])
                assert await here.exists([name(1)]) == [None]
            finally:
                two.process.send_signal(signal.SIGCONT)

            async def forgotten() -> bool:
                return await there.exists([name(1)]) == [None]

            await eventually(forgotten)
