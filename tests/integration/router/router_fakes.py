"""Instances that only talk: what they answer, when, and how they die is the test's to say."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import aiohttp
import msgspec
from aiohttp import web

from kvferry.config import Settings
from kvferry.protocol.membership import InstanceReport
from kvferry.router.app import Router
from kvferry.router.http_messages import Limits
from kvferry.types import HandoffTicket, Outcome, Role, TerminalState, ticket_from_params

DONE = b"data: [DONE]\n\n"
WAIT_S = 30.0
"""How long a test waits for what must come: a process may get no CPU for seconds."""


class Seen(NamedTuple):
    """One request as an instance got it."""

    path: str
    body: dict[str, Any]
    raw: bytes
    headers: dict[str, str]
    ticket: HandoffTicket | None


Script = Callable[["FakeInstance", web.Request, Seen], Awaitable[web.StreamResponse]]


class FakeInstance:
    """An HTTP server on 127.0.0.1 that follows a script. `ended` counts answers; `gone` the clients that left early."""

    def __init__(self, name: str, role: Role, script: Script, *, incarnation: int = 7) -> None:
        self.name, self.role, self.script, self.incarnation = name, role, script, incarnation
        self.seen: list[Seen] = []
        self.gone = 0
        self.running = 0
        self.gone_event = asyncio.Event()
        self.arrived = asyncio.Event()
        self.release = asyncio.Event()
        self._runner: web.AppRunner | None = None
        self.url = ""

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/{tail:.*}", self._handle)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        # Cancelling the handler of a client that left is how this fake, like real engines, hears of it.
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        await web.SockSite(self._runner, listener).start()
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def report(self, **changes: Any) -> InstanceReport:
        return msgspec.structs.replace(
            InstanceReport(
                instance_id=self.name,
                incarnation=self.incarnation,
                role=self.role,
                url=self.url,
                model="m",
                addresses=("tcp://127.0.0.1:9",),
            ),
            **changes,
        )

    async def idle(self) -> None:
        """Wait until no request is in hand."""
        await until(lambda: not self.running)

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "m"}, {"id": "m-lora"}]})

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        body = json.loads(raw)
        ticket = ticket_from_params(body.get("kv_transfer_params"))
        seen = Seen(request.path, body, raw, {k.lower(): v for k, v in request.headers.items()}, ticket)
        self.seen.append(seen)
        self.arrived.set()
        self.running += 1
        try:
            return await self.script(self, request, seen)
        except (asyncio.CancelledError, ConnectionResetError):
            self.gone += 1
            self.gone_event.set()
            raise
        finally:
            self.running -= 1


async def until(condition: Callable[[], object]) -> None:
    """Wait until it holds."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def delivered(ticket: HandoffTicket, **changes: Any) -> Outcome:
    """A good report of a handoff."""
    good = Outcome(ticket.handoff, TerminalState.DELIVERED, bytes_moved=4096, duration_s=0.01, transport="shm")
    return msgspec.structs.replace(good, **changes)


def completion(text: str = "hello", index: int = 0) -> dict[str, Any]:
    return {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": index, "text": text, "finish_reason": "length", "logprobs": None}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


def chat(text: str = "hello") -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


def text_event(text: str) -> bytes:
    chunk = {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "text": text, "finish_reason": None, "logprobs": None}],
    }
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"


def chat_event(text: str) -> bytes:
    chunk = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": None}],
    }
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"


async def open_stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    return response


def kill(request: web.Request) -> None:
    """The connection ends as if the process had been killed."""
    assert request.transport is not None
    request.transport.abort()


async def answer_prefill(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
    """A prefill instance that does its work at once."""
    return web.json_response(completion("x") if "chat" not in seen.path else chat("x"))


async def when_released(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
    """A prefill instance that answers once `release` is set."""
    await instance.release.wait()
    return await answer_prefill(instance, request, seen)


async def never(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
    """Takes the request and says nothing."""
    await asyncio.Event().wait()
    raise AssertionError


class Cluster:
    """Starts what a test asks for, and ends it all."""

    def __init__(self) -> None:
        self.instances: list[FakeInstance] = []
        self.router: Router | None = None
        self._sessions: list[aiohttp.ClientSession] = []

    async def start(self, *, limits: Limits | None = None, secret: bytes | None = None, **router: Any) -> Router:
        settings = Settings()
        defaults = {"port": 0, "drain_s": 0.2, "outcome_wait_s": WAIT_S, "ttl_s": 600.0}
        own = msgspec.structs.replace(settings.router, **{**defaults, **router})
        self.router = Router(msgspec.structs.replace(settings, router=own), secret, limits=limits)
        await self.router.start()
        return self.router

    async def add(self, name: str, role: Role, script: Script, **report: Any) -> FakeInstance:
        """A running, registered instance."""
        instance = FakeInstance(name, role, script)
        await instance.start()
        self.instances.append(instance)
        assert self.router is not None
        self.router.fleet.report(instance.report(**report), time.monotonic())
        return instance

    async def pair(self, decode: Script, prefill: Script = answer_prefill) -> tuple[FakeInstance, FakeInstance]:
        """One prefill and one decode instance behind a router."""
        if self.router is None:
            await self.start()
        return await self.add("p0", "prefill", prefill), await self.add("d0", "decode", decode)

    def outcome(self, outcome: Outcome) -> None:
        """What a target's report does, without the way over HTTP."""
        assert self.router is not None
        exchange = self.router._shared.handoffs.get(outcome.handoff)
        if exchange is not None:
            exchange.outcome(outcome)

    @property
    def url(self) -> str:
        assert self.router is not None
        return self.router.url

    def session(self) -> aiohttp.ClientSession:
        session = aiohttp.ClientSession(self.url)
        self._sessions.append(session)
        return session

    async def post(self, path: str = "/v1/completions", **body: Any) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of one request."""
        body = {"model": "m", "prompt": "abc", **body}
        async with self.session().post(path, json=body) as response:
            return response.status, {k.lower(): v for k, v in response.headers.items()}, await response.read()

    def last_record(self) -> Any:
        assert self.router is not None
        return self.router.metrics.recent[-1]

    async def close(self) -> None:
        for session in self._sessions:
            await session.close()
        if self.router is not None:
            await self.router.close()
        for instance in self.instances:
            await instance.stop()
