"""A node that is killed or stopped in the middle of puts and gets: misses with a cause, never wrong bytes."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvferry.observe import LISTENING
from kvferry.pool import BlockSpace, PoolClient, whole
from pool_processes import WAIT_S, eventually, fixed_port, stop

BLOCK = 65536
NUM_BLOCKS = 24
SPACE = BlockSpace(b"m" * 32, "tenant-a")


def start_node(directory: Path, listen: str = "tcp://127.0.0.1:0") -> tuple[subprocess.Popen[str], str]:
    flags = ["--arena-bytes", "2MiB", "--slab-bytes", "64KiB", "--disk-path", str(directory), "--disk-bytes", "4MiB"]
    command = [sys.executable, "-m", "kvferry", "node", *flags, "--listen", listen, "--log-level", "error"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith(LISTENING), line
    return process, line.removeprefix(LISTENING).strip()


def start_writer(script: str, address: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", script, address], stdout=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def content(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, BLOCK, dtype=np.uint8)


CONTENT = [content(number) for number in range(NUM_BLOCKS * 4)]


class Worker:
    """Puts and gets random prompts and looks at every byte."""

    def __init__(self, client: PoolClient, seed: int) -> None:
        self.client, self.rng = client, random.Random(seed)
        self.region = client.allocate(NUM_BLOCKS * BLOCK)
        self.hits = self.puts = 0

    async def run(self, stop: asyncio.Event) -> None:
        rows = self.region.buffer.reshape(-1, BLOCK)
        while not stop.is_set():
            first, count = self.rng.randrange(NUM_BLOCKS * 3), self.rng.randrange(1, NUM_BLOCKS)
            numbers = list(range(first, first + count))
            hashes = [number.to_bytes(4, "big") for number in numbers]
            offsets = np.arange(count) * BLOCK
            result = await self.client.get(hashes, whole(self.region, BLOCK), offsets)
            for row, number in enumerate(numbers):
                if result.found[row]:
                    assert (rows[row] == CONTENT[number]).all(), f"block {number} holds another's bytes"
            self.hits += sum(result.found)
            for row, number in enumerate(numbers):
                rows[row] = CONTENT[number]
            self.puts += (await self.client.put(hashes, whole(self.region, BLOCK), offsets)).stored
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("transports", [("shm", "tcp"), ("tcp",)])
async def test_kill_9_during_puts_and_gets(tmp_path: Path, transports: tuple[str, ...]) -> None:
    process, address = start_node(tmp_path, f"tcp://127.0.0.1:{fixed_port()}")
    client = PoolClient(address, SPACE, transports=transports, deadline_s=3.0)
    await client.start()
    stop = asyncio.Event()
    workers = [Worker(client, seed) for seed in range(2)]
    tasks = [asyncio.create_task(worker.run(stop)) for worker in workers]
    try:
        for _ in range(2):
            hits = sum(worker.hits for worker in workers)
            await until(lambda before=hits: sum(worker.hits for worker in workers) > before + 50, tasks)
            process.send_signal(signal.SIGKILL)
            process.wait()
            failed = sum(client.failures.values())
            await until(lambda before=failed: sum(client.failures.values()) > before + 2, tasks)
            end(process)
            # It comes back at its old address with a new arena and its old disk.
            process, _ = start_node(tmp_path, address)
        hits = sum(worker.hits for worker in workers)
        await until(lambda: sum(worker.hits for worker in workers) > hits + 50, tasks)
        stat = await client.stat()
        assert stat.counts["get_disk"] > 0
    finally:
        stop.set()
        await asyncio.gather(*tasks)
        await client.close()
        end(process)
    assert set(client.failures) <= {"peer_gone", "transport_error", "transfer_timeout", "lease_expired"}


async def test_a_stopped_node_costs_a_deadline_and_comes_back(tmp_path: Path) -> None:
    process, address = start_node(tmp_path)
    client = PoolClient(address, SPACE, deadline_s=WAIT_S)
    await client.start()
    try:
        region = client.allocate(BLOCK)
        region.buffer[:] = CONTENT[1]
        assert (await client.put([b"1"], whole(region, BLOCK), [0])).stored == 1
        stop(process)
        client.deadline_s = 0.5
        began_s = asyncio.get_running_loop().time()
        result = await client.get([b"1"], whole(region, BLOCK), [0])
        assert (result.found, result.cause) == ([False], "transfer_timeout")
        assert asyncio.get_running_loop().time() - began_s < client.deadline_s + 20.0
        process.send_signal(signal.SIGCONT)
        client.deadline_s = WAIT_S

        async def found() -> bool:
            region.buffer[:] = 0
            return (await client.get([b"1"], whole(region, BLOCK), [0])).found == [True]

        await eventually(found)
        assert (region.buffer == CONTENT[1]).all()
    finally:
        await client.close()
        end(process)


async def test_a_client_killed_in_the_middle_of_a_put_leaves_no_block(tmp_path: Path) -> None:
    process, address = start_node(tmp_path)
    client = PoolClient(address, SPACE, deadline_s=WAIT_S)
    await client.start()
    script = (
        "import asyncio, sys\n"
        "from kvferry.pool import BlockSpace, PoolClient, whole\n"
        "async def main():\n"
        "    client = PoolClient(sys.argv[1], BlockSpace(b'm' * 32, 'tenant-a'))\n"
        "    await client.start()\n"
        "    region = client.allocate(16 * 65536)\n"
        "    n = 0\n"
        "    while True:\n"
        "        region.buffer[:] = n % 251\n"
        "        hashes = [b'%d-%d' % (n, i) for i in range(16)]\n"
        "        put = asyncio.create_task(client.put(hashes, whole(region, 65536), [65536 * i for i in range(16)]))\n"
        "        await asyncio.sleep(0)\n"
        "        print(n, flush=True)\n"
        "        await put\n"
        "        n += 1\n"
        "asyncio.run(main())\n"
    )
    try:
        for lines in (2, 5):
            writer = start_writer(script, address)
            assert writer.stdout is not None
            for _ in range(lines):
                number = int(await asyncio.to_thread(writer.stdout.readline))
            writer.kill()
            writer.wait()
            writer.stdout.close()
            region = client.allocate(16 * BLOCK)
            hashes = [b"%d-%d" % (number, i) for i in range(16)]
            result = await client.get(hashes, whole(region, BLOCK), np.arange(16) * BLOCK, prefix=False)
            for row, found in zip(region.buffer.reshape(16, BLOCK), result.found, strict=True):
                assert not found or (row == number % 251).all()

            async def let_go() -> bool:
                return (await client.stat()).leases == 0

            async def all_free() -> bool:
                stat = await client.stat()
                return stat.free_slabs == stat.num_slabs

            await eventually(let_go)
            await client.clear()
            # Nothing that the dead client was lent stays taken.
            await eventually(all_free)
    finally:
        await client.close()
        end(process)


async def until(condition: object, tasks: list[asyncio.Task[None]]) -> None:
    """Wait for `condition()`; a worker that failed ends the wait with its error."""
    assert callable(condition)

    async def came() -> bool:
        for task in tasks:
            if task.done():
                task.result()
        return bool(condition())

    await eventually(came)
