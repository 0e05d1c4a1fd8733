"""Channels to peers: control connections of the transfer engine, by the peer's incarnation."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from kvferry.errors import CompatibilityError, KVError, TransferTimeout, WireError
from kvferry.protocol.events import Connect, Connected, ConnectFailed
from kvferry.protocol.messages import Message
from kvferry.transfer import Peer, TransferEngine
from kvferry.types import Incarnation
from kvferry.wire import Codec

_log = logging.getLogger("kvferry.handoff")
_codec: Codec[Message] = Codec(Message)
encode = _codec.encode


class Channels:
    """Both sides may connect, so that one peer may have several. All calls belong to the loop of the engine.

    Args:
        on_lost: the last channel to an incarnation is gone, and why.
    """

    def __init__(
        self,
        engine: TransferEngine,
        *,
        on_message: Callable[[Incarnation, Message], None],
        on_lost: Callable[[Peer, KVError], None],
    ) -> None:
        self._engine, self._on_message, self._on_lost = engine, on_message, on_lost
        engine.on_peer, engine.on_peer_lost, engine.on_message = self._add, self._remove, self._receive
        self._peers: dict[Incarnation, list[Peer]] = {}
        self._connecting: dict[tuple[str, int], asyncio.Task[Peer]] = {}

    def find(self, incarnation: Incarnation) -> Peer | None:
        """An open channel, if there is one."""
        return next((peer for peer in self._peers.get(incarnation, ()) if peer.lost is None), None)

    def send(self, incarnation: Incarnation, payload: bytes) -> None:
        """Over the first channel that takes it. None does: the message is lost, as on a network."""
        for peer in self._peers.get(incarnation, ()):
            try:
                peer.send(payload)
                return
            except KVError as error:
                _log.debug("cannot send to %s: %s", peer.name, error)

    def close(self, incarnation: Incarnation) -> None:
        for peer in list(self._peers.get(incarnation, ())):
            peer.close()

    async def connect(self, wanted: Connect) -> Connected | ConnectFailed:
        """See to a channel to the handoff's source, within the deadline: how that ended."""
        try:
            async with asyncio.timeout(max(0.0, wanted.deadline_s)):
                peer = await self._open(wanted)
        except TimeoutError:
            where = ", ".join(wanted.source.addresses)
            detail = f"no answer at {where} within {wanted.deadline_s:.1f} s"
            return ConnectFailed(wanted.handoff, TransferTimeout("").cause, detail)
        except KVError as error:
            return ConnectFailed(wanted.handoff, error.cause, error.message)
        if peer.lost is not None:
            # Lost between the channel's return and this turn of the loop: its PeerLost came before this handoff
            # was connected, and nobody would say it again before the lease ends.
            return ConnectFailed(wanted.handoff, peer.lost.cause, peer.lost.message)
        return Connected(wanted.handoff, peer.incarnation)

    async def _open(self, wanted: Connect) -> Peer:
        """An open channel to the source, shared by all its handoffs."""
        source = wanted.source
        peer = self.find(Incarnation(source.incarnation))
        if peer is not None:
            return peer
        if not source.addresses:
            raise CompatibilityError(f"it told no handoff listener, so that nothing leads to {source.instance_id}")
        key = (source.addresses[0], source.incarnation)
        if key not in self._connecting:
            attempt = self._engine.connect(source.addresses[0], deadline_s=wanted.deadline_s)
            self._connecting[key] = asyncio.get_running_loop().create_task(attempt)
            self._connecting[key].add_done_callback(lambda _: self._connecting.pop(key, None))
        return await asyncio.shield(self._connecting[key])

    def _add(self, peer: Peer) -> None:
        self._peers.setdefault(peer.incarnation, []).append(peer)

    def _remove(self, peer: Peer, error: KVError) -> None:
        others = [p for p in self._peers.get(peer.incarnation, ()) if p is not peer]
        if others:
            self._peers[peer.incarnation] = others
            return
        self._peers.pop(peer.incarnation, None)
        self._on_lost(peer, error)

    def _receive(self, peer: Peer, payload: bytes) -> None:
        try:
            message = _codec.decode(payload)
        except WireError as error:
            _log.warning("closing the channel to %s: %s", peer.name, error)
            peer.close()
            return
        self._on_message(peer.incarnation, message)
