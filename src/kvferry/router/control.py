"""What the router answers itself: models, health, metrics, debugging, and the endpoints that instances call."""

from __future__ import annotations

import time
import urllib.parse
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from kvferry.errors import AuthenticationError, ConfigError
from kvferry.observe import get_log, render_metrics
from kvferry.protocol.membership import InstanceReport, Verdict
from kvferry.router.errors import error_body
from kvferry.router.exchange import Exchange
from kvferry.router.http_messages import JSON, Request, Response
from kvferry.router.surroundings import Surroundings
from kvferry.types import Outcome
from kvferry.wire import Refusals, verify_http

INSTANCES_PATH = "/kvferry/v1/instances"
OUTCOMES_PATH = "/kvferry/v1/outcomes"
_OPEN_PATHS = ("/health", "/ready", "/metrics", "/debug/handoffs", "/v1/models")
_report_decoder = msgspec.json.Decoder(InstanceReport)
_outcomes_decoder = msgspec.json.Decoder(list[Outcome])
_log = get_log("kvferry.router")


class Control:
    """Handlers of everything but completions."""

    def __init__(
        self, shared: Surroundings, secret: bytes | None, exchanges: Iterable[Exchange], *, alive: Callable[[], bool]
    ) -> None:
        self._shared = shared
        self._secret = secret
        self._exchanges = exchanges
        self._alive = alive
        self._refusals = Refusals()
        self.draining = False

    def handle(self, request: Request, response: Response) -> None:
        """Answer; 404 for a path that nobody serves, 405 for a method that the path does not take."""
        path = request.path
        if path in _OPEN_PATHS or path.startswith("/v1/models/"):
            if request.method not in (b"GET", b"HEAD"):
                _not_allowed(response, request, "GET, HEAD")
            else:
                self._open(path, response)
        elif path in (OUTCOMES_PATH, INSTANCES_PATH):
            if request.method == b"GET" and path == INSTANCES_PATH:
                response.respond(200, msgspec.json.encode(self.instances()))
            elif request.method != b"POST":
                _not_allowed(response, request, "POST")
            elif self._authentic(request, response):
                self._post(path, request, response)
        elif path.startswith(INSTANCES_PATH + "/"):
            if request.method != b"DELETE":
                _not_allowed(response, request, "DELETE")
            elif self._authentic(request, response):
                self._leave(request, response)
        else:
            response.respond(404, error_body(404, f"there is nothing at {path[:200]}"))

    def _open(self, path: str, response: Response) -> None:
        match path:
            case "/health":
                if self._alive():
                    response.respond(200, b'{"status":"ok"}')
                else:
                    response.respond(503, error_body(503, "a part of this router died; its log has the traceback"))
            case "/ready":
                self._ready(response)
            case "/metrics":
                body, content_type = self.metrics()
                response.respond(200, body, [(b"content-type", content_type.encode())])
            case "/debug/handoffs":
                response.respond(200, msgspec.json.encode(self.handoffs()))
            case "/v1/models":
                cards = [_card(name) for name in self._shared.fleet.models()]
                response.respond(200, msgspec.json.encode({"object": "list", "data": cards}))
            case _:
                name = urllib.parse.unquote(path.removeprefix("/v1/models/"))
                if self._shared.fleet.knows_model(name):
                    response.respond(200, msgspec.json.encode(_card(name)))
                else:
                    response.respond(404, unknown_model(name, self._shared.fleet.models()))

    def _ready(self, response: Response) -> None:
        if self.draining:
            response.respond(503, error_body(503, "the router is ending"))
        elif not self._shared.fleet.is_ready():
            response.respond(503, error_body(503, "no instance that can decode is registered"))
        else:
            response.respond(200, b'{"status":"ready"}')

    def _authentic(self, request: Request, response: Response) -> bool:
        if self._secret is None:
            return True
        try:
            verify_http(
                self._secret,
                request.header(b"x-kvferry-auth"),
                request.method.decode("latin-1"),
                request.target.decode("latin-1"),
                request.body,
            )
        except AuthenticationError as error:
            self._refusals.add(f"{response.peer} at {request.path}", error)
            response.respond(401, error_body(401, str(error)))
            return False
        return True

    def _post(self, path: str, request: Request, response: Response) -> None:
        try:
            if path == OUTCOMES_PATH:
                for outcome in _outcomes_decoder.decode(request.body):
                    self._take_outcome(outcome)
                response.respond(200, b"{}")
                return
            verdict, lease = self._shared.fleet.report(_report_decoder.decode(request.body), time.monotonic())
        except (msgspec.MsgspecError, UnicodeDecodeError, ConfigError) as error:
            response.respond(400, error_body(400, f"the body is not what {path} takes: {error}"))
            return
        if verdict is Verdict.SUPERSEDED:
            why = "a newer process has registered under this instance's name; give each instance its own"
            response.respond(409, error_body(409, why, code="superseded"))
        elif verdict is Verdict.FULL:
            response.respond(503, error_body(503, "the table of instances is full"))
        else:
            response.respond(200, msgspec.json.encode(lease))

    def _leave(self, request: Request, response: Response) -> None:
        instance_id = urllib.parse.unquote(request.path.removeprefix(INSTANCES_PATH + "/"))
        given = urllib.parse.parse_qs(request.query).get("incarnation", [""])[0]
        if not given.isdecimal() or len(given) > 20:
            response.respond(400, error_body(400, "leaving needs ?incarnation=N", param="incarnation"))
        elif self._shared.fleet.leave(instance_id, int(given)):
            response.respond(200, b"{}")
        else:
            response.respond(404, error_body(404, f"instance {instance_id[:200]} with incarnation {given} is not here"))

    def _take_outcome(self, outcome: Outcome) -> None:
        self._shared.metrics.handoff_ended(outcome)
        exchange = self._shared.handoffs.get(outcome.handoff)
        if exchange is None:
            self._shared.metrics.late_outcomes.inc()
            _log.debug("late outcome", handoff=outcome.handoff, state=outcome.state, cause=outcome.cause)
        else:
            exchange.outcome(outcome)

    def _set_gauges(self) -> None:
        requests = self._shared.metrics.requests
        now_s = time.monotonic()
        started = [e.started for e in self._exchanges]
        requests.in_flight.set(sum(started))
        requests.queued.set(len(started) - sum(started))
        requests.instances.clear()
        for member in self._shared.fleet.membership:
            state = "stuck" if member.is_stuck(now_s) else "serving"
            requests.instances.labels(member.report.role, state).inc()

    def metrics(self) -> tuple[bytes, str]:
        """The body of /metrics and its content type."""
        self._set_gauges()
        return render_metrics(self._shared.metrics.registry)

    def instances(self) -> dict[str, Any]:
        """The table of instances and the edges that had failures, for people and `kvferry top`."""
        now_s = time.monotonic()
        fleet = self._shared.fleet
        rows = [
            {
                **{k: v for k, v in msgspec.to_builtins(m.report).items() if k not in ("handoffs", "fingerprint")},
                "silent_s": round(now_s - m.seen_s, 3),
                "age_s": round(now_s - m.joined_s, 3),
                "polled": m.polled,
                "stuck": m.is_stuck(now_s),
                "load": fleet.load(m.report.instance_id),
                "mismatches": fleet.membership.mismatches(m.report),
            }
            for m in fleet.membership
        ]
        edges = [
            {
                "prefill": key[0],
                "decode": key[2],
                "failures": edge.failures,
                "blocked_s": round(max(0.0, edge.blocked_until_s - now_s), 3),
                "last_cause": edge.last_cause,
            }
            for key, edge in fleet.membership.edges().items()
        ]
        return {"instances": rows, "edges": edges}

    def handoffs(self) -> dict[str, Any]:
        """Every request in hand with its handoff, what the instances say of theirs, and how the latest ones went."""
        now_s = time.monotonic()
        requests = []
        for exchange in self._exchanges:
            machine, placed = exchange.machine, exchange.machine.placed
            requests.append(
                {
                    "request": exchange.request_id,
                    "handoff": exchange.handoff,
                    "attempt": machine.attempt,
                    "state": machine.state,
                    "stage": machine.stage,
                    "age_s": round(now_s - exchange.arrived_s, 3),
                    "remaining_s": round(exchange.handoff_remaining_s, 3) if exchange.handoff else None,
                    "deadline_s": round(exchange.deadline_s - now_s, 3),
                    "prefill": placed.prefill if placed is not None else None,
                    "decode": placed.decode if placed is not None else None,
                    "reason": placed.reason if placed is not None else None,
                }
            )
        sides = [
            {"instance": m.report.instance_id, "reported_s": round(now_s - m.seen_s, 3), **msgspec.to_builtins(view)}
            for m in self._shared.fleet.membership
            for view in m.report.handoffs
        ]
        recent = [msgspec.to_builtins(record) for record in self._shared.metrics.recent]
        return {"requests": requests, "instances": sides, "recent": recent}


def unknown_model(name: str, known: list[str]) -> bytes:
    """The body of a 404 for a model that nobody serves."""
    serves = f"; there is {', '.join(known)}" if known else ""
    return error_body(404, f"The model `{name}` does not exist{serves}", param="model", code="model_not_found")


def _card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "kvferry"}


def _not_allowed(response: Response, request: Request, allowed: str) -> None:
    message = f"{request.path[:200]} does not take {request.method.decode('latin-1')}; it takes {allowed}"
    response.respond(405, error_body(405, message), [JSON, (b"allow", allowed.encode())])
