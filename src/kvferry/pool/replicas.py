"""Copies of blocks on other nodes: offered by who has them, pulled by who takes them. On the node's event loop.

The offering node leases the blocks to itself on behalf of the other and tells it where they lie; the other reads them
over the transfer engine, checks the lease's word and each block's digest, and commits. So a copy is whole and right, or
there is none; and it is none either where a removal began meanwhile (see `kvferry.pool.epochs`).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import NamedTuple

import numpy as np
import xxhash

from kvferry.errors import IntegrityError, KVError, LeaseExpired, PoolExhausted
from kvferry.observe import get_log, start_background
from kvferry.policy.eviction import Place
from kvferry.policy.replication import BlockHeat, HeatTable, admit_replicas, choose_node, deserve_replica
from kvferry.pool.entries import Entry, Put
from kvferry.pool.epochs import Epoch
from kvferry.pool.index import BlockIndex
from kvferry.pool.keys import BlockSpace
from kvferry.pool.leases import Leases
from kvferry.pool.neighbours import Cluster
from kvferry.pool.node_messages import Offer, OfferedBlock, Taken
from kvferry.transfer import Peer, TransferEngine
from kvferry.transport.base import BlockList, Guard, RemoteRegion

LEAST_HEAT = 4.0
"""Uses within a few periods that make a block hot."""
PERIOD_S = 2.0
MAX_SHARE = 0.25
"""Of a node's memory that may hold copies of other nodes' blocks, beside what is free."""
OFFER_BYTES = 32 << 20
"""Of one offer, so that none holds blocks for long, nor a slow network ends it."""
MAX_OFFERED = 4096
OFFER_S = 10.0
_log = get_log(__name__)


class Offered(NamedTuple):
    """What became of offered blocks: `there` at the other node now, or `left` here alone."""

    there: list[Entry]
    left: list[Entry]


class Replicas:
    """One node's offers to others, and what it takes of theirs."""

    def __init__(
        self,
        engine: TransferEngine,
        index: BlockIndex,
        leases: Leases,
        threads: ThreadPoolExecutor,
        counts: Counter[str],
        cluster: Cluster,
        *,
        max_copies: int,
    ) -> None:
        self._engine, self._index, self._leases, self._threads = engine, index, leases, threads
        self._counts, self._cluster, self._max_copies = counts, cluster, max_copies
        self._heat = HeatTable[Entry]()
        self._num_coming = 0
        self._task: asyncio.Task[None] | None = None
        self.closed_to_more = False

    def start(self) -> None:
        """Begin to look for hot blocks, if copies of them are wanted."""
        if self._max_copies > 1:
            self._task = start_background(self._run(), what="copies of hot blocks")

    async def close(self) -> None:
        """Offer nothing more. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    def used(self, entries: Sequence[Entry]) -> None:
        """These blocks served a request."""
        if self._task is not None:
            self._heat.use(entries)

    # Giving

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(PERIOD_S)
            try:
                await self.replicate_hot()
            except KVError as error:
                _log.warning("hot blocks could not be copied to other nodes", cause=error.cause, error=str(error))
            self._heat.fade()

    async def replicate_hot(self) -> int:
        """Offer the blocks that deserve another copy, once; returns how many copies there are more.

        Raises: TransportError if the directory can't be asked.
        """
        entries = [e for e in self._heat.at_least(LEAST_HEAT)[:MAX_OFFERED] if self._index.in_host(e)]
        nodes = await self._cluster.neighbours.addresses() if entries else []
        if not nodes:
            return 0
        hot = await self.describe([(entry, self._heat.heat(entry)) for entry in entries])
        deserving = deserve_replica(hot, least_heat=LEAST_HEAT, max_copies=self._max_copies, limit=MAX_OFFERED)
        count = 0
        for node, blocks in assign(deserving, nodes).items():
            count += len((await self.offer_all(node, [block.name for block in blocks])).there)
        self._counts["replicas_given"] += count
        return count

    async def describe(self, heats: Sequence[tuple[Entry, float]]) -> list[BlockHeat[Entry]]:
        """Blocks of this node as the policy sees them. Raises: TransportError if the directory can't be asked."""
        by_space: dict[BlockSpace, list[tuple[Entry, float]]] = {}
        for entry, heat in heats:
            by_space.setdefault(self._index.space_of(entry), []).append((entry, heat))
        live, described = set(await self._cluster.neighbours.addresses()), list[BlockHeat[Entry]]()
        for space, some in by_space.items():
            holders = await self._cluster.directory.lookup(space, [entry.key[1] for entry, _ in some])
            roots = self._index.roots_of([entry for entry, _ in some])
            for (entry, heat), nodes, root in zip(some, holders, roots, strict=True):
                others = tuple(node for node in nodes if node in live)
                described.append(BlockHeat(entry, heat, entry.place.depth, root, others))
        return described

    async def offer_all(self, address: str, entries: Sequence[Entry]) -> Offered:
        """Offer blocks to one node, in order, a batch at a time, until it takes no more or can't be reached."""
        there, left = list[Entry](), sorted(entries, key=lambda entry: entry.key[0])
        while left:
            batch, rest = _batch(left)
            try:
                taken = await self._offer(address, batch)
            except KVError as error:
                self._counts["offers_failed"] += 1
                _log.warning("a node did not take copies", node=address, cause=error.cause, error=str(error))
                break
            there += [entry for entry, stored in zip(batch, taken, strict=True) if stored]
            left = [entry for entry, stored in zip(batch, taken, strict=True) if not stored] + rest
            if len(left) > len(rest):
                break
        return Offered(there, left)

    async def _offer(self, address: str, entries: Sequence[Entry]) -> list[bool]:
        """Offer blocks of one space. Raises: KVError if the node can't be reached, refuses, or is too late."""
        neighbours, index = self._cluster.neighbours, self._index
        peer = await neighbours.connect(address, deadline_s=OFFER_S)
        held = [entry for entry in entries if index.in_host(entry)]
        if not held:
            return [False] * len(entries)
        for entry in held:
            index.hold(entry)
        request_id = neighbours.new_id()
        try:
            lease = self._leases.grant(peer, request_id, held)
        except BaseException:
            for entry in held:
                index.release(entry)
            raise
        space = index.space_of(held[0])
        offer = Offer(
            id=request_id,
            space=space,
            epoch=index.epochs.current(space),
            blocks=[self._offered(entry) for entry in held],
            arena=index.arena.region.region_id,
            word_offset=lease.word_offset,
            word=lease.word,
        )
        try:
            answer = await neighbours.ask(peer, offer, Taken, deadline_s=OFFER_S)
        finally:
            # The word falls: a node that still reads throws it away.
            self._leases.end(peer, request_id)
        there = {entry for entry, stored in zip(held, answer.there, strict=False) if stored}
        return [entry in there for entry in entries]

    def _offered(self, entry: Entry) -> OfferedBlock:
        assert entry.slab is not None
        depth, num_blocks, parent = entry.place
        at = self._index.arena.offset(entry.slab)
        before = None if parent is None else parent[1]
        return OfferedBlock(entry.key[1], entry.nbytes, depth, num_blocks, before, at, entry.digest)

    # Taking

    async def take(self, peer: Peer, offer: Offer) -> list[Entry]:
        """Take copies of offered blocks; returns those that were stored now.

        Raises: PoolExhausted where none are wanted, LeaseExpired where a removal lies between the two nodes or the
        offer was taken back, IntegrityError for a block that is not what it should be; TransportError.
        """
        index, arena = self._index, peer.regions.get(offer.arena)
        if self.closed_to_more:
            raise PoolExhausted("this node is being drained")
        if arena is None:
            raise LeaseExpired("the other node does not offer its arena (any more)", peer=peer.name)
        if index.epochs.current(offer.space) != Epoch(offer.epoch):
            raise LeaseExpired(
                "blocks of this namespace were removed, and one of us has not heard of it", peer=peer.name
            )
        admitted = admit_replicas(
            len(offer.blocks),
            num_slabs=index.arena.num_slabs,
            num_free=index.arena.num_free,
            num_replicas=index.num_replicas,
            num_coming=self._num_coming,
            max_share=MAX_SHARE,
        )
        guard, stored = Guard(offer.arena, offer.word_offset, offer.word), list[Entry]()
        until_s = time.monotonic() + OFFER_S
        self._num_coming += admitted
        try:
            for nbytes, same in groupby(offer.blocks[:admitted], key=lambda block: block.nbytes):
                blocks = list(same)
                put = index.begin_put(
                    offer.space,
                    [block.block_hash for block in blocks],
                    nbytes,
                    first=0,
                    length=0,
                    replicas=[Place(block.depth, block.num_blocks, block.parent) for block in blocks],
                )
                try:
                    await self._read(
                        peer, arena, put, [blocks[pending.index] for pending in put.blocks], guard, until_s
                    )
                except BaseException:
                    index.abort_put(put)
                    raise
                stored += index.commit_put(put, [blocks[pending.index].digest for pending in put.blocks])
        finally:
            self._num_coming -= admitted
        self._counts["replicas_taken"] += len(stored)
        return stored

    async def _read(
        self, peer: Peer, arena: RemoteRegion, put: Put, blocks: Sequence[OfferedBlock], guard: Guard, until_s: float
    ) -> None:
        mine, slabs = self._index.arena, [pending.slab for pending in put.blocks]
        sources = np.asarray([block.offset for block in blocks], dtype=np.int64)
        reads = BlockList(arena, mine.region, sources, mine.offsets(slabs), put.nbytes)

        def copy_and_check() -> None:
            if not slabs:
                return
            self._engine.read_sync(peer, reads, guard=guard, deadline_s=max(0.001, until_s - time.monotonic()))
            for slab, block in zip(slabs, blocks, strict=True):
                if xxhash.xxh3_64_intdigest(mine.view(slab, put.nbytes).data) != block.digest:
                    self._counts["replicas_wrong"] += 1
                    raise IntegrityError(
                        f"block {block.block_hash.hex()} that arrived is not the one that the other node holds",
                        peer=peer.name,
                        stage="replica",
                    )

        await asyncio.get_running_loop().run_in_executor(self._threads, copy_and_check)


def assign(blocks: Sequence[BlockHeat[Entry]], nodes: Sequence[str]) -> dict[str, list[BlockHeat[Entry]]]:
    """Which node takes which blocks, in the order given."""
    assigned: dict[str, list[BlockHeat[Entry]]] = {}
    for block in blocks:
        node = choose_node(block, nodes)
        if node is not None:
            assigned.setdefault(node, []).append(block)
    return assigned


def _batch(entries: list[Entry]) -> tuple[list[Entry], list[Entry]]:
    """The first of these that make up one offer, all of one space; and the rest."""
    room, count = OFFER_BYTES, 0
    for entry in entries[:MAX_OFFERED]:
        room -= entry.nbytes
        if count and (room < 0 or entry.key[0] != entries[0].key[0]):
            break
        count += 1
    return entries[:count], entries[count:]
