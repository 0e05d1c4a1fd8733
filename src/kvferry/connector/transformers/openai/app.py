"""The HTTP server of one instance."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from kvferry.connector.transformers.engine import Engine
from kvferry.connector.transformers.openai.requests import Call, read_chat, read_completion
from kvferry.connector.transformers.openai.responses import DONE, Choice, Writer, error_body, event_bytes
from kvferry.connector.transformers.params import RequestError
from kvferry.connector.transformers.sequence import Event, Failure, GenerationRequest, Piece
from kvferry.types import Incarnation, Outcome

MAX_BODY_BYTES = 16 << 20
REQUEST_ID_HEADER = "x-request-id"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
log = logging.getLogger(__name__)


class OpenAIServer:
    """The endpoints. A client that goes away aborts its request, whatever it was waiting for."""

    def __init__(
        self,
        engine: Engine,
        *,
        namespace: str = "",
        incarnation: Incarnation | None = None,
        render_metrics: Callable[[], tuple[bytes, str]],
        debug_kv: Callable[[], dict[str, Any]],
    ) -> None:
        """Args: incarnation: this process's; a ticket for another one is refused. None takes any."""
        self._engine = engine
        self._namespace = namespace
        self._incarnation = incarnation
        self._render_metrics = render_metrics
        self._debug_kv = debug_kv
        self._numbers = itertools.count()
        self._created = int(time.time())

    def make_app(self) -> web.Application:
        """The aiohttp application; its runner needs `handler_cancellation=True`."""
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_errors_in_openai_form])
        app.router.add_post("/v1/completions", self.completions)
        app.router.add_post("/v1/chat/completions", self.chat_completions)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/health", self.health)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/debug/kv", self.debug_kv)
        return app

    async def completions(self, request: web.Request) -> web.StreamResponse:
        call = read_completion(await request.read(), self._engine.loaded, self._engine.settings.role)
        return await self._answer(request, call)

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        call = read_chat(await request.read(), self._engine.loaded, self._engine.settings.role)
        return await self._answer(request, call)

    async def models(self, request: web.Request) -> web.Response:
        loaded = self._engine.loaded
        card = {
            "id": loaded.name,
            "object": "model",
            "created": self._created,
            "owned_by": "kvferry",
            "max_model_len": loaded.max_model_len,
        }
        return _json({"object": "list", "data": [card]})

    async def health(self, request: web.Request) -> web.Response:
        healthy = self._engine.healthy
        return _json({"status": "ok" if healthy else "the serving loop has ended"}, status=200 if healthy else 503)

    async def metrics(self, request: web.Request) -> web.Response:
        body, content_type = self._render_metrics()
        return web.Response(body=body, headers={"content-type": content_type})

    async def debug_kv(self, request: web.Request) -> web.Response:
        return _json(self._debug_kv())

    async def _answer(self, http: web.Request, call: Call) -> web.StreamResponse:
        self._require_own_ticket(call)
        name = http.headers.get(REQUEST_ID_HEADER) or secrets.token_hex(8)
        writer = Writer(call, name, self._engine.loaded.name, self._engine.loaded)
        choices = [Choice(i) for i in range(len(call.prompts) * call.params.n)]
        async with self._generate(call, name) as pieces:
            if call.stream:
                return await self._stream(http, writer, choices, pieces)
            async for index, piece in pieces:
                choices[index].pieces.append(piece)
        return _json(writer.whole(choices))

    async def _stream(
        self,
        http: web.Request,
        writer: Writer,
        choices: list[Choice],
        pieces: AsyncIterator[tuple[int, Piece]],
    ) -> web.StreamResponse:
        """Stream an answer. The status line waits for the first piece, so that an early failure has its own status."""
        index, piece = await anext(pieces)
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        response = web.StreamResponse(headers=headers)
        await response.prepare(http)
        for choice in choices:
            if opening := writer.opening(choice):
                await response.write(event_bytes(opening))
        try:
            while True:
                choices[index].pieces.append(piece)
                if (unsent := choices[index].take_unsent()) is not None:
                    await response.write(event_bytes(writer.chunk(choices[index], unsent)))
                index, piece = await anext(pieces)
        except StopAsyncIteration:
            if closing := writer.closing(choices):
                await response.write(event_bytes(closing))
        except RequestError as error:
            # The status is out already; an event that clients raise on is what is left to be honest with.
            await response.write(event_bytes(error_body(error)))
        await response.write(DONE)
        await response.write_eof()
        return response

    @contextlib.asynccontextmanager
    async def _generate(self, call: Call, name: str) -> AsyncIterator[AsyncIterator[tuple[int, Piece]]]:
        """Submit a call's prompts; give its pieces with their choice's number. Leaving aborts what has not ended.

        Raises: RequestError: a prompt cannot be served; none was submitted.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        arrival_s = time.monotonic()
        requests = [
            GenerationRequest(
                request_id=f"{name}#{next(self._numbers)}",
                prompt=prompt,
                params=call.params,
                sink=_sink(loop, events, number),
                namespace=f"{self._namespace}\0{call.cache_salt}" if call.cache_salt else self._namespace,
                ticket=call.ticket,
                arrival_s=arrival_s,
            )
            for number, prompt in enumerate(call.prompts)
        ]
        if not self._engine.healthy:
            raise RequestError("this instance's serving loop does not run", code="unhealthy", status=503)
        for request in requests:
            self._engine.check(request)
        try:
            for request in requests:
                self._engine.submit(request)
            yield self._pieces(events, len(requests) * call.params.n, call.params.n)
        finally:
            for request in requests:
                self._engine.abort(request.request_id)

    async def _pieces(
        self, events: asyncio.Queue[tuple[int, Event]], num_choices: int, n: int
    ) -> AsyncIterator[tuple[int, Piece]]:
        """Raises: RequestError: a prompt's generation failed."""
        num_open = num_choices
        while num_open:
            number, event = await events.get()
            if isinstance(event, Failure):
                raise event.error
            if isinstance(event, Piece):
                num_open -= event.finish_reason is not None
                yield number * n + event.index, event

    def _require_own_ticket(self, call: Call) -> None:
        """Raises: RequestError: the ticket was made out for an earlier life of this instance."""
        if call.ticket is None or self._incarnation is None:
            return
        own = call.ticket.source if call.ticket.side == "source" else call.ticket.target
        if own.incarnation not in (0, self._incarnation):
            raise RequestError(
                f"the ticket is for incarnation {own.incarnation} of {own.instance_id}, this is {self._incarnation}: "
                "the instance was restarted; take its address from its new registration",
                param="kv_transfer_params",
                code="stale_incarnation",
                status=409,
            )


def _sink(
    loop: asyncio.AbstractEventLoop, events: asyncio.Queue[tuple[int, Event]], number: int
) -> Callable[[Event], None]:
    """Brings events from the engine's thread to the server's loop."""

    def put(event: Event) -> None:
        if isinstance(event, Outcome):
            return
        # The loop closes before the engine does when the process ends; nobody listens then.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(events.put_nowait, (number, event))

    return put


@web.middleware
async def _errors_in_openai_form(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except RequestError as error:
        return _json(error_body(error), status=error.status)
    except web.HTTPException as error:
        refused = RequestError(
            f"{request.method} {request.path[:200]}: {error.reason or 'refused'}", status=error.status
        )
        headers = {k: v for k, v in error.headers.items() if k.lower() == "allow"}
        return _json(error_body(refused), status=error.status, headers=headers)


def _json(body: dict[str, Any], *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json", headers=headers)
