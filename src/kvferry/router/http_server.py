"""A small HTTP/1.1 server on asyncio.Protocol and httptools: limits, deadlines, pipelining, no framework.

A handler is a plain function of `Request` and `Response`; it may answer at once or keep the response and write later.
Requests of one connection are handled in order, one at a time. Whatever a client does, a bound or a deadline ends it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import cast

import httptools

from kvferry.router.errors import error_body
from kvferry.router.http_messages import JSON, Handler, Limits, Request, Response

LINGER_S = 2.0
_INF = float("inf")


class _Refused(Exception):
    """Stops the parser; the connection already knows the answer."""


class ServerConnection(asyncio.Protocol):
    """One client's connection."""

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._limits = server.limits
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._queue: deque[tuple[Request, Response]] = deque()
        self._current: Response | None = None
        self._pumping = False
        self._paused_reading = False
        self._refusal: tuple[int, str] | None = None
        self._lingering = False
        self._in_head = self._in_message = False
        self._head_bytes = 0
        self._receive_deadline_s = time.monotonic() + self._limits.idle_s
        self._send_deadline_s = _INF
        self._begin()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._server.connections.add(self)
        if len(self._server.connections) > self._limits.max_connections:
            self._refuse(503, "the router has as many connections as it may; try again later")

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self._transport = None
        self._queue.clear()
        current, self._current = self._current, None
        listener = current.detach() if current is not None else None
        if listener is not None:
            listener.client_gone()

    def data_received(self, data: bytes) -> None:
        if self._lingering:
            return
        if self._in_head:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            status, message = self._refusal or (400, f"the request is not valid HTTP: {error}")
            self._refuse(status, message)
        else:
            if self._in_head and self._head_bytes > self._limits.max_head_bytes:
                self._refuse(431, self._too_long_a_head)
        self._pump()

    def pause_writing(self) -> None:
        self._send_deadline_s = time.monotonic() + self._limits.send_stall_s
        if self._current is not None and self._current.listener is not None:
            self._current.listener.client_paused()

    def resume_writing(self) -> None:
        self._send_deadline_s = _INF
        if self._current is not None and self._current.listener is not None:
            self._current.listener.client_resumed()
        self._pump()

    # httptools

    def on_message_begin(self) -> None:
        self._begin()
        self._in_head = self._in_message = True
        self._receive_deadline_s = time.monotonic() + self._limits.head_s

    def on_url(self, url: bytes) -> None:
        self._target += url
        if len(self._target) > self._limits.max_target_bytes:
            self._stop(414, f"the request's target is longer than {self._limits.max_target_bytes} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers_size += len(name) + len(value) + 4
        self._num_headers += 1
        if self._headers_size > self._limits.max_head_bytes or self._num_headers > self._limits.max_headers:
            self._stop(431, self._too_long_a_head)
        if self._in_head:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        self._receive_deadline_s = time.monotonic() + self._limits.body_s
        self._http10 = self._parser.get_http_version() == "1.0"
        self._keep_alive = self._parser.should_keep_alive()
        self._check_head(dict(self._headers))

    def on_body(self, body: bytes) -> None:
        self._body_size += len(body)
        if self._body_size > self._limits.max_body_bytes:
            self._stop(413, f"the request's body is larger than {self._limits.max_body_bytes} bytes")
        self._body.append(body)

    def on_message_complete(self) -> None:
        self._in_message = False
        self._receive_deadline_s = time.monotonic() + self._limits.idle_s
        method = self._parser.get_method()
        request = Request(method, self._target, self._headers, b"".join(self._body))
        response = Response(
            self, head_only=method == b"HEAD", http10=self._http10, keep_alive=self._keep_alive
        )  # fmt: skip
        self._queue.append((request, response))
        if len(self._queue) >= self._limits.max_pipelined and self._transport is not None:
            self._paused_reading = True
            self._transport.pause_reading()

    # Called by the response and the server

    @property
    def peer(self) -> str:
        name = self._transport.get_extra_info("peername") if self._transport is not None else None
        return f"{name[0]}:{name[1]}" if name else "a client that has left"

    def send(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def response_done(self, keep_alive: bool) -> None:
        self._current = None
        if not self._in_message:
            self._receive_deadline_s = time.monotonic() + self._limits.idle_s
        if self._refusal is not None:
            self._answer_refusal()
        elif not keep_alive or self._server.closing:
            self._close()
        else:
            self._pump()

    def check_deadlines(self, now_s: float) -> None:
        """Called every now and then."""
        if now_s > self._send_deadline_s:
            # The client reads nothing: with it gone, nothing is lost.
            self.abort()
        elif now_s > self._receive_deadline_s and (self._in_message or (self._current is None and not self._queue)):
            if self._lingering or self._current is not None:
                self.abort()
            elif self._in_message:
                self._refuse(408, "the request did not arrive in time")
            else:
                self._close()

    def close_idle(self) -> None:
        """Close if no request is being answered."""
        if self._current is None and not self._queue and not self._lingering:
            self._close()

    # Inside

    def _begin(self) -> None:
        self._target = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._headers_size = self._num_headers = self._body_size = 0
        self._body: list[bytes] = []
        self._http10 = False
        self._keep_alive = True

    @property
    def _too_long_a_head(self) -> str:
        limits = self._limits
        return f"the request's head has more than {limits.max_headers} headers or {limits.max_head_bytes} bytes"

    def _check_head(self, headers: dict[bytes, bytes]) -> None:
        length, encoding = headers.get(b"content-length"), headers.get(b"transfer-encoding")
        if self._parser.should_upgrade():
            self._stop(501, "protocol upgrades (WebSocket, h2c) are not served here; use plain HTTP/1.1")
        if b"host" not in headers and not self._http10:
            self._stop(400, "the request has no Host header")
        if encoding is not None and encoding.strip().lower() != b"chunked":
            self._stop(501, f"transfer encoding {encoding[:40]!r} is not known here; only chunked is")
        if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
            self._stop(415, "compressed request bodies are not taken; send the JSON as it is")
        if length is None and encoding is None and self._parser.get_method() in (b"POST", b"PUT", b"PATCH"):
            self._stop(411, "the request needs a Content-Length, or chunked transfer encoding")
        if length is not None and (not length.isdigit() or int(length) > self._limits.max_body_bytes):
            self._stop(413, f"the request's body is larger than {self._limits.max_body_bytes} bytes")
        expect = headers.get(b"expect")
        if expect is not None and not self._http10:
            if expect.strip().lower() != b"100-continue":
                self._stop(417, f"expectation {expect[:40]!r} cannot be met; only 100-continue can")
            if self._current is None and not self._queue and (encoding is not None or length not in (None, b"0")):
                self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _stop(self, status: int, message: str) -> None:
        self._refusal = (status, message)
        raise _Refused(message)

    def _refuse(self, status: int, message: str) -> None:
        """Answer with an error in its turn, then close."""
        self._refusal = (status, message)
        self._lingering = True
        self._in_message = self._in_head = False
        self._receive_deadline_s = time.monotonic() + self._limits.idle_s
        if self._current is None and not self._queue:
            self._answer_refusal()

    def _answer_refusal(self) -> None:
        if self._queue:
            self._pump()
            return
        assert self._refusal is not None
        status, message = self._refusal
        self._server.refused(status)
        Response(self, head_only=False, http10=False, keep_alive=False).start(
            status, (JSON,), error_body(status, message)
        )
        # Close our half and read on for a moment: a reset now could overtake the answer.
        self._receive_deadline_s = time.monotonic() + LINGER_S
        if self._transport is not None and self._transport.can_write_eof():
            self._transport.write_eof()

    def _pump(self) -> None:
        if self._pumping:
            return
        self._pumping = True
        try:
            # A client that does not read its last answer gets no next one.
            while self._queue and self._current is None and self._send_deadline_s == _INF and self._transport:
                request, response = self._queue.popleft()
                if self._paused_reading and len(self._queue) < self._limits.max_pipelined:
                    self._paused_reading = False
                    self._transport.resume_reading()
                self._current = response
                self._server.handler(request, response)
        finally:
            self._pumping = False

    def _close(self) -> None:
        self._queue.clear()
        if self._transport is not None:
            self._transport.close()


class HttpServer:
    """Listens and keeps the connections. `handler` is called once for each request."""

    def __init__(self, handler: Handler, limits: Limits, refused: Callable[[int], None] = lambda status: None) -> None:
        self.handler = handler
        self.limits = limits
        self.refused = refused
        self.connections: set[ServerConnection] = set()
        self.closing = False
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> tuple[str, int]:
        """Bind; returns host and port as really bound.

        Raises: OSError if the address cannot be bound.
        """
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: ServerConnection(self), host, port, backlog=1024)
        bound = self._server.sockets[0].getsockname()
        return str(bound[0]), int(bound[1])

    def sweep(self, now_s: float) -> None:
        """End what is past its deadline. To be called a few times a second."""
        for connection in list(self.connections):
            connection.check_deadlines(now_s)

    def stop_listening(self) -> None:
        """Take no new connection and no next request; running responses go on."""
        self.closing = True
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.close_idle()

    def abort(self) -> None:
        """Cut every connection."""
        for connection in list(self.connections):
            connection.abort()
