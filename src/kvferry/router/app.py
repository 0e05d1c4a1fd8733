"""The router: takes requests, admits them, keeps the instances' table, ends what is past its deadline."""

from __future__ import annotations

import asyncio
import errno
import re
import secrets
import time
from contextlib import suppress

from kvferry.config import Settings
from kvferry.errors import ConfigError
from kvferry.observe import get_log, port_taken, start_background
from kvferry.policy.admission import admit, retry_after_s
from kvferry.router.control import Control, unknown_model
from kvferry.router.errors import BadRequest, error_body
from kvferry.router.exchange import Exchange
from kvferry.router.fanout import Fanout
from kvferry.router.fleet import Fleet
from kvferry.router.http_messages import JSON, Limits, Request, Response, Sink
from kvferry.router.http_server import HttpServer
from kvferry.router.metrics import RouterMetrics
from kvferry.router.polling import parse_upstreams, poll_upstreams
from kvferry.router.requests import ENDPOINTS, ApiRequest, parse
from kvferry.router.steps import DeadlinePassed
from kvferry.router.surroundings import Surroundings
from kvferry.router.upstreams import UpstreamPool
from kvferry.wire import require_secret

SWEEP_S = 0.1
# A decode instance that is silent and gives no byte for this many lifetimes of its registration is given up.
STALL_TTLS = 5.0
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
_NOT_FORWARDED = frozenset(
    {
        b"host",
        b"connection",
        b"keep-alive",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"content-length",
        b"expect",
        b"accept-encoding",
        b"x-request-id",
    }
)
_log = get_log("kvferry.router")


class Router:
    """One router on the running event loop.

    Args:
        secret: the cluster's; required where the router listens beyond loopback.
    Raises:
        ConfigError: a setting cannot be used.
    """

    def __init__(self, settings: Settings, secret: bytes | None = None, *, limits: Limits | None = None) -> None:
        own = settings.router
        require_secret(own.host, secret, "the router")
        self._settings = own
        self._upstreams = [*parse_upstreams("prefill", own.prefill), *parse_upstreams("decode", own.decode)]
        self.metrics = RouterMetrics()
        self.fleet = Fleet(ttl_s=own.ttl_s, heartbeat_s=own.heartbeat_s)
        self._pool = UpstreamPool(connect_timeout_s=own.connect_timeout_s)
        self._shared = Surroundings(
            self.fleet,
            self._pool,
            self.metrics,
            handoff_deadline_s=settings.handoff.deadline_s,
            outcome_wait_s=own.outcome_wait_s,
            attempts=own.attempts,
            stream_first_token=own.stream_first_token,
        )
        self._shared.retry_after_s = self._retry_after_s
        self._exchanges: dict[Exchange, None] = {}
        self._queue: dict[Exchange, None] = {}
        self._num_started = 0
        self._mean_request_s = 0.0
        self._pumping = False
        self._drained: asyncio.Event | None = None
        self._tasks: list[asyncio.Task[None]] = []
        # Nobody's deadline is kept once the sweep has died: a router that can't end a request must not look healthy.
        self._control = Control(
            self._shared, secret, self._exchanges, alive=lambda: not any(task.done() for task in self._tasks)
        )
        limits = limits or Limits(max_body_bytes=own.max_body_bytes)
        self._server = HttpServer(self._handle, limits, lambda status: self.metrics.refused.labels(status).inc())
        self.host, self.port = own.host, own.port

    @property
    def url(self) -> str:
        """The base URL as bound."""
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"

    async def start(self) -> None:
        """Bind and serve.

        Raises: ConfigError if the port is taken; the message names who holds it.
        """
        own = self._settings
        try:
            self.host, self.port = await self._server.start(own.host, own.port)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise port_taken(own.host, own.port, "router.port") from error
            raise ConfigError(f"router.host: cannot bind {own.host} port {own.port}: {error}") from error
        self._tasks = [start_background(self._sweep(), what="expiry of instances and deadlines")]
        if self._upstreams:
            polling = poll_upstreams(self._upstreams, self.fleet, self._pool, every_s=own.heartbeat_s)
            self._tasks.append(start_background(polling, what="polling of instances that do not register"))
        _log.info("router listens", url=self.url)

    async def close(self) -> None:
        """Let running requests end for `drain_s`, end the others with an honest error, close everything."""
        self._control.draining = True
        self._server.stop_listening()
        if self._exchanges:
            self._drained = asyncio.Event()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.drain_s):
                    await self._drained.wait()
        for exchange in list(self._exchanges):
            exchange.handle(DeadlinePassed("router_ending", "the router is being shut down", 503))
        # One turn of the loop, so that the last words leave.
        await asyncio.sleep(0.01)
        self._server.abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._pool.close()
        await asyncio.sleep(0)

    # Requests

    def _handle(self, request: Request, response: Response) -> None:
        path = request.path
        for endpoint in ENDPOINTS:
            if path == endpoint:
                break
        else:
            self._control.handle(request, response)
            return
        if request.method != b"POST":
            response.respond(405, error_body(405, f"{endpoint} takes POST"), [JSON, (b"allow", b"POST")])
            return
        try:
            api_request = parse(endpoint, request.body)
        except BadRequest as error:
            self.metrics.refused.labels(error.status).inc()
            response.respond(error.status, error.body())
            return
        model = api_request.model
        if model is not None and len(self.fleet.membership) and not self.fleet.knows_model(model):
            self.metrics.refused.labels(404).inc()
            response.respond(404, unknown_model(model, self.fleet.models()))
            return
        given = request.header(b"x-request-id")
        request_id = given if given is not None and _REQUEST_ID.fullmatch(given) else secrets.token_hex(12)
        headers = _forwarded(request.headers)
        if api_request.prompts:
            Fanout(
                api_request, request_id, response, lambda part, name, sink: self._submit(part, name, headers, sink)
            ).begin()
        else:
            self._submit(api_request, request_id, headers, response)

    def _submit(self, request: ApiRequest, request_id: str, headers: bytes, sink: Sink) -> None:
        verdict = admit(
            in_flight=self._num_started,
            max_in_flight=self._settings.max_in_flight,
            queued=len(self._queue),
            max_queue=self._settings.max_queue,
            mean_request_s=self._mean_request_s,
        )
        if verdict.verdict == "refuse" or self._control.draining:
            self._refuse(sink, request_id, max(1, verdict.retry_after_s))
            return
        exchange = Exchange(
            self._shared,
            request,
            request_id,
            b"x-request-id: %b\r\n%b" % (request_id.encode(), headers),
            sink,
            deadline_s=time.monotonic() + self._settings.request_deadline_s,
            ended=self._ended,
        )
        self._exchanges[exchange] = None
        if verdict.verdict == "wait":
            self._queue[exchange] = None
        else:
            self._start(exchange)

    def _refuse(self, sink: Sink, request_id: str, retry_s: int) -> None:
        draining = self._control.draining
        status = 503 if draining else 429
        why = "the router is ending" if draining else f"{len(self._queue)} requests wait already; try again later"
        self.metrics.refused.labels(status).inc()
        headers = [JSON, (b"x-request-id", request_id.encode()), (b"retry-after", b"%d" % retry_s)]
        sink.start(status, headers, error_body(status, why))
        sink.finish()

    def _start(self, exchange: Exchange) -> None:
        self._num_started += 1
        exchange.begin()

    def _ended(self, exchange: Exchange) -> None:
        del self._exchanges[exchange]
        self._queue.pop(exchange, None)
        if self._drained is not None and not self._exchanges:
            self._drained.set()
        if exchange.started:
            self._num_started -= 1
            took_s = time.monotonic() - exchange.arrived_s
            self._mean_request_s += (took_s - self._mean_request_s) / 16
        self._pump()

    def _pump(self) -> None:
        if self._pumping:
            return
        self._pumping = True
        try:
            while self._queue and self._num_started < self._settings.max_in_flight:
                exchange = next(iter(self._queue))
                del self._queue[exchange]
                self._start(exchange)
        finally:
            self._pumping = False

    def _retry_after_s(self) -> int:
        return retry_after_s(len(self._queue), self._settings.max_in_flight, self._mean_request_s)

    async def _sweep(self) -> None:
        """Ends what is past its deadline; the only timer of connections, requests and instances."""
        stall_s = STALL_TTLS * self._settings.ttl_s
        last_s = time.monotonic()
        while True:
            await asyncio.sleep(SWEEP_S)
            now_s = time.monotonic()
            stalled, last_s = now_s - last_s > self._settings.ttl_s / 2, now_s
            if stalled:
                # This process stood still: the heartbeats that came meanwhile are read before anyone is declared gone.
                continue
            self.fleet.expire(now_s)
            self._server.sweep(now_s)
            self._pool.sweep(now_s)
            for exchange in list(self._exchanges):
                exchange.check(now_s, stall_s)


def _forwarded(headers: list[tuple[bytes, bytes]]) -> bytes:
    """The client's end-to-end headers as they go to both legs."""
    lines = [
        b"%b: %b\r\n" % (name, value)
        for name, value in headers
        if name not in _NOT_FORWARDED and not name.startswith(b"x-kvferry-")
    ]
    # Compressed answers would hide where a stream's events end.
    lines.append(b"accept-encoding: identity\r\n")
    return b"".join(lines)
