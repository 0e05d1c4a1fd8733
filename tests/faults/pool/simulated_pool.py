"""A pool of real nodes under a virtual clock: real `PoolNode`s and a real embedded directory, on an event loop whose
time jumps and over connections that are late, lost or cut. Everything is decided by one seeded generator.

Blocks carry their version: a block that is put again after a removal has other bytes. So a reader sees whether a copy
outlived the removal of what it is a copy of.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import secrets
import selectors
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from kvferry.clock import Clock
from kvferry.errors import KVError, LeaseExpired, PeerGone, TransportError
from kvferry.pool.directory import Directory, EmbeddedDirectory, KnownEpochs
from kvferry.pool.epochs import FIRST, Epoch
from kvferry.pool.keys import BlockSpace
from kvferry.pool.messages import GetBlocks, Leased, Message, PutBlocks, Release, Reply
from kvferry.pool.node import PoolNode
from kvferry.pool.node_messages import NodeRequest, Taken
from kvferry.pool.parts import BlockPart
from kvferry.transport.base import BlockList, Guard, Region
from kvferry.types import Incarnation

SLAB = 4096
SPACES = (BlockSpace(b"f" * 32, "a"), BlockSpace(b"f" * 32, "b"))


class _NoWait(selectors.SelectSelector):
    """Watches nothing and does not wait: its loop's time jumps by what it would have waited."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        self._loop.passed_s += timeout or 0.0
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop without real time, threads or sockets. Work for threads runs on it, in one go, a little later."""

    def __init__(self, rng: random.Random) -> None:
        self.passed_s, self.rng = 0.0, rng
        super().__init__(_NoWait(self))

    def time(self) -> float:
        return self.passed_s

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        async def later() -> Any:
            await asyncio.sleep(self.rng.random() * 0.02)
            return func(*args)

        return asyncio.ensure_future(later(), loop=self)


class NoThreads:
    """An executor of which the loop makes no use."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def submit(self, *_: Any, **__: Any) -> None:
        """What a node does besides, for speed."""

    def shutdown(self, wait: bool = True) -> None:
        pass


class LoopClock(Clock):
    """The loop's time."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def now_s(self) -> float:
        return self._loop.time()


class Wire:
    """What lies between nodes: delays, and cuts between any two."""

    def __init__(self, loop: VirtualLoop, rng: random.Random) -> None:
        self.loop, self.rng = loop, rng
        self.engines: dict[str, SimEngine] = {}
        self.cut: set[frozenset[str]] = set()
        self.ports = itertools.count(1)
        self.slowest_s = 0.3
        self.lost = 0.005

    def open(self, one: str, other: str) -> bool:
        return frozenset((one, other)) not in self.cut

    def delay_s(self) -> float:
        return self.rng.random() * min(self.slowest_s, self.rng.choice((0.002, 0.01, 0.3)))


class SimPeer:
    """One end of a connection."""

    def __init__(self, wire: Wire, here: SimEngine, there: SimEngine, *, outbound: bool) -> None:
        self.wire, self.here, self.there = wire, here, there
        self.address, self.incarnation, self.outbound = there.address, there.incarnation, outbound
        self.name = f"{self.address}#{self.incarnation:x}"
        self.lost: KVError | None = None
        self.other: SimPeer | None = None
        self._ready_s = 0.0

    @property
    def regions(self) -> dict[int, Region]:
        return self.there.regions

    def send(self, payload: bytes) -> None:
        if self.lost is not None:
            raise self.lost
        if not self.wire.open(self.here.address, self.address):
            return
        # In order, as over one connection.
        self._ready_s = max(self._ready_s, self.wire.loop.time() + self.wire.delay_s())
        self.wire.loop.call_at(self._ready_s, self._arrive, payload)

    def _arrive(self, payload: bytes) -> None:
        other = self.other
        assert other is not None
        if other.lost is None and not self.there.closed and self.there.on_message is not None:
            self.there.on_message(other, payload)

    def close(self) -> None:
        self.lose(TransportError("closed"))

    abort = close

    def lose(self, reason: KVError) -> None:
        for end in (self, self.other):
            if end is not None and end.lost is None:
                end.lost = reason
                if not end.here.closed and end.here.on_peer_lost is not None:
                    end.here.on_peer_lost(end, reason)


class SimEngine:
    """What a node asks of its transfer engine; bytes move at once, unless the way is cut."""

    wire: Wire

    def __init__(self, **_: Any) -> None:
        self.incarnation = Incarnation(self.wire.rng.randrange(1, 1 << 60))
        self.address = f"tcp://node:{next(self.wire.ports)}"
        self.regions: dict[int, Region] = {}
        self.on_message: Any = None
        self.on_peer_lost: Any = None
        self.peers: list[SimPeer] = []
        self.closed = False

    def allocate(self, nbytes: int, *, name: str = "") -> Region:
        memory = np.zeros(nbytes + 4096, dtype=np.uint8)
        memory = memory[-memory.ctypes.data % 4096 :][:nbytes]
        region = Region(len(self.regions) + 1, memory.ctypes.data, nbytes, "0" * 32, buffer=memory)
        self.regions[region.region_id] = region
        return region

    async def start(self) -> None:
        self.wire.engines[self.address] = self

    async def close(self) -> None:
        for peer in list(self.peers):
            peer.lose(PeerGone("closed"))
        self.closed = True
        self.wire.engines.pop(self.address, None)

    def die(self) -> None:
        """As kill -9: what it served is gone, and others notice."""
        self.closed = True
        self.wire.engines.pop(self.address, None)
        for peer in list(self.peers):
            peer.lose(PeerGone("dead"))

    async def connect(self, address: str, *, deadline_s: float) -> SimPeer:
        await asyncio.sleep(self.wire.delay_s())
        there = self.wire.engines.get(address)
        if there is None or not self.wire.open(self.address, address):
            raise PeerGone(f"cannot connect to {address}")
        mine, theirs = SimPeer(self.wire, self, there, outbound=True), SimPeer(self.wire, there, self, outbound=False)
        mine.other, theirs.other = theirs, mine
        self.peers.append(mine)
        there.peers.append(theirs)
        return mine

    def explain(self, peer: SimPeer) -> list[Any]:
        return []

    def mapped(self, peer: SimPeer, region_id: int) -> None:
        return None

    def read_sync(self, peer: SimPeer, blocks: Any, *, guard: Guard | None = None, deadline_s: float = 0.0) -> None:
        if peer.lost is not None or not self.wire.open(self.address, peer.address):
            raise PeerGone("cut")
        for each in blocks if isinstance(blocks, list) else [blocks]:
            copy_blocks(each)
        if guard is not None and word_at(peer.regions[guard.region_id], guard.offset) != guard.word:
            raise LeaseExpired("the word changed")


def copy_blocks(blocks: BlockList) -> None:
    assert isinstance(blocks.source, Region) and isinstance(blocks.target, Region)
    for here, there in zip(blocks.source_offsets.tolist(), blocks.target_offsets.tolist(), strict=True):
        blocks.target.buffer[there : there + blocks.nbytes] = blocks.source.buffer[here : here + blocks.nbytes]


def word_at(region: Region, offset: int) -> int:
    return int(region.buffer[offset : offset + 8].view(np.int64)[0])


class SimDirectory(Directory):
    """One node's view of the directory: late, out of reach where the way to it is cut, and now and then an answer is
    lost though the call was carried out."""

    def __init__(self, wire: Wire, shared: list[EmbeddedDirectory], who: Callable[[], str]) -> None:
        self._wire, self._shared, self._who = wire, shared, who

    async def _call(self, name: str, *args: Any, **named: Any) -> Any:
        for before in (True, False):
            await asyncio.sleep(self._wire.delay_s())
            if not self._wire.open(self._who(), "directory") or self._wire.rng.random() < self._wire.lost:
                raise TransportError("the directory did not answer")
            if before:
                answer = await getattr(self._shared[0], name)(*args, **named)
        return answer

    async def renew(self, node: Incarnation, ttl_s: float) -> bool:
        return bool(await self._call("renew", node, ttl_s))

    async def join(self, node: Incarnation, address: str, ttl_s: float, *, seen: Epoch = FIRST) -> bool:
        return bool(await self._call("join", node, address, ttl_s, seen=seen))

    async def report(self, node: Incarnation, added: Any, removed: Any) -> None:
        await self._call("report", node, added, removed)

    async def leave(self, node: Incarnation) -> None:
        await self._call("leave", node)

    async def lookup(self, space: BlockSpace, hashes: Any) -> list[tuple[str, ...]]:
        return list(await self._call("lookup", space, hashes))

    async def nodes(self) -> dict[Incarnation, str]:
        return dict(await self._call("nodes"))

    async def epochs(self) -> KnownEpochs:
        return KnownEpochs(*await self._call("epochs"))

    async def change_epoch(self, space: BlockSpace, old: Epoch, new: Epoch) -> bool:
        return bool(await self._call("change_epoch", space, old, new))

    async def close(self) -> None:
        pass


class SimClient:
    """An engine of one node's host. Its region holds one block a place; its word stands as long as it waits."""

    _decoder = msgspec.msgpack.Decoder(Reply | NodeRequest | Taken)

    def __init__(self, wire: Wire, node: PoolNode) -> None:
        self._engine = SimEngine()
        self._engine.on_message = self._on_message
        self._engine.on_peer_lost = self._on_lost
        self._wire, self.node = wire, node
        self.region, self._words = self._engine.allocate(8 * SLAB), self._engine.allocate(4096)
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._peer: SimPeer | None = None

    async def ask(self, request: Message, deadline_s: float = 1.0) -> Any:
        """The reply. Raises: TransportError where there is none."""
        address = self.node._engine.address
        if self._peer is None or self._peer.lost is not None:
            self._peer = await self._engine.connect(address, deadline_s=deadline_s)
        reply = self._waiting[request.id] = asyncio.get_running_loop().create_future()
        try:
            self._peer.send(msgspec.msgpack.encode(request))
            async with asyncio.timeout(deadline_s):
                return await reply
        except TimeoutError as error:
            raise TransportError("no answer") from error
        finally:
            self._waiting.pop(request.id)

    def new_id(self) -> int:
        return next(self._ids)

    async def put(self, space: BlockSpace, hashes: list[bytes], versions: list[int], first: int) -> None:
        for row, version in enumerate(versions):
            self.region.buffer[row * SLAB : (row + 1) * SLAB] = content(space, hashes[row], version)
        words = self._words.buffer[:8].view(np.int64)
        words[0] = secrets.randbits(62) | 1
        request = PutBlocks(
            id=self.new_id(),
            space=space,
            hashes=hashes,
            parts=[BlockPart(self.region.region_id, 0, SLAB, SLAB)],
            places=list(range(len(hashes))),
            words_region=self._words.region_id,
            word_offset=0,
            word=int(words[0]),
            first=first,
            length=8,
        )
        try:
            await self.ask(request)
        finally:
            words[0] = 0

    async def get(self, space: BlockSpace, hashes: list[bytes]) -> list[np.ndarray | None]:
        """The blocks' bytes as read under the lease; None for a miss."""
        request = GetBlocks(self.new_id(), space, hashes, SLAB, False)
        peer: SimPeer | None = None
        try:
            lease = await self.ask(request)
            peer = self._peer
            if not isinstance(lease, Leased):
                return [None] * len(hashes)
            assert peer is not None
            arena = peer.regions[lease.arena]
            read: list[np.ndarray | None] = [None] * len(hashes)
            places = [i for i, found in enumerate(lease.found) if found]
            # Now and then a reader is slower than its lease.
            await asyncio.sleep(2.0 if self._wire.rng.random() < 0.1 else 0.0)
            for place, offset in zip(places, lease.offsets, strict=True):
                await asyncio.sleep(self._wire.delay_s())
                read[place] = arena.buffer[offset : offset + SLAB].copy()
            if word_at(arena, lease.word_offset) != lease.word:
                return [None] * len(hashes)
            return read
        finally:
            if peer is not None and peer.lost is None:
                peer.send(msgspec.msgpack.encode(Release(request.id)))

    def _on_message(self, peer: SimPeer, payload: bytes) -> None:
        reply = self._decoder.decode(payload)
        waiting = self._waiting.get(reply.id)
        if waiting is not None and not waiting.done():
            waiting.set_result(reply)

    def _on_lost(self, peer: SimPeer, reason: KVError) -> None:
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(reason)


def content(space: BlockSpace, block_hash: bytes, version: int) -> np.ndarray:
    """uint8 [SLAB]: says in every 16 bytes whose block in which version it is."""
    line = b"%s%c%012d--" % (space.namespace.encode(), block_hash[0], version)
    return np.frombuffer(line * (SLAB // 16), dtype=np.uint8)


def version_of(read: np.ndarray, space: BlockSpace, block_hash: bytes) -> int:
    """Raises: AssertionError if these bytes are not all of this block's in one version."""
    line = read[:16].tobytes()
    assert (read.reshape(-1, 16) == read[:16]).all(), f"torn: {line!r}"
    assert line[:2] == space.namespace.encode() + block_hash, f"{line!r} for {space.namespace} {block_hash!r}"
    return int(line[2:14])
