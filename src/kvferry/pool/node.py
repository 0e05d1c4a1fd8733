"""One node of the pool: an arena in shared memory and a disk tier, served to engines over a transfer engine.

Everything here runs on one event loop; bytes move on the transfer engine's and the disk's threads. Nobody but the node
writes into its arena: it pulls what is put, under a word of the client's that says the client still waits. Gets are
reads by the client, under a word of the node's that says that the blocks are still the same.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from kvferry.clock import Clock, RealClock
from kvferry.errors import KVError, PoolError
from kvferry.observe import get_log
from kvferry.pool.arena import Arena, arena_bytes
from kvferry.pool.directory import Directory
from kvferry.pool.disk import DiskTier, pages
from kvferry.pool.disk_queue import DiskQueue
from kvferry.pool.draining import Drain
from kvferry.pool.entries import Entry
from kvferry.pool.figures import Figures
from kvferry.pool.gets import Gets
from kvferry.pool.index import BlockIndex
from kvferry.pool.keys import require_hashes
from kvferry.pool.leases import Leases
from kvferry.pool.messages import (
    AskBlocks,
    AskSpaces,
    AskStat,
    Blocks,
    Counted,
    DrainState,
    Exists,
    Failed,
    GetBlocks,
    Leased,
    Message,
    NodeStat,
    Pin,
    Prefetch,
    PutBlocks,
    PutDone,
    Release,
    Remove,
    Reply,
    Request,
    Spaces,
    Tiers,
    Unpin,
)
from kvferry.pool.messages import Drain as DrainRequest
from kvferry.pool.neighbours import Cluster, Neighbours
from kvferry.pool.node_messages import Forget, NodeRequest, Offer, Taken
from kvferry.pool.pins import Pins
from kvferry.pool.puts import Puts
from kvferry.pool.removal import Removals
from kvferry.pool.replicas import Replicas
from kvferry.pool.reporter import Reporter
from kvferry.pool.settings import PoolSettings
from kvferry.pool.standing import Standing
from kvferry.transfer import Peer, TransferEngine, TransferSettings
from kvferry.transport.huge import collapse

MAX_REQUESTS_A_PEER = 256
_log = get_log(__name__)
Answer = Counted | Taken | NodeStat | Failed
"""What other nodes answer to this one."""

Work = PutBlocks | GetBlocks | Remove | AskSpaces | NodeRequest
"""Requests that take a while; all others are answered at once."""

_decoder = msgspec.msgpack.Decoder(Request | NodeRequest | Answer)


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
        self.figures = Figures()
        self.counts = self.figures.counts
        self._engine = TransferEngine(
            listen=listen,
            transports=transports,
            secret=secret,
            hello=b"kvferry-pool",
            # What a put brings over a network is checked there: its digest is taken of what arrived.
            settings=transfer or TransferSettings(verify_digest=True),
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
        self._closing = threading.Event()
        self._disk: DiskQueue | None = None
        if self.settings.disk_path is not None:
            began_s = time.monotonic()
            tier = DiskTier(Path(self.settings.disk_path), slab_bytes=slab_bytes, disk_bytes=self.settings.disk_bytes)
            self._disk = DiskQueue(tier, self._index, self.counts)
            _log.info("disk tier opened", blocks=len(tier.found), seconds=time.monotonic() - began_s)
        self._advertise_host = advertise_host
        self._cluster = None if directory is None else self._join(directory)
        if self._disk is not None and self._cluster is None:
            self._disk.adopt()
        self._removals = Removals(self._index, self._forgotten, self._cluster)
        self._replicas: Replicas | None = None
        self._drain: Drain | None = None
        if self._cluster is not None:
            self._replicas = Replicas(
                self._engine,
                self._index,
                self._leases,
                self._threads,
                self.counts,
                self._cluster,
                max_copies=self.settings.max_copies,
            )
            self._drain = Drain(self._index, self._replicas, self._cluster)
        self._pins = Pins(self._index)
        self._puts = Puts(
            self._engine,
            self._index,
            self._threads,
            self.figures,
            free_slots=self._free_slots,
            stored=self._write_behind,
            deadline_s=self.settings.pull_deadline_s,
        )
        self._gets = Gets(self._index, self._leases, self._disk, self.figures, self._used)
        self._standing = Standing(
            self._index,
            self._leases,
            self._disk,
            self.figures,
            address=lambda: self.address,
            state=lambda: self.state,
            quotas=self.settings.quotas,
        )
        self._tasks: dict[Peer, set[asyncio.Task[None]]] = {}
        # Gets under way, and whether their reader still waits: its release may come before it has its lease.
        self._wanted: dict[tuple[Peer, int], bool] = {}
        self._expiry: asyncio.Task[None] | None = None

    def _join(self, directory: Directory) -> Cluster:
        reporter = Reporter(
            directory,
            self._index,
            node=self._engine.incarnation,
            address=lambda: self.address,
            ttl_s=self.settings.node_ttl_s,
            counts=self.counts,
            # What lay on disk is served only when the directory told what was removed meanwhile.
            on_joined=self._adopt,
            on_epochs=self._forgotten,
        )
        return Cluster(directory, Neighbours(self._engine, directory), reporter)

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
        arena = self._arena.region
        collapsing = functools.partial(collapse, arena.address, arena.nbytes, stopped=self._closing.is_set)
        self._threads.submit(collapsing)
        self._expiry = asyncio.get_running_loop().create_task(self._expire_leases())
        if self._cluster is not None:
            self._cluster.reporter.start()
        if self._replicas is not None:
            self._replicas.start()

    async def close(self) -> None:
        """Stop serving; what is queued for the disk is written. Idempotent."""
        self._closing.set()
        if self._drain is not None:
            await self._drain.close()
        if self._replicas is not None:
            await self._replicas.close()
        if self._cluster is not None:
            await self._cluster.reporter.close()
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

    @property
    def state(self) -> str:
        """serving, draining (no puts) or drained (nothing any more)."""
        if self._drain is None or not self._drain.begun:
            return "serving"
        return "drained" if self._drain.has_left else "draining"

    def metrics(self) -> tuple[bytes, str]:
        """The body of `/metrics` and its content type."""
        return self._standing.metrics()

    def stat(self) -> NodeStat:
        """The node's figures now."""
        return self._standing.stat()

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
        if isinstance(request, Answer):
            if self._cluster is not None:
                self._cluster.neighbours.on_reply(peer, request)
        elif isinstance(request, Work):
            tasks = self._tasks.setdefault(peer, set())
            if len(tasks) >= MAX_REQUESTS_A_PEER:
                _send(peer, Failed(request.id, "pool_exhausted", f"{len(tasks)} requests of yours are being served"))
                return
            if isinstance(request, GetBlocks):
                self._wanted[peer, request.id] = True
            task = asyncio.get_running_loop().create_task(self._serve(peer, request))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        elif isinstance(request, Release):
            if not self._leases.end(peer, request.id) and (peer, request.id) in self._wanted:
                self._wanted[peer, request.id] = False
        else:
            self._reply(peer, request.id, lambda: self._answer(peer, request))

    def _answer(self, peer: Peer, request: Request) -> Reply:
        if isinstance(request, AskStat):
            return self._standing.stat(request.id)
        if isinstance(request, AskBlocks):
            return Blocks(request.id, self._standing.served_most(request.namespace, request.limit))
        if isinstance(request, DrainRequest):
            if self._drain is None:
                raise PoolError(
                    "this node has no directory, so it knows no node that could take its blocks", stage="drain"
                )
            return DrainState(request.id, *self._drain.begin(request.deadline_s))
        assert isinstance(request, Exists | Pin | Unpin | Prefetch)
        request.space.require_valid()
        if isinstance(request, Exists):
            hidden = self.state == "drained"
            return Tiers(
                request.id, [None] * len(request.hashes) if hidden else self._index.tiers(request.space, request.hashes)
            )
        if isinstance(request, Prefetch):
            found = [entry for entry in self._index.find(request.space, request.hashes) if entry is not None]
            return Counted(request.id, 0 if self._disk is None else self._disk.prefetch(found))
        change = self._pins.pin if isinstance(request, Pin) else self._pins.unpin
        return Counted(request.id, change(peer, request.space, request.hashes))

    async def _serve(self, peer: Peer, request: Work) -> None:
        try:
            reply = await self._work(peer, request)
        except KVError as error:
            self.counts[f"failed_{error.cause}"] += 1
            _log.warning("request failed", peer=peer.name, cause=error.cause, error=str(error))
            reply = Failed(request.id, error.cause, error.message)
        wanted = self._wanted.pop((peer, request.id), True)
        if not (_send(peer, reply) and wanted) and isinstance(reply, Leased):
            self._leases.end(peer, request.id)

    async def _work(self, peer: Peer, request: Work) -> Message:
        if isinstance(request, AskSpaces):
            return Spaces(request.id, await self._standing.spaces_everywhere(self._cluster))
        request.space.require_valid()
        if isinstance(request, Remove):
            count = await self._removals.remove(request.space, request.hashes)
            self.counts["removed"] += count
            _log.info("blocks removed", namespace=request.space.namespace, count=count,
                      cleared=request.hashes is None, peer=peer.name)  # fmt: skip
            return Counted(request.id, count)
        if isinstance(request, Forget):
            count = await self._removals.told(request)
            self.counts["removed_by_others"] += count
            return Counted(request.id, count)
        if isinstance(request, Offer):
            return await self._take(peer, request)
        require_hashes(request.hashes)
        if isinstance(request, GetBlocks):
            if self.state == "drained":
                request = msgspec.structs.replace(request, hashes=[])
            return await self._gets.serve(peer, request, lambda: _require_there(peer))
        if self.state != "serving":
            self.counts["put_refused_draining"] += len(request.hashes)
            return PutDone(request.id, 0, 0, len(request.hashes))
        return await self._puts.serve(peer, request)

    async def _take(self, peer: Peer, offer: Offer) -> Taken:
        if self._replicas is None:
            raise PoolError("this node belongs to no directory and takes no copies")
        require_hashes([block.block_hash for block in offer.blocks])
        stored = await self._replicas.take(peer, offer)
        self._free_slots()
        self._write_behind(stored)
        found = self._index.find(offer.space, [block.block_hash for block in offer.blocks])
        return Taken(offer.id, [entry is not None and entry.slab is not None for entry in found])

    def _reply(self, peer: Peer, request_id: int, answer: Callable[[], Reply]) -> None:
        try:
            reply = answer()
        except KVError as error:
            reply = Failed(request_id, error.cause, error.message)
        _send(peer, reply)

    # Ends

    def _on_peer_lost(self, peer: Peer, reason: KVError) -> None:
        if self._cluster is not None:
            self._cluster.neighbours.on_lost(peer, reason)
        ended = self._leases.end_all(peer)
        self._pins.end_all(peer)
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

    def _used(self, entries: Sequence[Entry]) -> None:
        if self._replicas is not None:
            self._replicas.used(entries)

    def _adopt(self) -> None:
        if self._disk is not None:
            self._disk.adopt()

    async def _forgotten(self) -> None:
        if self._disk is not None:
            await self._disk.wiped()

    def _write_behind(self, entries: list[Entry]) -> None:
        if self._disk is not None:
            for entry in entries:
                self._disk.write_behind(entry)

    def _free_slots(self) -> None:
        if self._disk is not None:
            self._disk.free_slots()


def _require_there(peer: Peer) -> None:
    if peer.lost is not None:
        raise peer.lost


def _send(peer: Peer, reply: Message) -> bool:
    """Send; False if the peer is gone."""
    if peer.lost is not None:
        return False
    try:
        peer.send(msgspec.msgpack.encode(reply))
    except KVError as error:
        _log.info("a reply could not be sent", peer=peer.name, cause=error.cause)
        return False
    return True
