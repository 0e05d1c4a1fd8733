"""Real nodes and a real directory under a virtual clock, by the thousand: removals, copies, deaths, cuts, a directory
that is lost.

What must hold, whatever happens: a reader gets whole bytes of its own block and tenant, and no node that the directory
has as live serves a block whose removal was acknowledged before the get began. Afterwards everything heals: all nodes
are in one epoch, the directory names what they have and nobody who is dead, and no slab or lease is lost.
`KVFERRY_POOL_SEEDS=10000` runs more; a failure names its seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from simulated_pool import (
    SLAB,
    SPACES,
    LoopClock,
    NoThreads,
    SimClient,
    SimDirectory,
    SimEngine,
    VirtualLoop,
    Wire,
    version_of,
)

from kvferry.errors import KVError
from kvferry.pool import node as node_module
from kvferry.pool import replicas
from kvferry.pool.directory import EmbeddedDirectory
from kvferry.pool.epochs import Epoch
from kvferry.pool.index import BlockIndex
from kvferry.pool.keys import BlockSpace
from kvferry.pool.leases import Leases
from kvferry.pool.messages import Counted, Remove
from kvferry.pool.node import PoolNode
from kvferry.pool.removal import Removals
from kvferry.pool.reporter import Reporter
from kvferry.pool.settings import PoolSettings

NUM_SEEDS = int(os.environ.get("KVFERRY_POOL_SEEDS", "30"))
NUM_NODES, NUM_KEYS, NUM_SLABS, RUN_S, HEAL_S = 3, 4, 10, 8.0, 6.0
Key = tuple[BlockSpace, bytes]


class World:
    """One seed."""

    def __init__(self, seed: int, directory: Path) -> None:
        self.rng = random.Random(seed)
        self.loop = VirtualLoop(self.rng)
        self.wire = Wire(self.loop, self.rng)
        self.path = directory / str(seed)
        self.shared = [EmbeddedDirectory(LoopClock(self.loop))]
        self.nodes: list[PoolNode] = []
        self.started: list[PoolNode] = []
        self.clients: list[SimClient] = []
        self.versions: Counter[Key] = Counter()
        self.removed_below: Counter[Key] = Counter()
        self.promised: Counter[Key] = Counter()
        self.puts_under_way: Counter[BlockSpace] = Counter()
        self.removing: set[BlockSpace] = set()
        self.no_puts = asyncio.Condition()
        self.counts: Counter[str] = Counter()

    def run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_until_complete(self._run())
        finally:
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.run_until_complete(asyncio.sleep(0.1))
            for node in self.started:
                if node._disk is not None:
                    node._disk._disk.close()
            self.loop.close()
            asyncio.set_event_loop(None)
            shutil.rmtree(self.path, ignore_errors=True)

    async def _run(self) -> None:
        for number in range(NUM_NODES):
            self.nodes.append(await self.start(number))
        self.clients = [SimClient(self.wire, node) for node in self.nodes]
        tasks = [asyncio.create_task(self.engine(number)) for number in range(NUM_NODES) for _ in range(2)]
        tasks += [asyncio.create_task(self.remover()), asyncio.create_task(self.remover())]
        tasks += [asyncio.create_task(self.faults())]
        await asyncio.gather(*tasks)
        self.wire.cut.clear()
        self.wire.slowest_s, self.wire.lost = 0.01, 0.0
        await asyncio.sleep(HEAL_S)
        await self.require_healed()
        for node in self.nodes:
            self.counts += Counter({n: c for n, c in node.counts.items() if n.startswith("replicas")})
            self.counts["missed"] += node.counts["removals_missed"]
            await node.close()

    async def start(self, number: int) -> PoolNode:
        node: list[PoolNode] = []
        settings = PoolSettings(
            arena_bytes=NUM_SLABS * SLAB + 4096,
            slab_bytes=SLAB,
            eviction="lru",
            disk_path=str(self.path / str(number)),
            disk_bytes=8 * SLAB,
            lease_ttl_s=1.0,
            max_leases=32,
            node_ttl_s=0.9,
            max_copies=3,
        )
        view = SimDirectory(self.wire, self.shared, lambda: node[0]._engine.address)
        node.append(PoolNode(settings=settings, directory=view, clock=LoopClock(self.loop)))
        self.started.append(node[0])
        await node[0].start()
        return node[0]

    # What happens

    async def engine(self, number: int) -> None:
        """Puts and gets at one node, and looks at every byte."""
        while self.loop.time() < RUN_S:
            await asyncio.sleep(self.rng.random() * 0.3)
            space = self.rng.choice(SPACES)
            first = self.rng.choice((0, 0, 1, 2))
            hashes = [bytes([key]) for key in range(first, NUM_KEYS)][: self.rng.randrange(1, 4)]
            with contextlib.suppress(KVError):
                if self.rng.random() < 0.3:
                    await self.put(number, space, hashes, first)
                else:
                    # Now and then another node's, as engines do when the directory names it.
                    at = number if self.rng.random() < 0.7 else self.rng.randrange(NUM_NODES)
                    await self.get(at, space, hashes)

    async def put(self, number: int, space: BlockSpace, hashes: list[bytes], first: int) -> None:
        if space in self.removing:
            return
        # What an engine put before a removal began may come after it: that is not the pool's to know.
        self.puts_under_way[space] += 1
        try:
            client = SimClient(self.wire, self.nodes[number])
            await client.put(space, hashes, [self.versions[space, h] for h in hashes], first)
        finally:
            self.puts_under_way[space] -= 1
            async with self.no_puts:
                self.no_puts.notify_all()

    async def get(self, number: int, space: BlockSpace, hashes: list[bytes], *, healed: bool = False) -> None:
        node = self.nodes[number]
        live, directory = await self.is_live(node), self.shared[0]
        # What only a directory knew that was lost is known again when the nodes that heard of it are back.
        least = {h: (self.promised if healed else self.removed_below)[space, h] for h in hashes}
        found = await SimClient(self.wire, node).get(space, hashes)
        for block_hash, read in zip(hashes, found, strict=True):
            if read is None:
                continue
            version = version_of(read, space, block_hash)
            self.counts["hits"] += 1
            if live and directory is self.shared[0]:
                assert version >= least[block_hash], (
                    f"{node._engine.address} served {space.namespace} {block_hash!r} in version {version}, which was "
                    f"removed: {least[block_hash]} is the least"
                )

    async def is_live(self, node: PoolNode) -> bool:
        return node._engine.incarnation in await self.shared[0].nodes()

    async def remover(self) -> None:
        """Removes blocks; promises readers what was acknowledged only."""
        while self.loop.time() < RUN_S:
            await asyncio.sleep(self.rng.random() * 3.0)
            space = self.rng.choice(SPACES)
            if space in self.removing:
                continue
            self.removing.add(space)
            async with self.no_puts:
                await self.no_puts.wait_for(lambda space=space: not self.puts_under_way[space])
            everything = self.rng.random() < 0.3
            keys = range(NUM_KEYS) if everything else self.rng.sample(range(NUM_KEYS), 2)
            hashes = [bytes([key]) for key in keys]
            for block_hash in hashes:
                self.versions[space, block_hash] += 1
            after = {h: self.versions[space, h] for h in hashes}
            client, directory = SimClient(self.wire, self.rng.choice(self.nodes)), self.shared[0]
            self.removing.discard(space)
            try:
                request = Remove(client.new_id(), space, None if everything else hashes)
                reply = await client.ask(request, deadline_s=8.0)
            except KVError:
                continue
            if isinstance(reply, Counted):
                self.counts["removals"] += 1
                for block_hash, version in after.items():
                    for least in (self.promised, *[self.removed_below] * (directory is self.shared[0])):
                        least[space, block_hash] = max(least[space, block_hash], version)
            else:
                self.counts["removals_failed"] += 1

    async def faults(self) -> None:
        while self.loop.time() < RUN_S:
            await asyncio.sleep(self.rng.random() * 2.0)
            what = self.rng.random()
            if what < 0.3:
                await self.kill(self.rng.randrange(NUM_NODES))
            elif what < 0.4:
                self.shared[0] = EmbeddedDirectory(LoopClock(self.loop))
                self.removed_below.clear()
                self.counts["directories_lost"] += 1
            elif what < 0.75:
                ends = [node._engine.address for node in self.nodes] + ["directory"]
                self.wire.cut.add(frozenset(self.rng.sample(ends, 2)))
                self.counts["cuts"] += 1
            else:
                self.wire.cut.clear()

    async def kill(self, number: int) -> None:
        """As kill -9 does: what runs ends where it is, and the disk stays as it is. It may be away for a while."""
        node = self.nodes[number]
        node._engine.die()  # type: ignore[attr-defined]
        assert node._cluster is not None and node._disk is not None and node._replicas is not None
        tasks = [node._cluster.reporter._task, node._replicas._task, node._expiry]
        tasks += [*node._disk._writes.values(), *(task for some in node._tasks.values() for task in some)]
        for task in [*tasks, *node._disk._loads.values()]:
            if task is not None:
                task.cancel()
        await asyncio.sleep(0)
        node._disk._disk.close()
        self.counts["kills"] += 1
        await asyncio.sleep(self.rng.choice((0.0, 0.5, 2.0)))
        self.nodes[number] = await self.start(number)

    # What must hold in the end

    async def require_healed(self) -> None:
        addresses = {node._engine.address for node in self.nodes}
        assert set((await self.shared[0].nodes()).values()) == addresses, "the directory does not have the live nodes"
        for space in SPACES:
            epochs = {node._index.epochs.current(space) for node in self.nodes}
            assert len(epochs) == 1, f"the nodes are in {len(epochs)} epochs of {space.namespace}"
        hashes = [bytes([key]) for key in range(NUM_KEYS)]
        for space in SPACES:
            named = await self.shared[0].lookup(space, hashes)
            for node in self.nodes:
                for block_hash, entry, holders in zip(hashes, node._index.find(space, hashes), named, strict=True):
                    address = node._engine.address
                    assert entry is None or address in holders, f"{address} has {block_hash!r} and the directory not"
                    assert set(holders) <= addresses
        for number, node in enumerate(self.nodes):
            node.check_integrity()
            assert len(node._leases) == 0
            for space in SPACES:
                await self.get(number, space, hashes, healed=True)


@pytest.fixture
def disks() -> Iterator[Path]:
    """Where the nodes' disks lie: files in memory, as thousands are made and removed."""
    in_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=in_memory if in_memory.is_dir() else None) as path:
        yield Path(path)


@pytest.fixture(autouse=True)
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(node_module, "TransferEngine", SimEngine)
    monkeypatch.setattr(node_module, "ThreadPoolExecutor", NoThreads)
    # More happens in less time.
    monkeypatch.setattr(replicas, "PERIOD_S", 0.4)
    monkeypatch.setattr(replicas, "LEAST_HEAT", 2.0)
    monkeypatch.setattr(replicas, "MAX_SHARE", 0.5)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def run_seed(seed: int, directory: Path) -> Counter[str]:
    world = World(seed, directory)
    SimEngine.wire = world.wire
    world.run()
    return world.counts


@pytest.mark.timeout(0)
def test_no_seed_serves_what_was_removed_or_another_s(disks: Path) -> None:
    counts: Counter[str] = Counter()
    first = int(os.environ.get("KVFERRY_POOL_FIRST_SEED", "0"))
    for seed in range(first, first + NUM_SEEDS):
        try:
            counts += run_seed(seed, disks)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
    print(f"{NUM_SEEDS} seeds: {dict(counts)}")
    # Not vacuous.
    for what in ("hits", "removals", "replicas_taken", "missed", "kills", "cuts", "directories_lost"):
        assert counts[what] > NUM_SEEDS // 20, what


Breaks = Callable[[pytest.MonkeyPatch], None]


def no_epoch_at_commit(patch: pytest.MonkeyPatch) -> None:
    """Copies are committed, and taken, in whatever epoch."""
    commit = BlockIndex.commit_put
    patch.setattr(BlockIndex, "commit_put", lambda self, put, d: commit(self, put._replace(replica=False), d))
    patch.setattr("kvferry.pool.replicas.Epoch", lambda epoch: AnyEpoch(epoch))


class AnyEpoch(int):
    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


def missed_removals_do_not_matter(patch: pytest.MonkeyPatch) -> None:
    def enter(self: Reporter, space: BlockSpace, epoch: Epoch) -> None:
        pass

    apply = BlockIndex.apply_removal

    def shrug(self: BlockIndex, space: BlockSpace, hashes: Any, *, previous: Any = None, epoch: Any = None) -> Any:
        # A node that missed something neither forgets the space nor remembers that it should have.
        return apply(self, space, [] if hashes is None and previous is None else hashes, previous=None, epoch=epoch)

    patch.setattr(BlockIndex, "apply_removal", shrug)


def others_are_not_told(patch: pytest.MonkeyPatch) -> None:
    async def nobody(self: Removals, forget: Any) -> tuple[int, list[str]]:
        return 0, []

    patch.setattr(Removals, "_tell_all", nobody)


def old_disks_are_served_at_once(patch: pytest.MonkeyPatch) -> None:
    """Without a look at the epochs."""
    start = PoolNode.start

    async def eager(self: PoolNode) -> None:
        assert self._disk is not None
        self._disk.adopt()
        await start(self)

    patch.setattr(PoolNode, "start", eager)

    async def no_look(self: Reporter, *, patient: bool = False) -> Epoch:
        return (await self._directory.epochs()).latest

    patch.setattr(Reporter, "catch_up", no_look)


def who_joins_need_not_be_up_to_date(patch: pytest.MonkeyPatch) -> None:
    async def join(self: EmbeddedDirectory, node: Any, address: str, ttl_s: float, *, seen: Epoch) -> bool:
        self._nodes[node] = address, self._clock.now_s() + ttl_s
        return True

    patch.setattr(EmbeddedDirectory, "join", join)


def words_outlive_their_leases(patch: pytest.MonkeyPatch) -> None:
    def end(self: Leases, owner: Any, lease_id: int) -> bool:
        lease = self._leases.pop((owner, lease_id), None)
        if lease is not None:
            for entry in lease.entries:
                self._index.release(entry)
        return lease is not None

    patch.setattr(Leases, "end", end)


@pytest.mark.parametrize(
    "breaks",
    [
        no_epoch_at_commit,
        missed_removals_do_not_matter,
        others_are_not_told,
        old_disks_are_served_at_once,
        who_joins_need_not_be_up_to_date,
        words_outlive_their_leases,
    ],
    ids=lambda breaks: breaks.__name__,
)
def test_each_rule_switched_off_is_caught(breaks: Breaks, disks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    breaks(monkeypatch)

    def fails(seed: int) -> bool:
        try:
            run_seed(seed, disks)
        except (AssertionError, KVError):
            return True
        return False

    assert any(fails(seed) for seed in range(200))
