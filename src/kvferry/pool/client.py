"""An engine's way to a pool node: batch calls on its own registered memory. On one event loop.

The pool is there to save work, so what goes wrong with it is a miss: `exists`, `get` and `put` raise only for wrong
arguments. The cause is in the result, counted in `failures`, and logged once for each change.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np

from kvferry.errors import KVError, PoolError, RegistrationError, TransferTimeout, TransportError
from kvferry.layout import Offsets
from kvferry.observe import get_log
from kvferry.pool.arena import new_word
from kvferry.pool.fetching import fetch_blocks
from kvferry.pool.keys import BlockSpace, Tier, require_hashes
from kvferry.pool.messages import (
    AskBlocks,
    AskSpaces,
    AskStat,
    Blocks,
    BlockStat,
    Counted,
    Drain,
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
    Spaces,
    SpaceStat,
    Tiers,
    Unpin,
)
from kvferry.pool.parts import BlockPart, Places, block_bytes, require_inside
from kvferry.transfer import Peer, TransferEngine, TransferSettings
from kvferry.transport.base import Region
from kvferry.transport.huge import collapse
from kvferry.transport.memory import WORD_BYTES, WordTable

MAX_PUTS = 512
RECONNECT_S = 1.0
_log = get_log(__name__)
_decoder = msgspec.msgpack.Decoder(Reply)
R = TypeVar("R", bound=Message)


class _LeftAlone(TransportError):
    """The node is not asked, as it could not be reached, or did not answer, a moment ago."""

    @property
    def cause(self) -> str:
        return TransportError("").cause


class GetResult(NamedTuple):
    """`found[i]`: block i is whole in the caller's memory. The others' places hold unspecified bytes.

    `node` is the address of the node that served.
    """

    found: list[bool]
    from_disk: int = 0
    transport: str | None = None
    cause: str | None = None
    node: str | None = None

    @property
    def num_prefix(self) -> int:
        """Blocks found before the first that was not."""
        return next((i for i, there in enumerate(self.found) if not there), len(self.found))


class PutResult(NamedTuple):
    """Blocks stored now, there already, and refused for want of room. The node reads none of them any more."""

    stored: int
    duplicates: int
    refused: int
    cause: str | None = None


class PoolClient:
    """One engine's connection to one node; made again by itself when the node comes back."""

    def __init__(
        self,
        address: str,
        space: BlockSpace,
        *,
        secret: bytes | None = None,
        transports: tuple[str, ...] = ("shm", "tcp"),
        transfer: TransferSettings | None = None,
        deadline_s: float = 5.0,
        listen: str = "tcp://127.0.0.1:0",
        fetch: Callable[..., Awaitable[str]] = fetch_blocks,
        on_lost: Callable[[Peer], None] = lambda peer: None,
    ) -> None:
        """
        Args:
            address: the node's `tcp://host:port`.
            space: what this engine's blocks are (model, namespace).
            deadline_s: for each call. After one that passed it, calls are misses at once for twice as long, or until
                the node answers after all.
            listen: where a node of another host fetches what is put, over TCP.
            fetch: brings the blocks of a lease to their places, as `fetch_blocks` does for host memory.
            on_lost: told of each connection to the node that ended.
        """
        space.require_valid()
        self.space, self.deadline_s = space, deadline_s
        self.failures: Counter[str] = Counter()
        self.address = address
        self._engine = TransferEngine(
            listen=listen, transports=transports, secret=secret, hello=b"kvferry-pool", settings=transfer
        )
        self._fetch, self._on_lost = fetch, on_lost
        self._engine.on_message = self._on_message
        self._engine.on_peer_lost = self._on_peer_lost
        self._words_region = self._engine.allocate(MAX_PUTS * WORD_BYTES, name="words")
        self._words = WordTable(self._words_region)
        self._regions: dict[int, Region] = {}
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Message]] = {}
        self._peer: Peer | None = None
        self._connecting = asyncio.Lock()
        self._retry_at_s = 0.0
        self._last_cause: str | None = None

    async def start(self) -> None:
        """Be ready; the node is looked for at the first call."""
        await self._engine.start()

    async def close(self) -> None:
        """Part from the node, which drops this client's leases and pins. Idempotent."""
        await self._engine.close()

    def allocate(self, nbytes: int) -> Region:
        """Shared memory for blocks: a node of this host maps it. `region.buffer` is uint8 [nbytes], resident."""
        region = self._engine.allocate(nbytes)
        collapse(region.address, region.nbytes)
        return self._keep(region)

    def register(self, buffer: Any) -> Region:
        """Register memory for blocks (numpy or torch CPU, contiguous)."""
        return self._keep(self._engine.register(buffer))

    def _keep(self, region: Region) -> Region:
        self._regions[region.region_id] = region
        return region

    # Calls

    async def exists(self, hashes: Sequence[bytes]) -> list[Tier | None]:
        """For each block the fastest tier that holds it; all None where the node can't be asked."""
        try:
            tiers = (await self._ask(Exists(next(self._ids), self.space, list(hashes)), Tiers)).tiers
            if len(tiers) != len(hashes):
                raise PoolError(
                    f"the node at {self.address} told of {len(tiers)} blocks where {len(hashes)} were asked for"
                )
            return tiers
        except KVError as error:
            self._count(error)
            return [None] * len(hashes)

    async def get(
        self,
        hashes: Sequence[bytes],
        parts: Sequence[BlockPart],
        places: Places,
        *,
        prefix: bool = True,
    ) -> GetResult:
        """Copy blocks from the pool into registered memory here.

        Args:
            parts: what a block consists of at this side.
            places: int64 [num_hashes], where each block goes, as `parts` count.
            prefix: stop at the first miss, as what follows would be useless.
        Raises: RegistrationError where regions and places do not fit.
        After failure or cancellation: nothing more is written.
        """
        targets = self._checked(hashes, parts, places)
        missed = [False] * len(hashes)
        peer, lease_id = None, next(self._ids)
        until_s = time.monotonic() + self.deadline_s
        try:
            peer = await self._connect(until_s)
            request = GetBlocks(lease_id, self.space, list(hashes), block_bytes(parts), prefix)
            lease = await self._ask_peer(peer, request, Leased, until_s)
            _require_fitting(lease, len(hashes), block_bytes(parts), peer)
            if not any(lease.found):
                return GetResult(missed)
            picked = targets[np.asarray(lease.found)]
            transport = await self._fetch(
                self._engine, peer, lease, parts=parts, places=picked, regions=self._regions, until_s=until_s
            )
            self._last_cause = None
            return GetResult(lease.found, lease.from_disk, transport, node=self.address)
        except RegistrationError:
            raise
        except KVError as error:
            self._count(error)
            return GetResult(missed, cause=error.cause)
        finally:
            if peer is not None:
                self._send(peer, Release(lease_id))

    async def put(
        self,
        hashes: Sequence[bytes],
        parts: Sequence[BlockPart],
        places: Places,
        *,
        first: int = 0,
        length: int = 0,
    ) -> PutResult:
        """Copy blocks into the pool; the memory may change again when this returns, whatever the result.

        Args:
            parts: what a block consists of at this side.
            places: int64 [num_hashes], where each block lies, as `parts` count.
            first, length: they are blocks `first` onwards of a prompt of `length` blocks.
        Raises: RegistrationError where regions and places do not fit, or the node's slabs are smaller.
        """
        sources = self._checked(hashes, parts, places)
        word, request_id = new_word(), next(self._ids)
        at: int | None = None
        until_s = time.monotonic() + self.deadline_s
        try:
            at = self._words.allocate(word)
            peer = await self._connect(until_s)
            request = PutBlocks(
                id=request_id,
                space=self.space,
                hashes=list(hashes),
                parts=list(parts),
                places=sources.tolist(),
                words_region=self._words_region.region_id,
                word_offset=at,
                word=word,
                first=first,
                length=length,
            )
            done = await self._ask_peer(peer, request, PutDone, until_s)
            self._last_cause = None
            return PutResult(done.stored, done.duplicates, done.refused)
        except RegistrationError:
            raise
        except KVError as error:
            self._count(error)
            return PutResult(0, 0, 0, error.cause)
        finally:
            # The word falls before the caller may change its blocks: a node that still reads them throws them away.
            if at is not None:
                self._words.free(at)

    async def pin(self, hashes: Sequence[bytes]) -> int:
        """Keep these blocks in the node's host memory while this client is connected; returns how many are there.

        Raises: TransportError, PoolError, as do the calls below.
        """
        return (await self._ask(Pin(next(self._ids), self.space, list(hashes)), Counted)).count

    async def unpin(self, hashes: Sequence[bytes]) -> int:
        """Take back one pin of each."""
        return (await self._ask(Unpin(next(self._ids), self.space, list(hashes)), Counted)).count

    async def prefetch(self, hashes: Sequence[bytes]) -> int:
        """Let the node bring what it has of these blocks on disk only into host memory, as they may be asked for soon.

        Returns: how many are on their way; 0 where the node can't be asked.
        """
        require_hashes(list(hashes))
        try:
            return (await self._ask(Prefetch(next(self._ids), self.space, list(hashes)), Counted)).count
        except KVError as error:
            self._count(error)
            return 0

    async def remove(self, hashes: Sequence[bytes]) -> int:
        """Forget these blocks, on all nodes of the directory; returns how many copies there were.

        Raises: PoolError where a node could not be told; it forgets the namespace when it hears from the directory.
        """
        return (await self._ask(Remove(next(self._ids), self.space, list(hashes)), Counted)).count

    async def clear(self) -> int:
        """Forget all blocks of this client's space, as `remove` does."""
        return (await self._ask(Remove(next(self._ids), self.space, None), Counted)).count

    async def stat(self) -> NodeStat:
        """The node's figures."""
        return await self._ask(AskStat(next(self._ids)), NodeStat)

    async def spaces_everywhere(self) -> list[SpaceStat]:
        """The spaces of which any node of the directory holds blocks, with their blocks and bytes over all nodes.

        Raises: PoolError where a node can't be asked.
        """
        return (await self._ask(AskSpaces(next(self._ids)), Spaces)).spaces

    async def served_most(self, limit: int) -> list[BlockStat]:
        """The blocks of this client's namespace, of all models, that served most often."""
        return (await self._ask(AskBlocks(next(self._ids), self.space.namespace, limit), Blocks)).blocks

    async def drain(self, deadline_s: float) -> DrainState:
        """Take the node out of service, within `deadline_s`; it begins with the first call, and others ask how far it
        is."""
        return await self._ask(Drain(next(self._ids), deadline_s), DrainState)

    # Inside

    async def _ask(self, request: Message, kind: type[R]) -> R:
        until_s = time.monotonic() + self.deadline_s
        return await self._ask_peer(await self._connect(until_s), request, kind, until_s)

    async def _ask_peer(self, peer: Peer, request: Message, kind: type[R], until_s: float) -> R:
        if peer.lost is not None:
            raise peer.lost
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[Message] = loop.create_future()
        self._waiting[request.id] = reply
        # A timer of its own, as `asyncio.timeout` costs a tenth of a lookup.
        timer = loop.call_later(max(0.0, until_s - time.monotonic()), self._give_up, reply, peer)
        try:
            peer.send(msgspec.msgpack.encode(request))
            answer = await reply
        finally:
            timer.cancel()
            self._waiting.pop(request.id, None)
        if isinstance(answer, Failed):
            if answer.cause == RegistrationError("").cause:
                raise RegistrationError(answer.message, peer=peer.name)
            raise PoolError(f"the pool node refused: {answer.message} ({answer.cause})", peer=peer.name)
        if not isinstance(answer, kind):
            raise PoolError(
                "the pool node answered something that was not asked; is it of this release?", peer=peer.name
            )
        return answer

    def _give_up(self, reply: asyncio.Future[Message], peer: Peer) -> None:
        if not reply.done():
            why = f"the pool node did not answer within {self.deadline_s:.3f} s: it is stopped or overloaded"
            reply.set_exception(TransferTimeout(why, peer=peer.name))

    async def _connect(self, until_s: float) -> Peer:
        peer = self._peer
        if peer is not None and peer.lost is None and time.monotonic() >= self._retry_at_s:
            return peer
        async with self._connecting:
            now_s = time.monotonic()
            if now_s < self._retry_at_s:
                raise _LeftAlone(f"the pool node {self.address} did not answer a moment ago")
            if self._peer is not None and self._peer.lost is None:
                return self._peer
            try:
                self._peer = await self._engine.connect(self.address, deadline_s=max(0.001, until_s - now_s))
            except KVError:
                self._retry_at_s = time.monotonic() + RECONNECT_S
                raise
            return self._peer

    def _checked(self, hashes: Sequence[bytes], parts: Sequence[BlockPart], places: Places) -> Offsets:
        """int64 [num_hashes]. Raises: RegistrationError."""
        require_hashes(list(hashes))
        checked = np.ascontiguousarray(places, dtype=np.int64)
        if checked.shape != (len(hashes),):
            raise RegistrationError(
                f"{len(hashes)} hashes and places of shape {checked.shape}; one place for each hash"
            )
        require_inside(parts, checked, self._regions)
        return checked

    def _on_message(self, peer: Peer, payload: bytes) -> None:
        try:
            reply = _decoder.decode(payload)
        except msgspec.MsgspecError as error:
            _log.warning("a message that is no reply; the connection is closed", peer=peer.name, error=str(error))
            peer.close()
            return
        waiting = self._waiting.get(reply.id)
        if waiting is not None and not waiting.done():
            waiting.set_result(reply)
        elif waiting is None:
            # Late, but there: the node was not stopped, or is not any more, and need not be left alone.
            self._retry_at_s = 0.0

    def _on_peer_lost(self, peer: Peer, reason: KVError) -> None:
        self._on_lost(peer)
        if peer is not self._peer:
            return
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(reason)

    def _send(self, peer: Peer, request: Message) -> None:
        if peer.lost is None:
            try:
                peer.send(msgspec.msgpack.encode(request))
            except KVError as error:
                self._count(error)

    def _count(self, error: KVError) -> None:
        self.failures[error.cause] += 1
        if isinstance(error, TransferTimeout):
            # A node that is stopped costs one deadline, not one a call.
            self._retry_at_s = time.monotonic() + 2 * self.deadline_s
        # Between two tries there is nothing new to say.
        if error.cause != self._last_cause and not isinstance(error, _LeftAlone):
            self._last_cause = error.cause
            _log.warning("the pool did not serve; misses", node=self.address, cause=error.cause, error=str(error))


def _require_fitting(lease: Leased, num_hashes: int, nbytes: int, peer: Peer) -> None:
    """Whether a lease is for what was asked, and lies in the arena: else blocks that were never copied would count as
    found, and a GPU that copies out of the arena by itself would read beside it.

    Raises: PoolError.
    """
    arena, num_found = peer.regions.get(lease.arena), sum(lease.found)
    if not len(lease.found) == num_hashes or not len(lease.offsets) == len(lease.digests) == num_found:
        raise PoolError(
            f"the node answered for {len(lease.found)} of {num_hashes} blocks, with {len(lease.offsets)} places and "
            f"{len(lease.digests)} digests for {num_found} that it has",
            peer=peer.name,
        )
    if arena is not None and num_found and not 0 <= min(lease.offsets) <= max(lease.offsets) <= arena.nbytes - nbytes:
        raise PoolError(
            f"the node leased blocks of {nbytes} bytes at {min(lease.offsets)} to {max(lease.offsets)} in an arena of "
            f"{arena.nbytes} bytes",
            peer=peer.name,
        )
