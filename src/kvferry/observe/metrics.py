"""Every Prometheus metric of kvferry, in one file. Each process makes the groups it needs on a registry of its own.

States, stages, causes and transports are labels with few values; ids are never labels (they are in the logs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from kvferry.types import Outcome, TerminalState

POOL_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
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


class PoolReading(NamedTuple):
    """A pool node's figures at one moment. Counts go on from the node's start.

    `blocks` is by namespace: `got_host`, `got_disk`, `missed`, `stored`, `duplicate`, `refused`, `bytes_in`,
    `bytes_out`; `slabs` and `disk_slots` by use, `events` by name.
    """

    blocks: Mapping[str, Mapping[str, int]] = {}
    events: Mapping[str, int] = {}
    slabs: Mapping[str, int] = {}
    disk_slots: Mapping[str, int] = {}
    disk_queued_bytes: int = 0
    leases: int = 0
    replicas: int = 0
    draining: bool = False


class PoolMetrics(Collector):
    """One node of the pool. All but the latencies is read from the node when it is scraped."""

    def __init__(self, registry: CollectorRegistry, read: Callable[[], PoolReading] = PoolReading) -> None:
        self._read = read
        self.get = Histogram(
            "kvferry_pool_get_seconds",
            "From a get's request to its lease: blocks that are on disk are in memory then",
            buckets=POOL_SECONDS,
            registry=registry,
        )
        self.put = Histogram(
            "kvferry_pool_put_seconds", "From a put's request to its commit", buckets=POOL_SECONDS, registry=registry
        )
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        now = self._read()
        got = CounterMetricFamily(
            "kvferry_pool_blocks_got",
            "Blocks asked for, by the tier that had them or miss",
            labels=("namespace", "tier"),
        )
        put = CounterMetricFamily(
            "kvferry_pool_blocks_put", "Blocks put, by what became of them", labels=("namespace", "result")
        )
        moved = CounterMetricFamily(
            "kvferry_pool_bytes", "Bytes of blocks stored (in) and leased to readers (out)",
            labels=("namespace", "direction"),
        )  # fmt: skip
        for namespace, counts in now.blocks.items():
            for tier, name in (("host", "got_host"), ("disk", "got_disk"), ("miss", "missed")):
                got.add_metric((namespace, tier), counts.get(name, 0))
            for result in ("stored", "duplicate", "refused"):
                put.add_metric((namespace, result), counts.get(result, 0))
            for direction in ("in", "out"):
                moved.add_metric((namespace, direction), counts.get(f"bytes_{direction}", 0))
        events = CounterMetricFamily(
            "kvferry_pool_events", "What happened in the node, failures by their cause", labels=("event",)
        )
        for event, count in now.events.items():
            events.add_metric((event,), count)
        slabs = GaugeMetricFamily(
            "kvferry_pool_slabs", "Slabs of the arena by use; they add up to all", labels=("use",)
        )
        slots = GaugeMetricFamily("kvferry_pool_disk_slots", "Slots of the disk tier by use", labels=("use",))
        for family, uses in ((slabs, now.slabs), (slots, now.disk_slots)):
            for use, count in uses.items():
                family.add_metric((use,), count)
        yield from (got, put, moved, events, slabs, slots)
        for name, what, value in (
            ("disk_queued_bytes", "Bytes that wait to be written to disk", now.disk_queued_bytes),
            ("leases", "Gets that are being read", now.leases),
            ("replicas", "Blocks in memory that came from another node", now.replicas),
            ("draining", "1 where the node is being taken out of service", int(now.draining)),
        ):
            yield GaugeMetricFamily(f"kvferry_pool_{name}", what, value=value)


def render_metrics(registry: CollectorRegistry) -> tuple[bytes, str]:
    """The body of `/metrics` and its content type."""
    return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4
