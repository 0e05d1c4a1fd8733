"""How requests went: the metrics of the router, the one log line of each request, and the latest ones for /debug."""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, Counter

from kvferry.observe import HandoffMetrics, Log, RequestMetrics, get_log
from kvferry.types import Outcome, TerminalState

MAX_RECENT = 512
_log = get_log("kvferry.router")


class RequestRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """How one request went. `stages` are seconds in queue, prefill, handoff and decode; `handoff_s` is the target's own
    measure; `ttft_s` and `total_s` count from the request's arrival."""

    request: str
    state: TerminalState
    path: str
    status: int
    stage: str | None = None
    cause: str | None = None
    detail: str | None = None
    model: str | None = None
    stream: bool = False
    prefill: str | None = None
    decode: str | None = None
    handoff: str | None = None
    attempts: int = 0
    stages: dict[str, float] = {}
    ttft_s: float | None = None
    total_s: float = 0.0
    handoff_s: float | None = None
    handoff_bytes: int = 0
    transport: str | None = None
    tokens_computed: int = 0


class RouterMetrics:
    """One registry for each router, so that several in one process (tests) do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.recent: deque[RequestRecord] = deque(maxlen=MAX_RECENT)
        self.requests = RequestMetrics(self.registry)
        self._handoffs = HandoffMetrics(self.registry)
        self.failovers = Counter(
            "kvferry_router_failovers", "New attempts after a leg failed", registry=self.registry
        )  # fmt: skip
        self.late_outcomes = Counter(
            "kvferry_router_late_outcomes", "Reports of handoffs whose request was over", registry=self.registry
        )
        self.promised_tokens_computed = Counter(
            "kvferry_router_promised_tokens_computed",
            "Prompt tokens that targets computed themselves although a handoff was promised",
            registry=self.registry,
        )
        self.refused = Counter(
            "kvferry_router_refused",
            "Requests refused at the door, by HTTP status",
            ("status",),
            registry=self.registry,
        )

    def handoff_ended(self, outcome: Outcome) -> None:
        """Count what a target reported."""
        self._handoffs.count_end(outcome)

    def request_ended(self, record: RequestRecord, *, expected_tokens: int) -> None:
        """Count and log a request's end; exactly once a request.

        A handoff was promised on the path `pair`: what the target computed of the prompt there is counted, and more
        than `expected_tokens` of a delivered one are worth a warning, since then the transfer did not really happen.
        """
        self.recent.append(record)
        delivered = record.state is TerminalState.DELIVERED
        self.requests.count_end(record.state, None if delivered else record.stage, None if delivered else record.cause)
        self.requests.duration.observe(record.total_s)
        self.requests.attempts.inc(record.attempts)
        if record.ttft_s is not None:
            self.requests.ttft.observe(record.ttft_s)
        for stage, seconds in record.stages.items():
            self.requests.stage.labels(stage).observe(seconds)
        if record.path == "pair":
            self.promised_tokens_computed.inc(record.tokens_computed)
            if delivered and record.tokens_computed > expected_tokens:
                _log.warning(
                    "prompt computed although its handoff was delivered",
                    request=record.request,
                    handoff=record.handoff,
                    prefill=record.prefill,
                    decode=record.decode,
                    tokens_computed=record.tokens_computed,
                    expected_at_most=expected_tokens,
                )
        write = _writer(_log, record)
        if write is not None:
            fields: dict[str, Any] = msgspec.to_builtins(record)
            fields["stages"] = {name: round(seconds, 6) for name, seconds in record.stages.items()}
            write("request ended", **fields)


def _writer(log: Log, record: RequestRecord) -> Any:
    """The log's method for the weight of this end; None where nobody would see the line."""
    if record.state is TerminalState.RECOMPUTED:
        return log.warning
    if record.state is TerminalState.FAILED and record.status >= 500:
        return log.error
    return log.info if logging.getLogger("kvferry.router").isEnabledFor(logging.INFO) else None
