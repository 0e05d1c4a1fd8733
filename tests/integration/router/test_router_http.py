"""The HTTP layer against raw sockets: limits, bad requests, pipelining, deadlines."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
from router_fakes import WAIT_S, Cluster, Script, until

from kvferry.router.http_messages import Limits, Request, Response
from kvferry.router.http_server import HttpServer

LIMITS = Limits(max_head_bytes=2000, max_target_bytes=500, max_headers=20, max_body_bytes=10_000)
HASTY = LIMITS._replace(head_s=0.2, body_s=0.3, idle_s=0.4, send_stall_s=0.3)


class Wire:
    """One raw connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """The next whole answer."""
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), WAIT_S)
        status = int(head.split()[1])
        headers = dict(re.findall(r"^(\S+): (.*)\r$", head.decode("latin-1"), re.MULTILINE))
        body = b""
        if headers.get("transfer-encoding") == "chunked":
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                body += await self.reader.readexactly(size)
                await self.reader.readexactly(2)
            await self.reader.readexactly(2)
        elif status >= 200:
            body = await self.reader.readexactly(int(headers["content-length"]))
        return status, headers, body

    async def ends(self) -> bool:
        """Whether the router closes, with no further byte."""
        return await asyncio.wait_for(self.reader.read(), WAIT_S) == b""


async def closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


@pytest.fixture
async def echo() -> AsyncIterator[HttpServer]:
    async with echo_server(LIMITS) as server:
        yield server


@pytest.fixture
async def hasty_echo() -> AsyncIterator[HttpServer]:
    """A server that gives up on its clients after fractions of a second."""
    async with echo_server(HASTY) as server:
        yield server


@asynccontextmanager
async def echo_server(limits: Limits) -> AsyncIterator[HttpServer]:
    """A server that says what it got, with a sweep."""
    seen: list[Request] = []

    def handle(request: Request, response: Response) -> None:
        seen.append(request)
        if request.path == "/big":
            response.start(200, [(b"content-type", b"text/plain")])
            response.write(b"x" * 20_000_000)
        else:
            text = {"method": request.method.decode(), "path": request.path, "body": request.body.decode("latin-1")}
            response.respond(200, json.dumps(text).encode())

    server = HttpServer(handle, limits)
    server.address = await server.start("127.0.0.1", 0)  # type: ignore[attr-defined]
    sweeping = asyncio.create_task(_sweep(server))
    yield server
    sweeping.cancel()
    server.stop_listening()
    server.abort()
    await asyncio.sleep(0.01)


async def _sweep(server: HttpServer) -> None:
    while True:
        await asyncio.sleep(0.02)
        server.sweep(asyncio.get_running_loop().time())


@pytest.fixture
async def wire(echo: HttpServer) -> AsyncIterator[Wire]:
    reader, writer = await asyncio.open_connection(*echo.address, limit=1 << 26)  # type: ignore[attr-defined]
    yield Wire(reader, writer)
    await closed(writer)


BAD = [
    (b"NONSENSE\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nhost: a\r\nbad header\r\n\r\n", 400),
    (b"POST / HTTP/1.1\r\nhost: a\r\n\r\n", 411),
    (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 10001\r\n\r\n", 413),
    (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999999999999999\r\n\r\n", 400),
    (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n", 400),
    (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", 400),
    (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    (b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    (b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n", 400),
    (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-encoding: gzip\r\ncontent-length: 1\r\n\r\n", 415),
    (b"POST / HTTP/1.1\r\nhost: a\r\nexpect: tea\r\ncontent-length: 1\r\n\r\n", 417),
    (b"GET /" + b"a" * 600 + b" HTTP/1.1\r\nhost: a\r\n\r\n", 414),
    (b"GET / HTTP/1.1\r\nhost: a\r\n" + b"a: b\r\n" * 30 + b"\r\n", 431),
    (b"GET / HTTP/1.1\r\nhost: a\r\na: " + b"b" * 3000 + b"\r\n\r\n", 431),
    (b"GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n", 501),
]


@pytest.mark.parametrize(("data", "status"), BAD)
@pytest.mark.parametrize("at_once", [True, False])
async def test_bad_requests_are_refused_in_openai_s_form(wire: Wire, data: bytes, status: int, at_once: bool) -> None:
    if at_once:
        wire.writer.write(data)
    else:
        for at in range(0, len(data), 7):
            wire.writer.write(data[at : at + 7])
            await asyncio.sleep(0)
    got, headers, body = await wire.answer()
    assert got == status and headers["connection"] == "close"
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    assert await wire.ends()


async def test_a_header_without_end_is_cut(wire: Wire) -> None:
    wire.writer.write(b"GET / HTTP/1.1\r\nhost: a\r\na: ")
    for _ in range(50):
        wire.writer.write(b"b" * 100)
        await asyncio.sleep(0)
    assert (await wire.answer())[0] == 431


async def test_a_chunked_body_beyond_the_limit_is_cut(wire: Wire) -> None:
    wire.writer.write(b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
    for _ in range(11):
        wire.writer.write(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
    assert (await wire.answer())[0] == 413


async def test_bodies_in_any_framing(wire: Wire) -> None:
    wire.writer.write(b"POST /a HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhello")
    assert json.loads((await wire.answer())[2])["body"] == "hello"
    chunked = (
        b"POST /b HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n2;x=y\r\nhe\r\n3\r\nllo\r\n0\r\nt: u\r\n\r\n"
    )
    for byte in chunked:
        wire.writer.write(bytes([byte]))
        await asyncio.sleep(0)
    assert json.loads((await wire.answer())[2])["body"] == "hello"


async def test_pipelined_requests_are_answered_in_order(wire: Wire) -> None:
    one = b"POST /%d HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nab"
    wire.writer.write(b"".join(one % i for i in range(40)) + b"BAD\r\n\r\n")
    for i in range(40):
        status, _, body = await wire.answer()
        assert status == 200 and json.loads(body)["path"] == f"/{i}"
    assert (await wire.answer())[0] == 400
    assert await wire.ends()


async def test_expect_100_continue(wire: Wire) -> None:
    wire.writer.write(b"POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n")
    assert (await wire.answer())[0] == 100
    wire.writer.write(b"ok")
    assert json.loads((await wire.answer())[2])["body"] == "ok"


async def test_http_1_0_and_connection_close(wire: Wire) -> None:
    wire.writer.write(b"GET / HTTP/1.0\r\n\r\n")
    status, headers, _ = await wire.answer()
    assert status == 200 and headers["connection"] == "close"
    assert await wire.ends()


async def test_head_has_no_body(wire: Wire) -> None:
    wire.writer.write(b"HEAD / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
    answer = await asyncio.wait_for(wire.reader.read(), WAIT_S)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n") and answer.endswith(b"\r\n\r\n")


async def test_a_slow_head_and_a_slow_body_time_out(hasty_echo: HttpServer) -> None:
    for begun in (b"GET / HTTP/1.1\r\nhost", b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 900\r\n\r\nab"):
        reader, writer = await asyncio.open_connection(*hasty_echo.address)  # type: ignore[attr-defined]
        drip = Wire(reader, writer)
        writer.write(begun)
        # A byte now and then does not extend the time.
        status = asyncio.create_task(drip.answer())
        for _ in range(800):
            await asyncio.sleep(0.05)
            if status.done():
                break
            writer.write(b"a")
        assert (await status)[0] == 408
        assert await drip.ends()
        await closed(writer)


async def test_an_idle_connection_is_closed(hasty_echo: HttpServer) -> None:
    reader, writer = await asyncio.open_connection(*hasty_echo.address)  # type: ignore[attr-defined]
    wire = Wire(reader, writer)
    writer.write(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
    assert (await wire.answer())[0] == 200
    assert await wire.ends()
    await closed(writer)


async def test_a_client_that_reads_nothing_is_cut(hasty_echo: HttpServer) -> None:
    _, writer = await asyncio.open_connection(*hasty_echo.address, limit=1000)  # type: ignore[attr-defined]
    writer.write(b"GET /big HTTP/1.1\r\nhost: a\r\n\r\n")
    await until(lambda: hasty_echo.connections)
    await until(lambda: not hasty_echo.connections)
    await closed(writer)


async def test_too_many_connections_are_refused() -> None:
    server = HttpServer(lambda request, response: response.respond(200, b"{}"), LIMITS._replace(max_connections=2))
    host, port = await server.start("127.0.0.1", 0)
    streams = [await asyncio.open_connection(host, port) for _ in range(3)]
    assert (await Wire(*streams[2]).answer())[0] == 503
    for _, writer in streams:
        await closed(writer)
    server.stop_listening()
    server.abort()
    await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/completions", 405),
        ("POST", "/health", 405),
        ("PUT", "/kvferry/v1/instances", 405),
        ("GET", "/kvferry/v1/instances/x", 405),
        ("GET", "/kvferry/v1/outcomes", 405),
        ("GET", "/v1/embeddings", 404),
        ("GET", "/", 404),
        ("GET", "/v1/models/unknown", 404),
    ],
)
async def test_wrong_paths_and_methods(cluster: Cluster, method: str, path: str, status: int) -> None:
    await cluster.start()
    async with cluster.session().request(method, path, data=b"{}" if method != "GET" else None) as answer:
        assert answer.status == status
        assert (await answer.json())["error"]["message"]
        assert (status == 405) == ("allow" in answer.headers)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"[]", None),
        (b'{"prompt": "a"', None),
        (b'{"stream": "yes"}', "stream"),
        (b'{"n": 1.5}', "n"),
        (b'{"model": 3}', "model"),
        (b'{"kv_transfer_params": {}}', "kv_transfer_params"),
    ],
)
async def test_bodies_that_no_instance_needs_to_see(
    cluster: Cluster, good_decode: Script, body: bytes, param: str | None
) -> None:
    prefill, decode = await cluster.pair(good_decode)
    async with cluster.session().post("/v1/completions", data=body) as answer:
        assert answer.status == 400
        assert (await answer.json())["error"]["param"] == param
    assert not prefill.seen and not decode.seen


async def test_an_unknown_model_is_a_404(cluster: Cluster, good_decode: Script) -> None:
    await cluster.pair(good_decode)
    status, _, body = await cluster.post(model="gpt-x")
    assert status == 404 and json.loads(body)["error"]["code"] == "model_not_found"


async def test_a_pipelined_completion_waits_for_its_turn(cluster: Cluster, good_decode: Script) -> None:
    await cluster.pair(good_decode)
    assert cluster.router is not None
    reader, writer = await asyncio.open_connection(cluster.router.host, cluster.router.port)
    body = b'{"prompt":"a","stream":%b}'
    for stream in (b"true", b"false", b"true"):
        data = body % stream
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n%b" % (len(data), data))
    wire = Wire(reader, writer)
    kinds = [(await wire.answer())[1]["content-type"].partition(";")[0] for _ in range(3)]
    assert kinds == ["text/event-stream", "application/json", "text/event-stream"]
    await closed(writer)
