"""The pool against memcpy: put and get over shared memory and TCP, exists, the disk tier, and opening it again.

    python bench/pool.py [--json FILE] [--rounds N] [--disk DIRECTORY]

A node runs as a process of its own. In each round every system moves the same blocks, one after the other, so that a
machine that slows down slows all of them; ratios are taken within a round, and their median counts.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvferry.observe import LISTENING
from kvferry.pool import BlockSpace, PoolClient, whole
from kvferry.transport.base import Region

SPACE = BlockSpace(b"b" * 32, "bench")
TOTAL_BYTES = 128 << 20
numbers = itertools.count()


class Node:
    """`kvferry node` in a process of its own."""

    def __init__(self, slab_bytes: int, *, slabs: int, disk: Path | None = None, disk_slots: int = 0) -> None:
        flags = ["--arena-bytes", str(slabs * slab_bytes + (1 << 20)), "--slab-bytes", str(slab_bytes)]
        if disk is not None:
            flags += ["--disk-path", str(disk), "--disk-bytes", str(disk_slots * slab_bytes)]
        command = [sys.executable, "-m", "kvferry", "node", *flags, "--eviction", "lru", "--log-level", "warning"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().removeprefix(LISTENING).strip()

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()


def fresh(count: int) -> list[bytes]:
    """Hashes that nobody has."""
    return [next(numbers).to_bytes(32, "big") for _ in range(count)]


async def timed(work: Callable[[], Awaitable[Any]]) -> float:
    began_s = time.perf_counter()
    await work()
    return time.perf_counter() - began_s


async def host_rounds(block_bytes: int, batch: int, rounds: int) -> dict[str, Any]:
    """GB/s of memcpy, put, get over shared memory and get over TCP, in batches of `batch` blocks."""
    count = TOTAL_BYTES // block_bytes
    rates: dict[str, list[float]] = {"memcpy": [], "put": [], "get": [], "get_tcp": []}
    with Node(block_bytes, slabs=2 * count) as node:
        near = PoolClient(node.address, SPACE, deadline_s=60)
        far = PoolClient(node.address, SPACE, deadline_s=60, transports=("tcp",))
        await near.start()
        await far.start()
        source, target, over = (c.allocate(TOTAL_BYTES) for c in (near, near, far))
        source.buffer[:] = np.random.default_rng(1).integers(0, 256, TOTAL_BYTES, dtype=np.uint8)
        offsets = np.random.default_rng(2).permutation(count).astype(np.int64) * block_bytes

        async def batches(call: Callable[[int, int], Awaitable[None]]) -> None:
            for first in range(0, count, batch):
                await call(first, min(count, first + batch))

        async def put(first: int, stop: int) -> None:
            done = await near.put(hashes[first:stop], whole(source, block_bytes), offsets[first:stop])
            assert done.stored == stop - first, done

        async def get(client: PoolClient, region: Region, first: int, stop: int) -> None:
            result = await client.get(hashes[first:stop], whole(region, block_bytes), offsets[first:stop])
            assert all(result.found), result

        async def memcpy() -> None:
            rows_to, rows_from = target.buffer.reshape(count, -1), source.buffer.reshape(count, -1)
            for row in (offsets // block_bytes).tolist():
                rows_to[row] = rows_from[row]

        # Two rounds first: each fills another half of the arena, whose pages the kernel must make at first.
        for index in range(rounds + 2):
            hashes = fresh(count)
            target.buffer[:] = over.buffer[:] = 0
            seconds = {
                "memcpy": await timed(memcpy),
                "put": await timed(lambda: batches(put)),
                "get": await timed(lambda: batches(lambda a, b: get(near, target, a, b))),
                "get_tcp": await timed(lambda: batches(lambda a, b: get(far, over, a, b))),
            }
            assert (target.buffer == source.buffer).all()
            assert (over.buffer == source.buffer).all()
            if index > 1:
                for name, spent in seconds.items():
                    rates[name].append(TOTAL_BYTES / spent / 1e9)
        await near.close()
        await far.close()
    ratios = {
        name: statistics.median(r / m for r, m in zip(rates[name], rates["memcpy"], strict=True)) for name in rates
    }
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {"block_bytes": block_bytes, "batch": batch, "gb_per_s": medians, "ratio_to_memcpy": ratios, "all": rates}


async def exists_ms(rounds: int) -> dict[str, float]:
    """Milliseconds to ask for 1,000 keys, half of them there."""
    with Node(4096, slabs=2048) as node:
        client = PoolClient(node.address, SPACE, deadline_s=60)
        await client.start()
        region, present = client.allocate(500 * 4096), fresh(500)
        await client.put(present, whole(region, 4096), np.arange(500) * 4096)
        asked = [h for pair in zip(present, fresh(500), strict=True) for h in pair]
        spent = []
        for _ in range(50 * rounds):
            began_s = time.perf_counter()
            tiers = await client.exists(asked)
            spent.append(1000 * (time.perf_counter() - began_s))
        assert sum(t is not None for t in tiers) == 500
        await client.close()
    return {"p50": statistics.median(spent), "best": min(spent)}


async def disk_rounds(directory: Path, rounds: int) -> dict[str, float]:
    """Blocks on disk after the node went away: time to open, and GB/s of getting 1 MiB blocks from disk."""
    block_bytes, count = 1 << 20, 64
    hashes, rates = fresh(count), []
    with Node(block_bytes, slabs=count, disk=directory, disk_slots=count) as node:
        client = PoolClient(node.address, SPACE, deadline_s=60)
        await client.start()
        region = client.allocate(count * block_bytes)
        region.buffer[:] = np.random.default_rng(1).integers(0, 256, count * block_bytes, dtype=np.uint8)
        await client.put(hashes, whole(region, block_bytes), np.arange(count) * block_bytes)
        await client.close()
    for _ in range(rounds):
        with Node(block_bytes, slabs=count, disk=directory, disk_slots=count) as node:
            client = PoolClient(node.address, SPACE, deadline_s=60)
            await client.start()
            region = client.allocate(count * block_bytes)
            began_s = time.perf_counter()
            result = await client.get(hashes, whole(region, block_bytes), np.arange(count) * block_bytes)
            assert all(result.found), result
            rates.append(count * block_bytes / (time.perf_counter() - began_s) / 1e9)
            await client.close()
    return {"get_from_disk_gb_per_s": statistics.median(rates), "blocks": count}


def plot(results: dict[str, Any], path: Path) -> None:
    """Ratios to memcpy as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for index, run in enumerate(results["host"]):
        names = ["put", "get", "get_tcp"]
        heights = [run["ratio_to_memcpy"][name] for name in names]
        label = f"{run['block_bytes'] // 1024} KiB blocks, batches of {run['batch']}"
        bars = axes.bar(np.arange(3) + 0.4 * index - 0.2, heights, 0.38, label=label)
        rates = [run["gb_per_s"][name] for name in names]
        axes.bar_label(bars, [f"{rate:.1f} GB/s" for rate in rates], fontsize=8)
    axes.set_xticks(range(3), ["put", "get, shared memory", "get, TCP"])
    axes.axhline(1, color="grey", linestyle=":")
    axes.set_ylabel("of memcpy's rate in the same round")
    axes.margins(y=0.12)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip()


async def main() -> None:
    parser = argparse.ArgumentParser(description="The pool against memcpy")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--plot", type=Path, help="draw the ratios to memcpy here")
    parser.add_argument("--disk", type=Path, help="where the disk tier lies (default: the temporary directory)")
    args = parser.parse_args()
    load_before = os.getloadavg()[0]
    host = [await host_rounds(1 << 20, 16, args.rounds), await host_rounds(64 << 10, 256, args.rounds)]
    with tempfile.TemporaryDirectory(dir=args.disk) as directory:
        disk = await disk_rounds(Path(directory), min(3, args.rounds))
    results = {
        "commit": commit(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "load_before": load_before,
        "load_after": os.getloadavg()[0],
        "total_bytes": TOTAL_BYTES,
        "host": host,
        "exists_1000_keys_ms": await exists_ms(args.rounds),
        "disk": disk,
    }
    print(json.dumps({**results, "host": [{k: v for k, v in run.items() if k != "all"} for run in host]}, indent=1))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    asyncio.run(main())
