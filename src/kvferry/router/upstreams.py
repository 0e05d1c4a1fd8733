"""HTTP/1.1 calls to instances over kept-alive connections: callbacks, no tasks on the hot path.

A call ends in exactly one of `call_ended` and `call_failed`, unless it was cancelled: then nothing is called any
more, and its connection is closed, which tells the instance to abort.
"""

from __future__ import annotations

import asyncio
import functools
import time
import urllib.parse
from typing import NamedTuple, Protocol, cast

import httptools

from kvferry.errors import (
    ConfigError,
    InternalError,
    KVError,
    PeerGone,
    TransferTimeout,
    WireError,
    system_reason,
)
from kvferry.observe import get_log

_log = get_log(__name__)
MAX_ANSWER_HEAD_BYTES = 64 << 10
MAX_IDLE = 512
# Below the 5 s after which uvicorn closes an idle connection: the side that sends should be the one that closes.
IDLE_S = 4.0


class Origin(NamedTuple):
    """An instance's HTTP address. `prefix` comes before each path (usually empty)."""

    host: str
    port: int
    prefix: str = ""

    @classmethod
    @functools.lru_cache(maxsize=4096)
    def of(cls, url: str) -> Origin:
        """Raises: ConfigError if the URL is no `http://host:port`."""
        try:
            parts = urllib.parse.urlsplit(url)
            port = parts.port or 80
        except ValueError as error:
            raise ConfigError(f"{url!r} is no URL of an instance: {error}; expected http://host:port") from error
        if parts.scheme != "http" or not parts.hostname:
            raise ConfigError(f"{url!r} is no URL of an instance; expected http://host:port")
        return cls(parts.hostname, port, parts.path.rstrip("/"))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Receiver(Protocol):
    """Takes what a call brings. `call_body` is called once for each read from the socket, with whole bytes."""

    def call_head(self, call: Call, status: int, headers: list[tuple[bytes, bytes]]) -> None: ...
    def call_body(self, call: Call, data: bytes) -> None: ...
    def call_ended(self, call: Call) -> None: ...
    def call_failed(self, call: Call, error: KVError) -> None: ...


class Call:
    """One request to one instance. `taken`: its bytes were given to a connection that stood."""

    def __init__(self, pool: UpstreamPool, origin: Origin, head: bytes, body: bytes, receiver: Receiver) -> None:
        self.origin = origin
        self.taken = False
        self.over = False
        self._pool = pool
        self._head, self._body = head, body
        self._receiver = receiver
        self._connection: UpstreamConnection | None = None
        self._connecting: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Send. Callbacks may come from now on, never from within this call."""
        connection = self._pool.take(self.origin)
        if connection is not None:
            self._send(connection)
        else:
            self._connecting = asyncio.get_running_loop().create_task(self._connect())

    def cancel(self) -> None:
        """Close the connection at once; no callback comes any more. Idempotent, also after the end."""
        self.over = True
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.drop()

    def pause(self) -> None:
        """Read nothing more until `resume`."""
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        if self._connection is not None:
            self._connection.resume()

    async def _connect(self) -> None:
        failure: KVError
        try:
            connection = await self._pool.connect(self.origin)
            self._connecting = None
            self._send(connection)
            return
        except KVError as error:
            failure = error
        except Exception as error:  # noqa: BLE001  (told to the receiver, or the call would never end)
            _log.exception("calling an instance ended in a bug", instance=str(self.origin))
            failure = InternalError(f"the router could not call {self.origin}: a bug, its log has it: {error!r}")
        self._connecting = None
        self.fail(failure)

    def _send(self, connection: UpstreamConnection) -> None:
        self.taken = True
        self._connection = connection
        connection.send(self, self._head, self._body)

    # Called by the connection

    def answered(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._receiver.call_head(self, status, headers)

    def received(self, data: bytes) -> None:
        self._receiver.call_body(self, data)

    def ended(self) -> None:
        self.over = True
        self._connection = None
        self._receiver.call_ended(self)

    def lost(self, error: KVError, *, untouched: bool) -> None:
        """The connection is gone. `untouched`: it was a kept one on which no byte of an answer had come."""
        self._connection = None
        if self.over:
            return
        if untouched:
            # Most likely the instance closed it while it was idle. If not, a repeat is harmless: the handoff's id is
            # the same, and no byte of the first try can come any more.
            self.taken = False
            self._connecting = asyncio.get_running_loop().create_task(self._connect())
        else:
            self.fail(error)

    def fail(self, error: KVError) -> None:
        if not self.over:
            self.over = True
            self._receiver.call_failed(self, error)


class UpstreamConnection(asyncio.Protocol):
    """One connection; carries one call at a time."""

    def __init__(self, pool: UpstreamPool, origin: Origin) -> None:
        self.origin = origin
        self.idle_since_s = 0.0
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._call: Call | None = None
        self._num_calls = 0
        self._num_bytes = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._parts: list[bytes] = []
        self._status = 0
        self._in_body = False
        self._until_close = False
        self._complete = False
        self._keep = False

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, call: Call, head: bytes, body: bytes) -> None:
        self._call = call
        self._num_calls += 1
        self._num_bytes = self._head_bytes = 0
        self._complete = self._in_body = self._until_close = False
        if self._transport is None:
            # Lost in the same turn of the loop; tell it as any other loss, but not from within `start`.
            asyncio.get_running_loop().call_soon(self._tell_lost, None)
            return
        self._transport.writelines((head, body))

    def drop(self) -> None:
        """Close without telling the call."""
        self._call = None
        if self._transport is not None:
            self._transport.abort()

    def pause(self) -> None:
        if self.usable:
            cast(asyncio.Transport, self._transport).pause_reading()

    def resume(self) -> None:
        if self.usable:
            cast(asyncio.Transport, self._transport).resume_reading()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._pool.forget(self)
        self._tell_lost(exc)

    def data_received(self, data: bytes) -> None:
        call = self._call
        if call is None:
            # Nobody asked for anything: whatever this is, this connection cannot be trusted with a request.
            self.drop()
            return
        self._num_bytes += len(data)
        if not self._in_body:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
            if not self._in_body and not self._complete and self._head_bytes > MAX_ANSWER_HEAD_BYTES:
                raise WireError(f"the answer's head is longer than {MAX_ANSWER_HEAD_BYTES} bytes")
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, WireError) as error:
            if not self._complete:
                self._break(WireError(f"{self.origin} gave an answer that is not valid HTTP: {error}", stage="decode"))
                return
            self._keep = False
        if self._parts:
            body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
            self._parts.clear()
            call.received(body)
        if self._complete and self._call is call:
            self._finish(call)

    # httptools

    def on_message_begin(self) -> None:
        if self._complete:
            raise WireError("bytes follow the end of the answer")
        self._headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_body:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            return
        self._status = status
        self._in_body = True
        names = {n for n, _ in self._headers}
        self._until_close = not (names & {b"content-length", b"transfer-encoding"}) and status not in (204, 304)
        if self._call is not None:
            self._call.answered(status, self._headers)

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        if self._in_body:
            self._complete = True
            self._keep = self._parser.should_keep_alive()

    def _finish(self, call: Call) -> None:
        self._call = None
        self._in_body = False
        if self._keep and self.usable:
            # A call that was paused when its answer ended must not leave the connection deaf.
            self.resume()
            self._pool.put(self)
        elif self._transport is not None:
            self._transport.close()
        call.ended()

    def _break(self, error: KVError) -> None:
        call, self._call = self._call, None
        if self._transport is not None:
            self._transport.abort()
        if call is not None:
            call.lost(error, untouched=False)

    def _tell_lost(self, exc: Exception | None) -> None:
        call, self._call = self._call, None
        if call is None:
            return
        if self._until_close and self._in_body and exc is None:
            call.ended()
            return
        why = (str(exc) or type(exc).__name__) if exc is not None else "it closed the connection"
        seen = f"after {self._num_bytes} bytes of its answer" if self._num_bytes else "before its answer"
        untouched = self._num_calls > 1 and self._num_bytes == 0
        call.lost(PeerGone(f"{self.origin} was lost {seen} ({why})", peer=str(self.origin)), untouched=untouched)


class UpstreamPool:
    """Kept connections to all instances. One event loop."""

    def __init__(self, *, connect_timeout_s: float, idle_s: float = IDLE_S, max_idle: int = MAX_IDLE) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._idle_s = idle_s
        self._max_idle = max_idle
        self._idle: dict[Origin, list[UpstreamConnection]] = {}
        self._num_idle = 0

    def call(self, origin: Origin, head: bytes, body: bytes, receiver: Receiver) -> Call:
        """A call that has been started; `head` and `body` are sent as they are."""
        call = Call(self, origin, head, body, receiver)
        call.start()
        return call

    def take(self, origin: Origin) -> UpstreamConnection | None:
        """The most recently used idle connection to this origin, or None."""
        idle = self._idle.get(origin)
        while idle:
            connection = idle.pop()
            self._num_idle -= 1
            if connection.usable:
                return connection
        return None

    def put(self, connection: UpstreamConnection) -> None:
        """Keep a connection whose call has ended."""
        if self._num_idle >= self._max_idle:
            connection.drop()
            return
        connection.idle_since_s = time.monotonic()
        self._idle.setdefault(connection.origin, []).append(connection)
        self._num_idle += 1

    def forget(self, connection: UpstreamConnection) -> None:
        """The connection is lost; it may or may not be idle."""
        idle = self._idle.get(connection.origin)
        if idle is not None and connection in idle:
            idle.remove(connection)
            self._num_idle -= 1

    async def connect(self, origin: Origin) -> UpstreamConnection:
        """Raises: PeerGone, TransferTimeout."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(
                    lambda: UpstreamConnection(self, origin), origin.host, origin.port
                )
        except TimeoutError as error:
            raise TransferTimeout(
                f"{origin} took no connection within {self._connect_timeout_s:g} s", peer=str(origin), stage="connect"
            ) from error
        except OSError as error:
            raise PeerGone(
                f"{origin} takes no connection: {system_reason(error)}", peer=str(origin), stage="connect"
            ) from error
        return connection

    def sweep(self, now_s: float) -> None:
        """Close connections that were idle for too long."""
        for origin, idle in list(self._idle.items()):
            old = [c for c in idle if now_s - c.idle_since_s > self._idle_s]
            for connection in old:
                idle.remove(connection)
                self._num_idle -= 1
                connection.drop()
            if not idle:
                del self._idle[origin]

    def close(self) -> None:
        """Close every idle connection; calls in flight are their owners' to cancel."""
        for idle in self._idle.values():
            for connection in idle:
                connection.drop()
        self._idle.clear()
        self._num_idle = 0
