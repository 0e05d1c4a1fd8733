"""Both HTTP sides fed with bytes at any split, without a network."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.errors import ConfigError, KVError
from kvferry.router.http_messages import Limits, Request, Response
from kvferry.router.http_server import HttpServer, ServerConnection
from kvferry.router.upstreams import Call, Origin, UpstreamConnection, UpstreamPool

LIMITS = Limits(max_head_bytes=400, max_body_bytes=1000, max_pipelined=3)


class FakeTransport:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.written = b""
        self.closed = False
        self.reading = True

    def write(self, data: bytes) -> None:
        self.written += data

    def writelines(self, parts: Any) -> None:
        self.written += b"".join(parts)

    def close(self) -> None:
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.closed

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.closed = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(c % (len(data) + 1) for c in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges) if a < b]


def serve(parts: list[bytes]) -> tuple[bytes, list[Request]]:
    seen: list[Request] = []

    def handle(request: Request, response: Response) -> None:
        seen.append(request)
        response.respond(200, json.dumps([request.path, len(request.body)]).encode())

    connection = ServerConnection(HttpServer(handle, LIMITS))
    transport = FakeTransport()
    connection.connection_made(transport)  # type: ignore[arg-type]
    for part in parts:
        connection.data_received(part)
    return transport.written, seen


GOOD = (
    b"POST /a?b HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"
    b"POST /c HTTP/1.1\r\nhost: x\r\nTransfer-Encoding: Chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    b"\r\nGET /d HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 300 + b"\r\n\r\n"
)
STREAMS = {
    "good": GOOD,
    "bad after good": GOOD + b"WRONG /\r\n\r\n",
    "too long a head": GOOD + b"GET / HTTP/1.1\r\nhost: x\r\na: " + b"y" * 500 + b"\r\n\r\n",
    "too large a body": b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1001\r\n\r\n" + b"z" * 1001,
    "too large a chunk": b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3e9\r\n" + b"z" * 1001,
}


@pytest.mark.parametrize("data", STREAMS.values(), ids=STREAMS)
def test_requests_at_every_single_split(data: bytes) -> None:
    whole, requests = serve([data])
    for at in range(1, len(data)):
        answer, seen = serve([data[:at], data[at:]])
        assert answer == whole and seen == requests, at


@given(st.sampled_from(list(STREAMS.values())), st.lists(st.integers(0, 5000), max_size=20))
def test_requests_at_any_splits(data: bytes, cuts: list[int]) -> None:
    assert serve(pieces(data, cuts)) == serve([data])


@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_get_an_answer_or_are_waited_for(data: bytes, after_good: bool) -> None:
    answer, _ = serve([GOOD + data if after_good else data])
    assert answer.count(b"HTTP/1.1 ") <= (5 if after_good else 2) + data.count(b"HTTP")


def test_what_the_requests_say() -> None:
    _, (one, two, three) = serve([GOOD])
    assert (one.method, one.path, one.query, one.body) == (b"POST", "/a", "b", b"hello")
    assert (two.path, two.body, three.path) == ("/c", b"abcde", "/d")
    assert three.header(b"x") == "y" * 300 and three.header(b"z") is None


def test_too_many_pipelined_requests_stop_the_reading() -> None:
    kept: list[Response] = []
    connection = ServerConnection(HttpServer(lambda request, response: kept.append(response), LIMITS))
    transport = FakeTransport()
    connection.connection_made(transport)  # type: ignore[arg-type]
    connection.data_received(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" * 4)
    assert len(kept) == 1 and not transport.reading
    kept[0].respond(200, b"1")
    assert len(kept) == 2 and transport.reading
    # A client that does not read gets no next answer until it does.
    connection.pause_writing()
    kept[1].respond(200, b"2")
    assert len(kept) == 2
    connection.resume_writing()
    assert len(kept) == 3


class Receiver:
    """Keeps what a call brings."""

    def __init__(self) -> None:
        self.heads: list[tuple[int, list[tuple[bytes, bytes]]]] = []
        self.body = b""
        self.ended = 0
        self.failed: list[KVError] = []

    def call_head(self, call: Call, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.heads.append((status, headers))

    def call_body(self, call: Call, data: bytes) -> None:
        self.body += data

    def call_ended(self, call: Call) -> None:
        self.ended += 1

    def call_failed(self, call: Call, error: KVError) -> None:
        self.failed.append(error)


ORIGIN = Origin("h", 1)
ANSWERS = {
    "length": (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nA: b\r\n\r\nhello", False),
    "chunked": (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\nt: u\r\n\r\n",
        False,
    ),
    "until close": (b"HTTP/1.1 200 OK\r\n\r\nhello", True),
    "informational first": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",
        False,
    ),
}


def call(parts: list[bytes], *, close: bool) -> tuple[Receiver, UpstreamPool, FakeTransport]:
    pool, receiver, transport = UpstreamPool(connect_timeout_s=1.0), Receiver(), FakeTransport()
    connection = UpstreamConnection(pool, ORIGIN)
    connection.connection_made(transport)  # type: ignore[arg-type]
    pool.put(connection)
    pool.call(ORIGIN, b"head", b"body", receiver)
    assert transport.written == b"headbody"
    for part in parts:
        connection.data_received(part)
    if close:
        connection.connection_lost(None)
    return receiver, pool, transport


@pytest.mark.parametrize(("data", "close"), ANSWERS.values(), ids=ANSWERS)
def test_answers_at_every_single_split(data: bytes, close: bool) -> None:
    for at in range(1, len(data)):
        receiver, pool, transport = call([data[:at], data[at:]], close=close)
        assert (receiver.heads[0][0], receiver.body, receiver.ended, receiver.failed) == (200, b"hello", 1, []), at
        assert (pool.take(ORIGIN) is not None) == (not close and not transport.closed)


@given(st.sampled_from(list(ANSWERS.values())), st.lists(st.integers(0, 500), max_size=12))
def test_answers_at_any_splits(answer: tuple[bytes, bool], cuts: list[int]) -> None:
    data, close = answer
    receiver, _, _ = call(pieces(data, cuts), close=close)
    assert (receiver.body, receiver.ended, receiver.failed) == (b"hello", 1, [])


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\ncont",
        b"not HTTP at all\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
    ],
)
def test_answers_that_are_not_whole_fail_once(data: bytes) -> None:
    receiver, pool, _ = call([data], close=True)
    assert receiver.ended == 0 and len(receiver.failed) == 1
    assert pool.take(ORIGIN) is None


def test_bytes_after_an_answer_spoil_the_connection_not_the_answer() -> None:
    receiver, pool, transport = call([ANSWERS["length"][0] + b"HTTP/1.1 200 OK\r\n"], close=False)
    assert (receiver.body, receiver.ended, receiver.failed) == (b"hello", 1, [])
    assert transport.closed and pool.take(ORIGIN) is None
    receiver, pool, transport = call([ANSWERS["length"][0]], close=False)
    connection = pool._idle[ORIGIN][0]
    connection.data_received(b"uncalled for")
    assert transport.closed and pool.take(ORIGIN) is None


def test_a_cancelled_call_calls_nobody_and_closes() -> None:
    receiver, _, transport = call([b"HTTP/1.1 200 OK\r\n"], close=False)
    pool, receiver, transport = UpstreamPool(connect_timeout_s=1.0), Receiver(), FakeTransport()
    connection = UpstreamConnection(pool, ORIGIN)
    connection.connection_made(transport)  # type: ignore[arg-type]
    pool.put(connection)
    made = pool.call(ORIGIN, b"", b"", receiver)
    made.cancel()
    connection.data_received(ANSWERS["length"][0])
    connection.connection_lost(None)
    assert transport.closed and not receiver.heads and not receiver.ended and not receiver.failed


async def test_a_call_that_ends_in_a_bug_fails_and_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(self: UpstreamPool, origin: Origin) -> UpstreamConnection:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(UpstreamPool, "connect", broken)
    receiver = Receiver()
    UpstreamPool(connect_timeout_s=1.0).call(ORIGIN, b"head", b"body", receiver)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    ((cause, message),) = [(error.cause, error.message) for error in receiver.failed]
    assert cause == "internal_error" and "ZeroDivisionError('a bug')" in message


def test_connections_idle_for_too_long_are_closed() -> None:
    _, pool, transport = call([ANSWERS["length"][0]], close=False)
    since_s = pool._idle[ORIGIN][0].idle_since_s
    pool.sweep(since_s + 3.9)
    assert not transport.closed
    pool.sweep(since_s + 4.1)
    assert transport.closed and pool.take(ORIGIN) is None


@pytest.mark.parametrize("url", ["", "h:1", "https://h", "http://", "http://h:x", "http://h:99999", "ftp://h"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ConfigError, match="expected http://host:port"):
        Origin.of(url)


def test_urls() -> None:
    assert Origin.of("http://h:81/base/") == ("h", 81, "/base")
    assert Origin.of("http://[::1]:81") == ("::1", 81, "") and str(Origin.of("http://[::1]:81")) == "[::1]:81"
