"""kvferry's own systems: a node as a process of its own, and a client of it as an engine has one."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from kvferry.pool.bench import processes
from kvferry.pool.bench.cases import Case, Result, Scale, arrived, clear, fresh_keys, journey, seconds_of
from kvferry.pool.bench.stores import Store, StoreSystem
from kvferry.pool.client import PoolClient
from kvferry.pool.cluster import PoolNodes
from kvferry.pool.disk import DiskTier, SlotHeader, pages
from kvferry.pool.keys import BlockSpace
from kvferry.pool.parts import whole
from kvferry.transfer.bench.cases import fill
from kvferry.types import new_incarnation

SPACE = BlockSpace(b"b" * 32, "bench")
DEADLINE_S = 60.0
PUT_BATCH = 8
"""Beginnings of prompts, which the node writes to disk however busy that is."""

_UNWRITTEN_BYTES = 96 << 20
"""How far the puts run ahead of the disk: more and the node would let blocks pass."""


class NodeStore(Store):
    """A client of one node, with `memory_bytes` on either side."""

    def __init__(self, address: str, memory_bytes: int, transports: tuple[str, ...] = ("shm", "tcp")) -> None:
        self.client = PoolClient(address, SPACE, deadline_s=DEADLINE_S, transports=transports)
        self._loop = asyncio.new_event_loop()
        self.run(self.client.start())
        self._regions = self.client.allocate(memory_bytes), self.client.allocate(memory_bytes)
        self.source, self.target = (region.buffer for region in self._regions)
        fill(self.source)
        clear(self.target)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Await it on the client's loop."""
        return self._loop.run_until_complete(work)

    def put(self, keys: list[bytes], sources: list[int], nbytes: int, batch: int) -> None:
        async def put_all() -> None:
            parts = whole(self._regions[0], nbytes)
            for first in range(0, len(keys), batch):
                asked = keys[first : first + batch]
                done = await self.client.put(asked, parts, sources[first : first + batch])
                if done.stored != len(asked):
                    raise RuntimeError(f"the pool took {done.stored} of {len(asked)} blocks: {done}")

        self.run(put_all())

    def get(self, keys: list[bytes], targets: list[int], nbytes: int, batch: int) -> None:
        async def get_all() -> None:
            parts = whole(self._regions[1], nbytes)
            for first in range(0, len(keys), batch):
                got = await self.client.get(keys[first : first + batch], parts, targets[first : first + batch])
                if not all(got.found):
                    raise RuntimeError(f"the pool had {sum(got.found)} of {len(got.found)} blocks: {got.cause}")

        self.run(get_all())

    def lookup(self, keys: list[bytes]) -> Callable[[], Sequence[object]]:
        return lambda: self.run(self.client.exists(keys))

    def close(self) -> None:
        self.run(self.client.close())
        self._loop.close()


class Kvferry(StoreSystem):
    """A client of this host's node, which maps the arena."""

    name = "kvferry"
    kinds = frozenset({"put", "get", "exists", "disk-write", "disk-read", "restart"})
    transports: ClassVar[tuple[str, ...]] = ("shm", "tcp")

    @contextlib.contextmanager
    def open(self, memory_bytes: int, block_bytes: int) -> Iterator[Store]:
        with processes.node(block_bytes, memory_bytes // block_bytes) as address:
            store = NodeStore(address, memory_bytes, self.transports)
            try:
                yield store
            finally:
                store.close()

    def measure(self, cases: list[Case], scale: Scale) -> Iterator[Result]:
        yield from super().measure(cases, scale)
        on_disk: dict[str, Case] = {case.kind: case for case in cases if case.kind in ("disk-write", "disk-read")}
        if on_disk:
            yield from _disk(on_disk, scale)
        for case in cases:
            if case.kind == "restart":
                yield _restart(case, scale)


class KvferryTcp(Kvferry):
    """A client of another host's node, which reads over TCP."""

    name = "kvferry-tcp"
    kinds = frozenset({"put", "get"})
    transports = ("tcp",)


def _disk(cases: dict[str, Case], scale: Scale) -> Iterator[Result]:
    """Put until all of it is on disk; then, the node restarted and its memory empty, get it back."""
    case = cases.get("disk-read") or cases["disk-write"]
    count = scale.disk_bytes // case.block_bytes
    with tempfile.TemporaryDirectory(dir=scale.disk_path, prefix="kvferry-bench-") as directory:
        made = journey(count, case.block_bytes, 0)
        flags: Any = {"disk": Path(directory), "disk_slots": count}
        with processes.node(case.block_bytes, count, **flags) as address:
            store = NodeStore(address, scale.disk_bytes)
            written_s = seconds_of(lambda: _write_all(store, made.keys, made.sources, case.block_bytes))
            store.close()
        if "disk-write" in cases:
            yield Result(cases["disk-write"].name, [written_s], scale.disk_bytes, None)
        if "disk-read" not in cases:
            return
        with processes.node(case.block_bytes, count, **flags) as address:
            store = NodeStore(address, scale.disk_bytes)
            read_s = seconds_of(lambda: store.get(made.keys, made.targets, case.block_bytes, case.batch))
            right = arrived(made, case.block_bytes, store.source, store.target)
            store.close()
        yield Result(cases["disk-read"].name, [read_s], scale.disk_bytes, right)


def _write_all(store: NodeStore, keys: list[bytes], sources: list[int], block_bytes: int) -> None:
    most = max(1, _UNWRITTEN_BYTES // block_bytes)
    for first in range(0, len(keys), PUT_BATCH):
        last = first + PUT_BATCH
        store.put(keys[first:last], sources[first:last], block_bytes, PUT_BATCH)
        _await_written(store, last - most)
    _await_written(store, len(keys))


def _await_written(store: NodeStore, count: int) -> None:
    while True:
        counts = store.run(store.client.stat()).counts
        if counts.get("disk_skipped", 0) or counts.get("disk_errors", 0):
            raise RuntimeError(f"the node did not write all blocks: {counts}")
        if counts.get("disk_written", 0) >= count:
            return
        time.sleep(0.001)


def _restart(case: Case, scale: Scale) -> Result:
    """From the start of a process until it answers for every block that lay on its disk."""
    count = scale.restart_blocks
    keys, memory = fresh_keys(count), np.frombuffer(bytearray(pages(1) * 2), dtype=np.uint8)
    memory = memory[-memory.ctypes.data % pages(1) :][: pages(1)]
    with tempfile.TemporaryDirectory(dir=scale.disk_path, prefix="kvferry-bench-") as directory:
        tier = DiskTier(Path(directory), slab_bytes=case.block_bytes, disk_bytes=count * case.block_bytes)
        for slot, key in enumerate(keys):
            # Opening reads headers only, so that small blocks in large slabs tell as much as large ones.
            tier.write(slot, memory, SlotHeader(SPACE.fingerprint, SPACE.namespace, key, 1, 0))
        tier.close()
        seconds, right = list[float](), True
        for _ in range(scale.repeats):
            began_s = time.perf_counter()
            with processes.node(case.block_bytes, 16, disk=Path(directory), disk_slots=count) as address:
                store = NodeStore(address, case.block_bytes)
                right &= all(store.lookup(keys)())
                seconds.append(time.perf_counter() - began_s)
                store.close()
    return Result(case.name, seconds, count, right)


class KvferryRedis(StoreSystem):
    """Which blocks any of many nodes holds: this host's node is asked, then the directory in Redis."""

    name = "kvferry-redis"
    kinds = frozenset({"exists"})

    @classmethod
    def why_not(cls) -> str | None:
        from kvferry.pool.bench.peers import Redis

        return Redis.why_not()

    @contextlib.contextmanager
    def open(self, memory_bytes: int, block_bytes: int) -> Iterator[Store]:
        from kvferry.pool.bench.peers import redis_server

        with redis_server() as port, processes.node(block_bytes, 16) as address:
            store = _DirectoryStore(address, port, memory_bytes)
            try:
                yield store
            finally:
                store.close()


class _DirectoryStore(NodeStore):
    """The blocks of `put` are another node's, as far as the directory knows."""

    def __init__(self, address: str, port: int, memory_bytes: int) -> None:
        from kvferry.pool.directory_redis import RedisDirectory

        super().__init__(address, memory_bytes)
        self._directory = RedisDirectory(f"redis://127.0.0.1:{port}/0", timeout_s=DEADLINE_S)
        self._nodes = PoolNodes(
            [self.client],
            directory=self._directory,
            connect=lambda other: PoolClient(other, SPACE, transports=("tcp",)),
        )

    def put(self, keys: list[bytes], sources: list[int], nbytes: int, batch: int) -> None:
        async def report() -> None:
            node = new_incarnation()
            await self._directory.join(node, "tcp://127.0.0.1:1", DEADLINE_S)
            await self._directory.report(node, [(SPACE, key) for key in keys], [])

        self.run(report())

    def lookup(self, keys: list[bytes]) -> Callable[[], Sequence[object]]:
        return lambda: self.run(self._nodes.exists(keys))

    def close(self) -> None:
        self.run(self._nodes.close())
        self.run(self._directory.close())
        super().close()
