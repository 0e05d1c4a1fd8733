"""Requests and responses of the router's HTTP server, and the bounds that it keeps."""

from __future__ import annotations

import http
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

Headers = Sequence[tuple[bytes, bytes]]
JSON = (b"content-type", b"application/json")
_STATUS_LINES = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n".encode() for s in http.HTTPStatus}


class Limits(NamedTuple):
    """Bounds of one connection; times in seconds."""

    max_target_bytes: int = 8192
    max_head_bytes: int = 32768
    max_headers: int = 128
    max_body_bytes: int = 16 << 20
    max_pipelined: int = 8
    max_connections: int = 10_000
    head_s: float = 10.0
    body_s: float = 60.0
    idle_s: float = 75.0
    send_stall_s: float = 60.0


class Request(NamedTuple):
    """One request, whole. Header names are lower case; `target` is as sent, `path` without the query."""

    method: bytes
    target: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes

    @property
    def path(self) -> str:
        return self.target.partition(b"?")[0].decode("latin-1")

    @property
    def query(self) -> str:
        return self.target.partition(b"?")[2].decode("latin-1")

    def header(self, name: bytes) -> str | None:
        """The first value of a header, or None."""
        return next((v.decode("latin-1") for k, v in self.headers if k == name), None)


class ClientListener(Protocol):
    """Who keeps a response to write it later hears of the client's side."""

    def client_gone(self) -> None: ...
    def client_paused(self) -> None: ...
    def client_resumed(self) -> None: ...


Handler = Callable[["Request", "Response"], None]


class Connection(Protocol):
    """What a response needs of its connection."""

    @property
    def peer(self) -> str: ...
    def send(self, data: bytes) -> None: ...
    def response_done(self, keep_alive: bool) -> None: ...
    def abort(self) -> None: ...


class Response:
    """The answer to one request. After `finish` or `abort`, and after the client left, writes are dropped."""

    def __init__(self, connection: Connection, *, head_only: bool, http10: bool, keep_alive: bool) -> None:
        self.listener: ClientListener | None = None
        self.started = False
        self.finished = False
        self._connection: Connection | None = connection
        self._head_only = head_only
        self._http10 = http10
        self._keep_alive = keep_alive
        self._chunked = False
        self._unsent = b""

    @property
    def peer(self) -> str:
        """Who asks, as `host:port`."""
        return self._connection.peer if self._connection is not None else "a client that has left"

    def respond(self, status: int, body: bytes, headers: Headers = (JSON,)) -> None:
        """The whole answer in one go."""
        self.start(status, headers, body)
        self.finish()

    def start(self, status: int, headers: Headers, body: bytes | None = None) -> None:
        """The head. With `body` the answer has that length; else it is open and leaves with its first piece."""
        if self._connection is None:
            return
        self.started = True
        head = [_STATUS_LINES.get(status) or f"HTTP/1.1 {status} Status\r\n".encode()]
        for name, value in headers:
            head += (name, b": ", value, b"\r\n")
        if body is not None:
            head.append(b"content-length: %d\r\n" % len(body))
        elif self._http10:
            self._keep_alive = False
        else:
            self._chunked = True
            head.append(b"transfer-encoding: chunked\r\n")
        if not self._keep_alive:
            head.append(b"connection: close\r\n")
        elif self._http10:
            head.append(b"connection: keep-alive\r\n")
        head.append(b"\r\n")
        if body and not self._head_only:
            head.append(body)
        self._unsent = b"".join(head)
        if body is not None:
            self._send(b"")

    def write(self, data: bytes) -> None:
        """Send a piece of an open answer."""
        self._send(self._framed(data))

    def finish(self, last: bytes = b"") -> None:
        """The answer is complete with this piece; the connection takes its next request, or closes."""
        self._send(self._framed(last) + (b"0\r\n\r\n" if self._chunked and not self._head_only else b""))
        connection, self._connection = self._connection, None
        if connection is not None:
            self.finished = True
            connection.response_done(self._keep_alive)

    def _framed(self, data: bytes) -> bytes:
        if not data or self._head_only:
            return b""
        return b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data

    def _send(self, data: bytes) -> None:
        if self._unsent:
            data = self._unsent + data
            self._unsent = b""
        if data and self._connection is not None:
            self._connection.send(data)

    def abort(self) -> None:
        """Cut the connection, so that the client sees that the answer is not whole."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()

    def detach(self) -> ClientListener | None:
        """The client is gone: forget the connection, and return who wants to know."""
        self._connection = None
        listener, self.listener = self.listener, None
        return listener


class Sink(Protocol):
    """Where the answer goes: a client's connection, or the collector of a request that was split."""

    listener: ClientListener | None
    started: bool

    def start(self, status: int, headers: Headers, body: bytes | None = None) -> None: ...
    def write(self, data: bytes) -> None: ...
    def finish(self, last: bytes = b"") -> None: ...
    def abort(self) -> None: ...
