"""One node of the pool: an arena in shared memory and a disk tier, served to engines over a transfer engine.

Everything here runs on one event loop; bytes move on the transfer engine's and the disk's threads. Nobody but the node
writes into its arena: it pulls what is put, under a word of the client's that says the client still waits. Gets are
reads by the client, under a word of the node's that says that the blocks are still the same.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import xxhash

from kvferry.clock import Clock, RealClock
from kvferry.errors import KVError, RegistrationError
from kvferry.layout import Offsets
from kvferry.observe import get_log
from kvferry.pool.arena import Arena, arena_bytes
from kvferry.pool.directory import Directory
from kvferry.pool.disk import DiskTier, pages
from kvferry.pool.disk_queue import DiskQueue
from kvferry.pool.index import BlockIndex, Entry, Put
from kvferry.pool.keys import BlockSpace, require_hashes
from kvferry.pool.leases import Leases
from kvferry.pool.messages import (
    AskStat,
    Counted,
    Exists,
    Failed,
    GetBlocks,
    Leased,
    NodeStat,
    Pin,
    PutBlocks,
    PutDone,
    Release,
    Remove,
    Reply,
    Request,
    SpaceStat,
    Tiers,
    Unpin,
)
from kvferry.pool.parts import block_bytes, part_runs, require_inside
from kvferry.pool.reporter import Reporter
from kvferry.pool.settings import PoolSettings
from kvferry.transfer import Peer, TransferEngine, TransferSettings
from kvferry.transport.base import BlockList, Guard

MAX_REQUESTS_A_PEER = 256
DISK_DEPTH = 8
"""Blocks that one get reads from disk at once."""

STEP_BYTES = 16 << 20
"""How much of a put is copied between two looks at its client's word; a put that was given up ends soon."""

_log = get_log(__name__)
_decoder = msgspec.msgpack.Decoder(Request)


class PoolNode:
    """Serves one host's part of the pool. All calls belong to the loop that ran `start`."""

    def __init__(
        self,
        *,
        settings: PoolSettings | None = None,
        listen: str = "tcp://127.0.0.1:0",
        secret: bytes | None = None,
        transports: tuple[str, ...] = ("shm", "tcp"),
        transfer: TransferSettings | None = None,
        directory: Directory | None = None,
        advertise_host: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        """
        Args:
            directory: told what this node has; its owner closes it.
            advertise_host: where other hosts reach this one, if not at the bound address.
        Raises: ConfigError for settings that do not fit, PoolExhausted where the disk has no room."""
        self.settings = settings or PoolSettings()
        self.counts: Counter[str] = Counter()
        self._engine = TransferEngine(
            listen=listen, transports=transports, secret=secret, hello=b"kvferry-pool", settings=transfer
        )
        self._engine.on_message = self._on_message
        self._engine.on_peer_lost = self._on_peer_lost
        slab_bytes, words = pages(self.settings.slab_bytes), self.settings.max_leases
        least = arena_bytes(1, slab_bytes, words)
        region = self._engine.allocate(max(self.settings.arena_bytes, least), name="arena")
        self._arena = Arena(region, slab_bytes=slab_bytes, num_words=words)
        self._index = BlockIndex(self._arena, eviction=self.settings.eviction, quotas=self.settings.quotas)
        self._leases = Leases(self._index, clock or RealClock(), self.settings.lease_ttl_s)
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="kvferry-pool")
        self._disk: DiskQueue | None = None
        self._disk_slots = 0
        if self.settings.disk_path is not None:
            began_s = time.monotonic()
            tier = DiskTier(Path(self.settings.disk_path), slab_bytes=slab_bytes, disk_bytes=self.settings.disk_bytes)
            self._disk, self._disk_slots = DiskQueue(tier, self._index, self.counts), tier.num_slots
            _log.info("disk tier opened", blocks=self._disk.num_blocks, seconds=time.monotonic() - began_s)
        self._advertise_host = advertise_host
        self._reporter: Reporter | None = None
        if directory is not None:
            self._reporter = Reporter(
                directory,
                self._index,
                node=self._engine.incarnation,
                address=lambda: self.address,
                ttl_s=self.settings.node_ttl_s,
            )
        self._pins: dict[Peer, Counter[tuple[BlockSpace, bytes]]] = {}
        self._tasks: dict[Peer, set[asyncio.Task[None]]] = {}
        self._expiry: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """Where clients connect, with the port as really bound; valid after `start`."""
        if self._advertise_host is None:
            return self._engine.address
        host = f"[{self._advertise_host}]" if ":" in self._advertise_host else self._advertise_host
        return f"tcp://{host}:{self._engine.address.rpartition(':')[2]}"

    async def start(self) -> None:
        """Bind and serve. Raises: ConfigError if the port is taken."""
        await self._engine.start()
        self._expiry = asyncio.get_running_loop().create_task(self._expire_leases())
        if self._reporter is not None:
            self._reporter.start()

    async def close(self) -> None:
        """Stop serving; what is queued for the disk is written. Idempotent."""
        if self._reporter is not None:
            await self._reporter.close()
        if self._expiry is not None:
            self._expiry.cancel()
            await asyncio.gather(self._expiry, return_exceptions=True)
            self._expiry = None
        await self._engine.close()
        await asyncio.gather(*(task for tasks in self._tasks.values() for task in tasks), return_exceptions=True)
        await asyncio.get_running_loop().run_in_executor(None, self._threads.shutdown)
        if self._disk is not None:
            await self._disk.close()
            self._disk = None

    def stat(self, request_id: int = 0) -> NodeStat:
        """The node's figures now."""
        return NodeStat(
            id=request_id,
            address=self.address,
            num_slabs=self._arena.num_slabs,
            free_slabs=self._arena.num_free,
            slab_bytes=self._arena.slab_bytes,
            disk_slots=self._disk_slots,
            blocks_on_disk=0 if self._disk is None else self._disk.num_blocks,
            leases=len(self._leases),
            counts={**self.counts, "evictions": self._index.evictions},
            spaces=[
                SpaceStat(space.fingerprint.hex(), space.namespace, blocks, host_bytes)
                for space, blocks, host_bytes in self._index.spaces()
            ],
        )

    def check_integrity(self) -> None:
        """Raises: AssertionError unless every slab has one owner."""
        self._index.check_integrity()

    # Requests

    def _on_message(self, peer: Peer, payload: bytes) -> None:
        try:
            request = _decoder.decode(payload)
        except msgspec.MsgspecError as error:
            _log.warning("a message that is no request; its connection is closed", peer=peer.name, error=str(error))
            peer.close()
            return
        if isinstance(request, PutBlocks | GetBlocks):
            tasks = self._tasks.setdefault(peer, set())
            if len(tasks) >= MAX_REQUESTS_A_PEER:
                _send(peer, Failed(request.id, "pool_exhausted", f"{len(tasks)} requests of yours are being served"))
                return
            task = asyncio.get_running_loop().create_task(self._serve(peer, request))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        elif isinstance(request, Release):
            self._leases.end(peer, request.id)
        else:
            self._reply(peer, request.id, lambda: self._answer(peer, request))

    def _answer(self, peer: Peer, request: Request) -> Reply:
        if isinstance(request, AskStat):
            return self.stat(request.id)
        assert isinstance(request, Exists | Pin | Unpin | Remove)
        request.space.require_valid()
        if isinstance(request, Exists):
            return Tiers(request.id, self._index.tiers(request.space, request.hashes))
        if isinstance(request, Remove):
            clearing = request.hashes is None
            index, space = self._index, request.space
            count = index.clear(space) if request.hashes is None else index.remove(space, request.hashes)
            self._free_slots()
            self.counts["removed"] += count
            _log.info("blocks removed", namespace=space.namespace, count=count, cleared=clearing, peer=peer.name)
            return Counted(request.id, count)
        return Counted(request.id, self._pin(peer, request))

    def _pin(self, peer: Peer, request: Pin | Unpin) -> int:
        mine, count = self._pins.setdefault(peer, Counter()), 0
        for block_hash in request.hashes:
            key = request.space, block_hash
            if isinstance(request, Pin):
                pinned = self._index.pin(request.space, [block_hash])
                mine[key] += pinned
            else:
                # A client takes back its own pins only.
                pinned = self._index.unpin(request.space, [block_hash]) if mine[key] else 0
                mine[key] = max(0, mine[key] - 1)
            count += pinned
            if not mine[key]:
                del mine[key]
        return count

    async def _serve(self, peer: Peer, request: PutBlocks | GetBlocks) -> None:
        try:
            request.space.require_valid()
            require_hashes(request.hashes)
            reply: Reply = await (
                self._put(peer, request) if isinstance(request, PutBlocks) else self._get(peer, request)
            )
        except KVError as error:
            self.counts[f"failed_{error.cause}"] += 1
            _log.warning("request failed", peer=peer.name, cause=error.cause, error=str(error))
            reply = Failed(request.id, error.cause, error.message)
        if not _send(peer, reply) and isinstance(reply, Leased):
            self._leases.end(peer, request.id)

    def _reply(self, peer: Peer, request_id: int, answer: Callable[[], Reply]) -> None:
        try:
            reply = answer()
        except KVError as error:
            reply = Failed(request_id, error.cause, error.message)
        _send(peer, reply)

    async def _put(self, peer: Peer, request: PutBlocks) -> PutDone:
        if len(request.places) != len(request.hashes):
            raise RegistrationError(f"{len(request.hashes)} hashes and {len(request.places)} places; one for each")
        require_inside(request.parts, _int64(request.places), peer.regions)
        index, nbytes = self._index, block_bytes(request.parts)
        put = index.begin_put(request.space, request.hashes, nbytes, first=request.first, length=request.length)
        self._free_slots()
        stored: list[Entry] = []
        if put.blocks:
            try:
                digests = await self._pull(peer, request, put)
            except BaseException:
                index.abort_put(put)
                raise
            stored = index.commit_put(put, digests)
            self._free_slots()
        self.counts["put_stored"] += len(stored)
        self.counts["put_duplicates"] += put.duplicates
        self.counts["put_refused"] += put.refused
        self.counts["put_bytes"] += len(stored) * put.nbytes
        if self._disk is not None:
            for entry in stored:
                self._disk.write_behind(entry)
        return PutDone(request.id, len(stored), put.duplicates, put.refused)

    async def _pull(self, peer: Peer, request: PutBlocks, put: Put) -> list[int]:
        """Copy the blocks from the client's memory into their slabs; returns their digests."""
        places = _int64([request.places[block.index] for block in put.blocks])
        slabs = [block.slab for block in put.blocks]
        guard = Guard(request.words_region, request.word_offset, request.word)
        sources, until_s = dict(peer.regions), time.monotonic() + self.settings.pull_deadline_s
        near = any(choice.usable and choice.scheme == "shm" for choice in self._engine.explain(peer))
        step = max(1, STEP_BYTES // put.nbytes) if near else len(slabs)

        def copy_and_digest() -> list[int]:
            digests: list[int] = []
            for first in range(0, len(slabs), step):
                some = slabs[first : first + step]
                blocks = [
                    BlockList(sources[run.region], self._arena.region, run.offsets, run.pool_offsets, run.nbytes)
                    for run in part_runs(request.parts, places[first : first + step], self._arena.offsets(some))
                ]
                left_s = max(0.001, until_s - time.monotonic())
                self._engine.read_sync(peer, blocks, guard=guard, deadline_s=left_s)
                digests += [xxhash.xxh3_64_intdigest(self._arena.view(slab, put.nbytes).data) for slab in some]
            return digests

        return await asyncio.get_running_loop().run_in_executor(self._threads, copy_and_digest)

    async def _get(self, peer: Peer, request: GetBlocks) -> Leased:
        held: dict[int, Entry] = {}
        try:
            from_disk = await self._hold_all(request, held)
            if peer.lost is not None:
                raise peer.lost
            entries = [held[position] for position in sorted(held)]
            lease = self._leases.grant(peer, request.id, entries)
        except BaseException:
            for entry in held.values():
                self._index.release(entry)
            raise
        self._index.use(entries, length=len(request.hashes))
        self.counts["get_host"] += len(entries) - from_disk
        self.counts["get_disk"] += from_disk
        self.counts["get_missed"] += len(request.hashes) - len(entries)
        self.counts["get_bytes"] += len(entries) * request.nbytes
        slabs = [entry.slab for entry in entries if entry.slab is not None]
        return Leased(
            id=request.id,
            found=[position in held for position in range(len(request.hashes))],
            arena=self._arena.region.region_id,
            offsets=self._arena.offsets(slabs).tolist(),
            digests=[entry.digest for entry in entries],
            word_offset=lease.word_offset,
            word=lease.word,
            from_disk=from_disk,
        )

    async def _hold_all(self, request: GetBlocks, held: dict[int, Entry]) -> int:
        """Hold what can be served, by its position in the request; returns how many came from disk."""
        on_disk: list[tuple[int, Entry]] = []
        for position, entry in enumerate(self._index.find(request.space, request.hashes)):
            if entry is None or entry.nbytes != request.nbytes:
                if request.prefix:
                    break
            elif entry.slab is not None:
                self._index.hold(entry)
                held[position] = entry
            else:
                on_disk.append((position, entry))
        if self._disk is None or not on_disk:
            return 0
        disk, turns = self._disk, asyncio.Semaphore(DISK_DEPTH)

        async def hold_from_disk(position: int, entry: Entry) -> None:
            async with turns:
                # Held as soon as it is there: the next load must not evict it.
                if await disk.load(entry) and self._index.in_host(entry):
                    self._index.hold(entry)
                    held[position] = entry

        await asyncio.gather(*(hold_from_disk(position, entry) for position, entry in on_disk))
        if request.prefix:
            usable = next((i for i in range(len(request.hashes)) if i not in held), len(request.hashes))
            for position in [position for position in held if position >= usable]:
                self._index.release(held.pop(position))
        return sum(position in held for position, _ in on_disk)

    # Ends

    def _on_peer_lost(self, peer: Peer, reason: KVError) -> None:
        ended = self._leases.end_all(peer)
        for (space, block_hash), count in self._pins.pop(peer, Counter()).items():
            for _ in range(count):
                self._index.unpin(space, [block_hash])
        if not self._tasks.get(peer):
            self._tasks.pop(peer, None)
        if ended:
            self.counts["leases_of_lost_peers"] += ended
            _log.info("a reader is gone; its leases ended", peer=peer.name, leases=ended, why=reason.cause)

    async def _expire_leases(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self.settings.lease_ttl_s / 4))
            expired = self._leases.expire()
            if expired:
                self.counts["leases_expired"] += expired
                _log.warning("leases expired before their readers were done", count=expired)

    def _free_slots(self) -> None:
        if self._disk is not None:
            self._disk.free_slots()


def _int64(values: list[int]) -> Offsets:
    return np.asarray(values, dtype=np.int64)


def _send(peer: Peer, reply: Reply) -> bool:
    """Send; False if the peer is gone."""
    if peer.lost is not None:
        return False
    try:
        peer.send(msgspec.msgpack.encode(reply))
    except KVError as error:
        _log.info("a reply could not be sent", peer=peer.name, cause=error.cause)
        return False
    return True
