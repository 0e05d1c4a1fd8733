"""The control connection between two engines: handshake, regions that come and go, messages of the room above."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, Literal, cast

import msgspec

from kvferry.errors import KVError, PeerGone, WireError
from kvferry.transport.base import RemoteRegion
from kvferry.wire import MAX_FRAME_BYTES, MAX_HANDSHAKE_BYTES, Codec, Frame, FrameDecoder, Handshake, Session


class EngineHello(msgspec.Struct, frozen=True):
    """What an engine tells an authenticated peer. `address` is its own listener; `app` is the upper room's hello."""

    address: str
    app: bytes
    offers: dict[str, dict[str, Any]]
    regions: list[RemoteRegion]


class RegionAdded(msgspec.Struct, frozen=True, tag="region_added"):
    region: RemoteRegion


class RegionRemoved(msgspec.Struct, frozen=True, tag="region_removed"):
    region_id: int


hellos: Codec[EngineHello] = Codec(EngineHello)
notices: Codec[RegionAdded | RegionRemoved] = Codec(RegionAdded | RegionRemoved)
_NOTICE, _MESSAGE = b"n", b"m"


class ControlConnection(asyncio.Protocol):
    """One control connection, from its first byte to its loss. Lives on the event loop.

    Args:
        on_ready: called once, with this connection, when both sides have proved themselves.
        on_lost: called once if `on_ready` was, with the reason; `on_closed` in any case.
    """

    def __init__(
        self,
        handshake: Handshake,
        role: Literal["client", "server"],
        *,
        name: str,
        max_unsent_bytes: int,
        on_ready: Callable[[ControlConnection], None],
        on_lost: Callable[[ControlConnection, KVError], None],
        on_message: Callable[[ControlConnection, bytes], None],
        on_notice: Callable[[ControlConnection, RegionAdded | RegionRemoved], None],
        on_refused: Callable[[str, KVError], None],
        on_closed: Callable[[ControlConnection], None],
        first_bytes: bytes = b"",
    ) -> None:
        self.name, self.role = name, role
        self.session: Session | None = None
        self.connected = False
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._handshake = handshake
        self._decoder = FrameDecoder(MAX_HANDSHAKE_BYTES)
        self._max_unsent_bytes = max_unsent_bytes
        self._on_ready, self._on_lost, self._on_refused = on_ready, on_lost, on_refused
        self._on_message, self._on_notice, self._on_closed = on_message, on_notice, on_closed
        self._first_bytes = first_bytes
        self._transport: asyncio.Transport | None = None
        self._reason: KVError | None = None
        self._lost = False

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not checked by type: uvloop's transports have the methods without the base class.
        self._transport, self.connected = cast(asyncio.Transport, transport), True
        if self._lost:
            self._transport.close()
            return
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._transport.write(self._handshake.start())
        if self._first_bytes:
            self.data_received(self._first_bytes)

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._decoder.feed(data):
                self._receive(frame)
        except KVError as error:
            self._refuse(error)

    def connection_lost(self, exc: Exception | None) -> None:
        why = f"its control connection broke: {exc}" if exc is not None else "it closed its control connection"
        self._end(self._reason or PeerGone(f"the peer is gone: {why}", peer=self.name))

    # for the engine

    def send_message(self, payload: bytes) -> None:
        """Raises: PeerGone if the connection is lost or the peer has not taken what was sent before."""
        self._send(_MESSAGE + payload)

    def send_notice(self, notice: RegionAdded | RegionRemoved) -> None:
        self._send(_NOTICE + notices.encode(notice))

    def peer_host(self) -> str:
        """The host that the connection comes from."""
        name = self._transport.get_extra_info("peername") if self._transport is not None else None
        return str(name[0]) if name else "127.0.0.1"

    def close(self, reason: KVError) -> None:
        """Close; `on_lost` gets `reason`. Idempotent."""
        self._end(reason)
        if self._transport is not None:
            self._transport.close()

    def abort(self, reason: KVError) -> None:
        """Close without sending what is still queued."""
        self._end(reason)
        if self._transport is not None:
            self._transport.abort()

    def _receive(self, frame: Frame) -> None:
        if self.session is None:
            answer = self._handshake.receive(frame)
            if answer and self._transport is not None:
                self._transport.write(answer)
            if self._handshake.session is not None:
                self.session = self._handshake.session
                self._decoder.max_frame_bytes = MAX_FRAME_BYTES
                self._on_ready(self)
                if not self.ready.done():
                    self.ready.set_result(None)
            return
        payload = self.session.open(frame)
        match payload[:1]:
            case b"m":
                self._on_message(self, payload[1:])
            case b"n":
                self._on_notice(self, notices.decode(payload[1:]))
            case kind:
                raise WireError(f"control frame of unknown kind {kind!r}")

    def _send(self, payload: bytes) -> None:
        if self.session is None or self._transport is None or self._lost or self._transport.is_closing():
            raise self._reason or PeerGone("the connection to the peer is closed", peer=self.name)
        if len(payload) > MAX_FRAME_BYTES:
            raise WireError(f"a message of {len(payload)} bytes is too large; at most {MAX_FRAME_BYTES} can travel")
        unsent = self._transport.get_write_buffer_size()
        if unsent > self._max_unsent_bytes:
            error = PeerGone(
                f"the peer has not taken {unsent} bytes of messages: it is stopped or stuck", peer=self.name
            )
            self.abort(error)
            raise error
        self._transport.write(self.session.seal(payload))

    def _refuse(self, error: KVError) -> None:
        error.peer = error.peer or self.name
        told_us = error.message.startswith("the peer refused")
        if self.session is None and not told_us and self._transport is not None:
            self._transport.write(self._handshake.refusal(error))
        self._on_refused(self.name, error)
        self.close(error)

    def _end(self, reason: KVError) -> None:
        if self._lost:
            return
        self._lost = True
        self._reason = reason
        if not self.ready.done():
            self.ready.set_exception(reason)
            # Read here, so that asyncio does not warn where nobody awaits it any more.
            self.ready.exception()
        self._on_closed(self)
        if self.session is not None:
            self._on_lost(self, reason)
