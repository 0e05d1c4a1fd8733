"""Who is connected: the listener, handshakes, control connections, and the peers behind them. On the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable, Coroutine
from typing import Any, Literal

from kvferry.errors import KVError, PeerGone, TransferTimeout, TransportClosed, TransportError, system_reason
from kvferry.observe.listeners import port_taken
from kvferry.transfer.control import ControlConnection, EngineHello, RegionAdded, RegionRemoved, hellos
from kvferry.transfer.peer import Peer
from kvferry.transfer.settings import TransferSettings
from kvferry.transport.base import RemoteRegion
from kvferry.transport.streams import PREFACE, prepare_socket
from kvferry.transport.tcp import split_address
from kvferry.types import Incarnation
from kvferry.wire import Handshake, Refusals

MAX_GREETINGS = 512
"""Connections that have not proved themselves yet; further ones are closed."""

_WILDCARDS = ("0.0.0.0", "::")


class Connections:
    """Accepts and opens control connections; passes data streams on.

    Args:
        tell: what this side tells an authenticated peer, made anew for each connection.
        check_app_hello: may refuse the peer's own words by raising a KVError.
        adopt_stream: takes a socket that turned out to be a data stream, and the name of where it comes from.
        on_peer, on_lost, on_message, on_region_gone: called on the loop; `on_lost` once for each peer.
    """

    def __init__(
        self,
        *,
        listen: str,
        secret: bytes | None,
        incarnation: Incarnation,
        settings: TransferSettings,
        tell: Callable[[], EngineHello],
        check_app_hello: Callable[[bytes], None] | None,
        adopt_stream: Callable[[socket.socket, str], None] | None,
        on_peer: Callable[[Peer], None],
        on_lost: Callable[[Peer, KVError], None],
        on_message: Callable[[Peer, bytes], None],
        on_region_gone: Callable[[Peer, RemoteRegion], None],
    ) -> None:
        self.address = listen
        self.refusals = Refusals()
        self._listen = split_address(listen)
        self._secret, self._incarnation, self._settings = secret, incarnation, settings
        self._tell, self._check_app_hello, self._adopt_stream = tell, check_app_hello, adopt_stream
        self._on_peer, self._on_peer_lost, self._on_peer_message = on_peer, on_lost, on_message
        self._on_region_gone = on_region_gone
        self._peers: dict[ControlConnection, Peer] = {}
        self._handshaking: set[ControlConnection] = set()
        self._ungreeted: set[socket.socket] = set()
        self._announced: dict[ControlConnection, set[int]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._socket: socket.socket | None = None
        self._closed = False

    @property
    def peers(self) -> tuple[Peer, ...]:
        return tuple(self._peers.values())

    async def start(self) -> None:
        """Bind the listener; `address` tells where. Raises: ConfigError naming the process that holds a taken port."""
        host, port = self._listen
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            prepare_socket(sock, self._settings)
            sock.bind((host, port))
            sock.listen(512)
        except OSError as error:
            sock.close()
            if error.errno == errno.EADDRINUSE:
                raise port_taken(host, port, "the handoff listener") from error
            raise TransportError(f"cannot listen on {host}:{port}: {error.strerror}") from error
        sock.setblocking(False)
        self._socket = sock
        self.address = _address(host, sock.getsockname()[1])
        self._spawn(self._accept(sock))

    async def connect(self, address: str) -> Peer:
        """Connect and shake hands; the caller bounds the time. Raises: PeerGone, the handshake's errors."""
        host, port = split_address(address)
        connection = self._new_connection("client", address, b"")
        self._handshaking.add(connection)
        try:
            await asyncio.get_running_loop().create_connection(lambda: connection, host, port)
            await connection.ready
        except OSError as error:
            reason = PeerGone(f"cannot connect to {address}: {system_reason(error)}", peer=address)
            self._abandon(connection, reason)
            raise reason from error
        except BaseException:
            self._abandon(connection, TransportClosed("connecting was given up", peer=address))
            raise
        return self._peers[connection]

    async def close(self, reason: KVError) -> None:
        """Stop listening and part from everybody. Idempotent."""
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # A task that is cancelled before its first step never gets to close what it was given.
        for sock in (self._socket, *self._ungreeted):
            if sock is not None:
                sock.close()
        for connection in [*self._peers, *self._handshaking]:
            connection.close(reason)

    def announce(self, regions: dict[int, RemoteRegion]) -> None:
        """Tell each peer what it has not heard of the regions that came and went."""
        for connection in list(self._peers):
            known = self._announced[connection]
            with contextlib.suppress(PeerGone, TransportClosed):  # Its `on_lost` says it.
                for region_id in sorted(known - regions.keys()):
                    known.discard(region_id)
                    connection.send_notice(RegionRemoved(region_id))
                for region_id in sorted(regions.keys() - known):
                    known.add(region_id)
                    connection.send_notice(RegionAdded(regions[region_id]))

    def _new_connection(self, role: Literal["client", "server"], name: str, first_bytes: bytes) -> ControlConnection:
        if self._closed:
            raise TransportClosed("the transfer engine is closed")
        hello = self._tell()
        handshake = Handshake(
            role,
            secret=self._secret,
            incarnation=self._incarnation,
            hello=hellos.encode(hello),
            check_hello=self._check_hello,
        )
        connection = ControlConnection(
            handshake,
            role,
            name=name,
            max_unsent_bytes=self._settings.max_unsent_bytes,
            on_ready=self._on_ready,
            on_lost=self._on_lost,
            on_message=self._on_message,
            on_notice=self._on_notice,
            on_refused=self.refusals.add,
            on_closed=self._forget,
            first_bytes=first_bytes,
        )
        self._announced[connection] = {region.region_id for region in hello.regions}
        return connection

    def _forget(self, connection: ControlConnection) -> None:
        self._handshaking.discard(connection)
        self._announced.pop(connection, None)

    def _check_hello(self, data: bytes) -> None:
        hello = hellos.decode(data)
        split_address(hello.address)
        if self._check_app_hello is not None:
            self._check_app_hello(hello.app)

    def _on_ready(self, connection: ControlConnection) -> None:
        session = connection.session
        assert session is not None
        hello = hellos.decode(session.peer_hello)
        host, port = split_address(hello.address)
        seen = connection.peer_host() if connection.role == "server" else split_address(connection.name)[0]
        address = _address(seen if host in _WILDCARDS else host, port)
        for offer in hello.offers.values():
            if offer.get("shared"):
                offer["address"] = address if connection.role == "server" else connection.name
        peer = Peer(
            connection,
            address=address,
            incarnation=session.peer_incarnation,
            hello=hello.app,
            offers=hello.offers,
            regions={region.region_id: region for region in hello.regions},
            outbound=connection.role == "client",
        )
        connection.name = peer.name
        self._handshaking.discard(connection)
        self._peers[connection] = peer
        self._on_peer(peer)

    def _on_lost(self, connection: ControlConnection, reason: KVError) -> None:
        peer = self._peers.pop(connection, None)
        if peer is not None:
            self._on_peer_lost(peer, reason)

    def _on_message(self, connection: ControlConnection, payload: bytes) -> None:
        peer = self._peers.get(connection)
        if peer is not None:
            self._on_peer_message(peer, payload)

    def _on_notice(self, connection: ControlConnection, notice: RegionAdded | RegionRemoved) -> None:
        peer = self._peers.get(connection)
        if peer is None:
            return
        if isinstance(notice, RegionAdded):
            peer.regions[notice.region.region_id] = notice.region
        elif (gone := peer.regions.pop(notice.region_id, None)) is not None:
            self._on_region_gone(peer, gone)

    async def _accept(self, sock: socket.socket) -> None:
        while True:
            await _readable(sock)
            try:
                accepted, address = sock.accept()
            except BlockingIOError:
                continue
            except OSError:
                # Out of file descriptors, or the peer has gone again: the next one may fare better.
                await asyncio.sleep(0.05)
                continue
            if len(self._tasks) > MAX_GREETINGS:
                accepted.close()
                continue
            self._ungreeted.add(accepted)
            self._spawn(self._greet(accepted, f"{address[0]}:{address[1]}"))

    async def _greet(self, sock: socket.socket, name: str) -> None:
        """Find out whether this is a control connection or a data stream, and pass it on."""
        loop = asyncio.get_running_loop()
        self._ungreeted.discard(sock)
        connection: ControlConnection | None = None
        sock.setblocking(False)
        try:
            async with asyncio.timeout(self._settings.handshake_s):
                first = b""
                while len(first) < len(PREFACE):
                    received = await loop.sock_recv(sock, len(PREFACE) - len(first))
                    if not received:
                        sock.close()
                        return
                    first += received
                if first == PREFACE and self._adopt_stream is not None:
                    self._adopt_stream(sock, name)
                    return
                connection = self._new_connection("server", name, first)
                self._handshaking.add(connection)
                await loop.connect_accepted_socket(lambda: connection, sock)
                await connection.ready
        except TimeoutError:
            self.refusals.add(name, TransferTimeout("no handshake in time", peer=name))
            self._abandon(connection, TransferTimeout("no handshake in time", peer=name), sock)
        except (KVError, OSError) as error:
            self._abandon(connection, PeerGone(f"no handshake: {error}", peer=name), sock)
        except asyncio.CancelledError:
            self._abandon(connection, TransportClosed("the engine was closed"), sock)
            raise

    def _abandon(
        self, connection: ControlConnection | None, reason: KVError, sock: socket.socket | None = None
    ) -> None:
        if connection is not None:
            self._forget(connection)
            connection.close(reason)
        if sock is not None and (connection is None or not connection.connected):
            sock.close()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _address(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


async def _readable(sock: socket.socket) -> None:
    """Wait until there is something to accept. `loop.sock_accept`, cancelled as a peer comes, loses that peer's socket
    unclosed."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sock, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(sock)
