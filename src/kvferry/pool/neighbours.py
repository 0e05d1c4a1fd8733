"""A node's connections to the other nodes of its directory, over its own transfer engine. On the node's event loop."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import NamedTuple, TypeVar

import msgspec

from kvferry.errors import KVError, PoolError, TransferTimeout
from kvferry.pool.directory import Directory
from kvferry.pool.messages import Failed, Message
from kvferry.pool.reporter import Reporter
from kvferry.transfer import Peer, TransferEngine

R = TypeVar("R", bound=Message)


class Neighbours:
    """The other live nodes by address; a connection is made when there is something to say."""

    def __init__(self, engine: TransferEngine, directory: Directory) -> None:
        self._engine, self._directory = engine, directory
        self._peers: dict[str, Peer] = {}
        self._connecting: dict[str, asyncio.Lock] = {}
        self._ids = itertools.count(1)
        self._waiting: dict[int, tuple[Peer, asyncio.Future[Message]]] = {}

    async def addresses(self) -> list[str]:
        """Where the other live nodes are. Raises: TransportError if the directory can't be asked."""
        nodes = await self._directory.nodes()
        return sorted(address for node, address in nodes.items() if node != self._engine.incarnation)

    async def connect(self, address: str, *, deadline_s: float) -> Peer:
        """The connection to a node. Raises: KVError if it can't be reached."""
        async with self._connecting.setdefault(address, asyncio.Lock()):
            peer = self._peers.get(address)
            if peer is None or peer.lost is not None:
                peer = self._peers[address] = await self._engine.connect(address, deadline_s=deadline_s)
            return peer

    def new_id(self) -> int:
        """For a request."""
        return next(self._ids)

    async def ask(self, peer: Peer, request: Message, kind: type[R], *, deadline_s: float) -> R:
        """Send a request and wait for its reply.

        Raises: TransportError if it does not come in time, PoolError if the node refuses.
        """
        if peer.lost is not None:
            raise peer.lost
        began_s = time.monotonic()
        reply: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[request.id] = peer, reply
        try:
            peer.send(msgspec.msgpack.encode(request))
            async with asyncio.timeout(deadline_s):
                answer = await reply
        except TimeoutError as error:
            waited_s = time.monotonic() - began_s
            why = f"the other node did not answer within {waited_s:.3f} s: it is stopped or overloaded"
            raise TransferTimeout(why, peer=peer.name) from error
        finally:
            del self._waiting[request.id]
        if isinstance(answer, kind):
            return answer
        if isinstance(answer, Failed):
            raise PoolError(f"the other node refused: {answer.message} ({answer.cause})", peer=peer.name)
        raise PoolError("the other node answered something that was not asked; is it of this release?", peer=peer.name)

    def on_reply(self, peer: Peer, reply: Message) -> None:
        """A node answered; an answer that nobody waits for any more is passed over."""
        waiting = self._waiting.get(reply.id)
        if waiting is not None and waiting[0] is peer and not waiting[1].done():
            waiting[1].set_result(reply)

    def on_lost(self, peer: Peer, reason: KVError) -> None:
        """A connection ended: what waits for it fails."""
        for asked, reply in self._waiting.values():
            if asked is peer and not reply.done():
                reply.set_exception(reason)
        if self._peers.get(peer.address) is peer:
            del self._peers[peer.address]


class Cluster(NamedTuple):
    """How a node reaches the others: none of it exists for a node without a directory."""

    directory: Directory
    neighbours: Neighbours
    reporter: Reporter
