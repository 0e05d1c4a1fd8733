"""Every Prometheus metric of kvferry, in one file. Each process makes the groups it needs on a registry of its own.

States, stages, causes and transports are labels with few values; ids are never labels (they are in the logs).
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from kvferry.types import Outcome, TerminalState

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class RequestMetrics:
    """Requests as the router sees them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.ended = Counter(
            "kvferry_requests",
            "Requests by terminal state; stage and cause say where and why it was not delivered",
            ("state", "stage", "cause"),
            registry=registry,
        )
        self.in_flight = Gauge("kvferry_requests_in_flight", "Requests being forwarded", registry=registry)
        self.queued = Gauge("kvferry_requests_queued", "Requests that wait for a place", registry=registry)
        self.duration = Histogram(
            "kvferry_request_seconds", "From the request to its last byte", buckets=SECONDS, registry=registry
        )
        self.ttft = Histogram(
            "kvferry_request_ttft_seconds", "From the request to its first token", buckets=SECONDS, registry=registry
        )
        self.stage = Histogram(
            "kvferry_request_stage_seconds", "Time in each stage", ("stage",), buckets=SECONDS, registry=registry
        )
        self.attempts = Counter("kvferry_request_attempts", "Handoffs minted, retries included", registry=registry)
        self.instances = Gauge(
            "kvferry_instances",
            "Registered instances by role and whether they serve",
            ("role", "state"),
            registry=registry,
        )
        for state in TerminalState:
            # A rate over a counter that appears with its first failure would miss that failure.
            self.ended.labels(state, "", "")

    def count_end(self, state: TerminalState, stage: str | None = None, cause: str | None = None) -> None:
        """Count one request's end; exactly once a request."""
        self.ended.labels(state, stage or "", cause or "").inc()


class HandoffMetrics:
    """Handoffs as an instance, or the router for all of them, sees them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.ended = Counter(
            "kvferry_handoffs",
            "Handoffs by how they ended at the target",
            ("state", "stage", "cause"),
            registry=registry,
        )
        self.duration = Histogram(
            "kvferry_handoff_seconds", "From subscribing to the verdict", buckets=SECONDS, registry=registry
        )
        self.bytes = Counter("kvferry_handoff_bytes", "KV bytes delivered", ("transport",), registry=registry)
        self.recomputed_tokens = Counter(
            "kvferry_handoff_recomputed_tokens",
            "Prompt tokens that a target computed itself although a handoff was promised",
            registry=registry,
        )
        for state in TerminalState:
            self.ended.labels(state, "", "")

    def count_end(self, outcome: Outcome) -> None:
        """Count one handoff's end; exactly once a handoff."""
        self.ended.labels(outcome.state, outcome.stage or "", outcome.cause or "").inc()
        self.duration.observe(outcome.duration_s)
        if outcome.state is TerminalState.DELIVERED:
            self.bytes.labels(outcome.transport or "").inc(outcome.bytes_moved)
        elif outcome.state is TerminalState.RECOMPUTED:
            self.recomputed_tokens.inc(outcome.tokens_computed)


class InstanceMetrics:
    """One engine instance: its blocks and its requests."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.blocks = Gauge("kvferry_kv_blocks", "KV blocks by use; they add up to all", ("use",), registry=registry)
        self.running = Gauge("kvferry_engine_running", "Requests being computed", registry=registry)
        self.waiting = Gauge("kvferry_engine_waiting", "Requests that wait", registry=registry)
        self.steps = Counter("kvferry_engine_steps", "Steps of the serving loop", registry=registry)
        self.tokens = Counter("kvferry_engine_tokens", "Tokens computed", ("phase",), registry=registry)


def render_metrics(registry: CollectorRegistry) -> tuple[bytes, str]:
    """The body of `/metrics` and its content type."""
    return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4
