"""The transfer engine: registered memory, connected peers, one-sided reads and writes of block lists.

On the event loop: the listener, control connections, futures. On threads: everything that blocks, that is the
transports' links. The synchronous calls run a transfer on the caller's thread and touch no loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from kvferry.errors import (
    KVError,
    PeerGone,
    RegistrationError,
    TransferTimeout,
    TransferUnfinished,
    TransportClosed,
    TransportError,
)
from kvferry.layout import Offsets
from kvferry.transfer.connections import Connections
from kvferry.transfer.control import EngineHello
from kvferry.transfer.jobs import Job, JobQueue
from kvferry.transfer.peer import Completion, Peer, TransportChoice
from kvferry.transfer.regions import RegionTable
from kvferry.transfer.settings import TransferSettings
from kvferry.transfer.transfers import Transfer, read_block
from kvferry.transfer.ways import PROBE_BYTES, Ways, close_ways
from kvferry.transport.base import BlockList, Guard, Region, RemoteRegion, Transport
from kvferry.transport.checksum import Sums
from kvferry.transport.memory import SharedBuffer
from kvferry.transport.registry import TransportContext, create_transport
from kvferry.transport.tcp import TcpTransport, split_address
from kvferry.types import Incarnation, new_incarnation
from kvferry.wire import require_secret


class TransferEngine:
    """One rank's way of moving KV blocks. All async calls belong to the loop that ran `start`."""

    def __init__(
        self,
        *,
        listen: str = "tcp://127.0.0.1:0",
        transports: tuple[str, ...] = ("cuda", "shm", "tcp"),
        secret: bytes | None = None,
        incarnation: Incarnation | None = None,
        hello: bytes = b"",
        settings: TransferSettings | None = None,
        check_hello: Callable[[bytes], None] | None = None,
    ) -> None:
        """
        Args:
            transports: schemes in order of preference among those of one reach; what is not installed is skipped.
            hello: what the room above tells peers of itself; `check_hello` may refuse theirs by raising a KVError.
        Raises: ConfigError for an unknown scheme, or a listener beyond loopback without a secret.
        """
        self.incarnation = incarnation or new_incarnation()
        self.hello, self.settings = hello, settings or TransferSettings()
        self.on_message: Callable[[Peer, bytes], None] | None = None
        self.on_peer: Callable[[Peer], None] | None = None
        self.on_peer_lost: Callable[[Peer, KVError], None] | None = None
        require_secret(split_address(listen)[0], secret, "the handoff listener")
        self._regions = RegionTable()
        self._exported: dict[int, RemoteRegion] = {}
        self._transports: dict[str, Transport] = {}
        missing: dict[str, str] = {}
        context = TransportContext(self.incarnation, secret, self.settings, self._find_region, shared_listener=True)
        for scheme in transports:
            try:
                self._transports[scheme] = create_transport(scheme, context)
            except TransportError as error:
                missing[scheme] = str(error)
        # Peers read this page to measure the way, and this side reads theirs into it: what it holds means nothing. Its
        # id is outside of what `register` gives.
        probe = SharedBuffer(PROBE_BYTES, name="kvferry-probe")
        self._probe_region = Region(0, probe.address, PROBE_BYTES, os.urandom(16).hex(), backing=(probe.fd, 0))
        self._probe_region_owner = probe
        self._export(self._probe_region)
        self._ways = Ways(self._transports, missing, probe=self._probe_region if self.settings.probe else None)
        self._jobs = JobQueue(
            threads=self.settings.worker_threads,
            per_peer=self.settings.transfers_per_peer,
            max_bytes=self.settings.max_bytes_in_flight,
        )
        tcp = self._transports.get("tcp")
        self._connections = Connections(
            listen=listen,
            secret=secret,
            incarnation=self.incarnation,
            settings=self.settings,
            tell=self._hello_now,
            check_app_hello=check_hello,
            adopt_stream=tcp.adopt if isinstance(tcp, TcpTransport) else None,
            on_peer=self._on_peer,
            on_lost=self._on_lost,
            on_region_gone=self._on_region_gone,
            on_message=self._on_peer_message,
        )
        self.refusals = self._connections.refusals
        self._pidfds: dict[Peer, int] = {}
        self._threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="kvferry-links")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    # Life

    @property
    def address(self) -> str:
        """Where this engine listens; what it really bound once `start` has returned."""
        return self._connections.address

    async def start(self) -> None:
        """Bind the listener. Raises: ConfigError naming the process that holds a taken port."""
        self._loop = asyncio.get_running_loop()
        await self._connections.start()

    async def close(self) -> None:
        """Part from all peers, fail what is pending with TransportClosed, join every thread. Idempotent."""
        if self._closed:
            return
        self._closed = True
        await self._connections.close(TransportClosed("this side closed its transfer engine"))
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self._close_blocking)
        # One turn of the loop, so that asyncio closes the control sockets.
        await asyncio.sleep(0)

    def _close_blocking(self) -> None:
        self._jobs.close()
        self._threads.shutdown(wait=True)
        for transport in self._transports.values():
            transport.close()
        self._regions.clear()
        self._exported.clear()
        self._probe_region_owner.close()

    # Memory

    def allocate(self, nbytes: int, *, writable: bool = False, name: str = "kv") -> Region:
        """Fresh zeroed memory that peers of this host can map; `region.buffer` is np.uint8 [nbytes].

        Raises: RegistrationError, TransportError where the system refuses.
        """
        return self._publish(self._regions.allocate(nbytes, writable=writable, name=f"kvferry-{name}"))

    def register(self, buffer: Any, *, writable: bool = False) -> Region:
        """Register a contiguous numpy array or torch tensor (host or CUDA); peers are told.

        Args:
            writable: lent out for peers' writes.
        Raises: RegistrationError.
        """
        return self._publish(self._regions.add(buffer, writable=writable))

    def unregister(self, region: Region) -> None:
        """Take memory back: peers' reads are refused from now on. Blocks until tcp peers are being sent none of it.

        A reader in shared memory may be in the middle of a copy; it finds out afterwards and throws the bytes away.
        Raises: RegistrationError if the region is not registered.
        """
        self._regions.remove(region)
        self._exported.pop(region.region_id, None)
        for transport in self._transports.values():
            transport.withdraw(region)
        self._on_loop(self._announce)

    def sums(self, region: Region, offsets: Offsets, nbytes: int, *, deadline_s: float) -> Sums | None:
        """int64 [num_blocks]: checksums (`kvferry.transport.checksum`) of a GPU region's blocks. Blocks.

        None where no transport runs on its GPU. Raises: RegistrationError, TransferTimeout, TransportError.
        """
        found = (t.sums(region, offsets, nbytes, deadline_s=deadline_s) for t in self._transports.values())
        return next((sums for sums in found if sums is not None), None)

    def _publish(self, region: Region) -> Region:
        try:
            self._export(region)
        except BaseException:
            self._regions.remove(region)
            for transport in self._transports.values():
                transport.withdraw(region)
            raise
        self._on_loop(self._announce)
        return region

    def _export(self, region: Region) -> None:
        handles = {}
        for scheme, transport in self._transports.items():
            handle = transport.export(region)
            if handle is not None:
                handles[scheme] = handle
        self._exported[region.region_id] = RemoteRegion(
            region.region_id, region.nbytes, region.token, region.kind, region.device, region.writable, handles
        )

    def _find_region(self, region_id: int) -> Region | None:
        return self._probe_region if region_id == 0 else self._regions.find(region_id)

    # Peers

    @property
    def peers(self) -> tuple[Peer, ...]:
        """Live peers, outbound and accepted."""
        return self._connections.peers

    async def connect(self, address: str, *, deadline_s: float) -> Peer:
        """Connect, shake hands, choose a transport.

        Raises: PeerGone if nobody listens; TransferTimeout; AuthenticationError, CompatibilityError, WireError.
        """
        if self._closed or self._loop is None:
            raise TransportClosed("the transfer engine is closed, or was not started")
        peer: Peer | None = None
        try:
            async with asyncio.timeout(deadline_s):
                peer = await self._connections.connect(address)
                await self._loop.run_in_executor(self._threads, self._ways.open, peer, deadline_s)
                self._watch_process(peer)
                return peer
        except TimeoutError as error:
            reason = TransferTimeout(f"{address} did not answer within {deadline_s:.3f} s", peer=address)
            if peer is not None:
                peer.abort(reason)
            raise reason from error
        except BaseException:
            if peer is not None:
                peer.abort(TransportClosed("connecting was given up", peer=address))
            raise

    def explain(self, peer: Peer) -> list[TransportChoice]:
        """The transports considered for this peer in order of preference, with the reason and the probe's figures."""
        return [way.choice() for way in peer.ways]

    def mapped(self, peer: Peer, region_id: int) -> npt.NDArray[np.uint8] | None:
        """The peer's region as this process sees it; None where it is not mapped here. See `Link.mapped`."""
        region = peer.regions.get(region_id)
        links = [way.link for way in peer.ways if way.link is not None and region and way.scheme in region.handles]
        return links[0].mapped(region) if links and region else None

    # Transfers

    async def read(
        self,
        peer: Peer,
        blocks: BlockList | list[BlockList],
        *,
        guard: Guard | None = None,
        deadline_s: float,
        priority: int = 0,
        summing: bool = False,
    ) -> Completion:
        """Copy blocks of the peer into registered memory here; a greater `priority` goes first.

        Args:
            summing: take the blocks' checksums on the way, where the transport can (`Completion.sums`).
        Raises:
            RegistrationError: offsets, sizes, regions or tokens do not fit; nothing was written.
            LeaseExpired: the guard's word was another one after the read.
            TransferTimeout, PeerGone, TransportClosed, TransportError: see kvferry.errors.
            TransferUnfinished: given up or cancelled, and bytes may still land, until it says that it is over.
        After any other failure or cancellation: the target blocks hold unspecified bytes; no further byte will land.
        """
        transfer = self._transfer(peer, blocks, guard, deadline_s, writing=False, summing=summing)
        return await self._run(transfer, priority)

    async def write(
        self, peer: Peer, blocks: BlockList | list[BlockList], *, deadline_s: float, priority: int = 0
    ) -> Completion:
        """Copy blocks from here into a region that the peer lent out (`writable`). Raises and failure as for `read`."""
        return await self._run(self._transfer(peer, blocks, None, deadline_s, writing=True), priority)

    async def load_word(self, peer: Peer, region_id: int, offset: int, *, deadline_s: float) -> int:
        """The 8 bytes at `offset` of the peer's region as a signed integer. Raises as `read` does."""
        assert self._loop is not None
        work = self._loop.run_in_executor(self._threads, self._load_word, peer, region_id, offset, deadline_s)
        return await work

    def read_sync(
        self,
        peer: Peer,
        blocks: BlockList | list[BlockList],
        *,
        guard: Guard | None = None,
        deadline_s: float,
    ) -> Completion:
        """As `read`, on this thread, which must be no event loop's: microseconds in shared memory."""
        if isinstance(blocks, BlockList) and len(blocks[2]) == 1:
            done = read_block(peer, blocks, guard, deadline_s, self._regions)
            if done is not None:
                return done
        return self._run_here(self._transfer(peer, blocks, guard, deadline_s, writing=False))

    def write_sync(self, peer: Peer, blocks: BlockList | list[BlockList], *, deadline_s: float) -> Completion:
        """As `write`, on this thread."""
        return self._run_here(self._transfer(peer, blocks, None, deadline_s, writing=True))

    def load_word_sync(self, peer: Peer, region_id: int, offset: int, *, deadline_s: float) -> int:
        """As `load_word`, on this thread."""
        return self._load_word(peer, region_id, offset, deadline_s)

    def _transfer(
        self,
        peer: Peer,
        blocks: BlockList | list[BlockList],
        guard: Guard | None,
        deadline_s: float,
        *,
        writing: bool,
        summing: bool = False,
    ) -> Transfer:
        if self._closed:
            raise TransportClosed("the transfer engine is closed", peer=peer.name)
        return Transfer(
            peer,
            blocks,
            guard,
            deadline_s,
            writing=writing,
            regions=self._regions,
            ways=self._ways,
            slice_bytes=self.settings.slice_bytes,
            suspend_s=self.settings.suspend_s,
            summing=summing,
        )

    async def _run(self, transfer: Transfer, priority: int) -> Completion:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def settle(error: BaseException | None) -> None:
            if done.done():
                return
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

        def finish(error: BaseException | None) -> None:
            loop.call_soon_threadsafe(settle, error)

        job = Job(
            peer=transfer.peer,
            priority=priority,
            nbytes=transfer.step_bytes,
            step=transfer.step,
            finish=finish,
            stop=transfer.stop,
        )
        transfer.job = job
        transfer.peer.transfers.add(transfer)
        self._jobs.submit(job)
        timer = loop.call_later(max(0.0, transfer.remaining_s()), self._stop_transfer, transfer)
        try:
            await asyncio.shield(done)
        except asyncio.CancelledError:
            self._stop_transfer(transfer)
            # Cancelled or not, the caller gets its memory back only when nothing is being written to it (T4).
            while not done.done():
                with contextlib.suppress(asyncio.CancelledError, KVError):
                    await asyncio.shield(done)
            unfinished = None if done.cancelled() else done.exception()
            if isinstance(unfinished, TransferUnfinished):
                raise unfinished from None
            raise
        finally:
            timer.cancel()
            transfer.peer.transfers.discard(transfer)
        return transfer.completion()

    def _run_here(self, transfer: Transfer) -> Completion:
        transfers = transfer.peer.transfers
        transfers.add(transfer)
        try:
            while transfer.step():
                pass
        finally:
            transfers.discard(transfer)
        return transfer.completion()

    def _stop_transfer(self, transfer: Transfer) -> None:
        """Stop it where it is: out of the queue at once, or as soon as its link returns."""
        transfer.stop.set()
        if transfer.job is not None and self._jobs.drop(transfer.job):
            transfer.job.finish(transfer.why_failed())

    def _load_word(self, peer: Peer, region_id: int, offset: int, deadline_s: float) -> int:
        region = peer.regions.get(region_id)
        if region is None:
            raise RegistrationError(f"the peer has no region {region_id} (any more)", peer=peer.name)
        return self._transfer(peer, [], None, deadline_s, writing=False).load_word(region, offset)

    # Peers come and go

    def _hello_now(self) -> EngineHello:
        offers = {scheme: dict(transport.offer()) for scheme, transport in self._transports.items()}
        return EngineHello(self.address, self.hello, offers, list(self._exported.values()))

    def _announce(self) -> None:
        self._connections.announce(dict(self._exported))

    def _on_peer(self, peer: Peer) -> None:
        self._announce()
        if self.on_peer is not None:
            self.on_peer(peer)

    def _on_peer_message(self, peer: Peer, payload: bytes) -> None:
        if self.on_message is not None:
            self.on_message(peer, payload)

    def _on_region_gone(self, peer: Peer, region: RemoteRegion) -> None:
        for link in [way.link for way in peer.ways if way.link is not None]:
            # On a thread: GPU memory is let go only when no copy reads it. Where this side is closed, all is let go.
            with contextlib.suppress(RuntimeError):
                self._threads.submit(link.forget, region)

    def _on_lost(self, peer: Peer, reason: KVError) -> None:
        peer.lost = reason
        for transfer in list(peer.transfers):
            transfer.closed = self._closed
            self._stop_transfer(transfer)
        pidfd = self._pidfds.pop(peer, None)
        if pidfd is not None and self._loop is not None:
            self._loop.remove_reader(pidfd)
            os.close(pidfd)
        if peer.ways or peer.opening.locked():
            self._threads.submit(close_ways, peer)
        if self.on_peer_lost is not None:
            self.on_peer_lost(peer, reason)

    def _watch_process(self, peer: Peer) -> None:
        """Notice the death of a process of this host even if a child of it keeps its sockets open."""
        assert self._loop is not None
        for way in peer.ways:
            pidfd = getattr(way.link, "pidfd", None)
            if pidfd is not None and peer.lost is None and peer not in self._pidfds:
                watched = self._pidfds[peer] = os.dup(pidfd)
                self._loop.add_reader(watched, peer.abort, PeerGone("the peer's process is dead", peer=peer.name))

    def _on_loop(self, call: Callable[[], None]) -> None:
        """Run `call` on the loop's thread: now if this is it, soon otherwise, not at all before `start`."""
        if self._loop is None or self._closed:
            return
        try:
            here = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            here = False
        if here:
            call()
        else:
            self._loop.call_soon_threadsafe(call)
