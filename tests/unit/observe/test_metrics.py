"""Metrics: ends are counted with their cause, and series that alerts need are there before the first failure."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry

from kvferry.observe import HandoffMetrics, InstanceMetrics, RequestMetrics, render_metrics
from kvferry.types import HandoffId, Outcome, Stage, TerminalState


def test_all_groups_fit_one_registry_and_render():
    registry = CollectorRegistry()
    for group in (RequestMetrics, HandoffMetrics, InstanceMetrics):
        group(registry)
    body, content_type = render_metrics(registry)
    assert content_type.startswith("text/plain")
    assert b'kvferry_requests_total{cause="",stage="",state="failed"} 0.0' in body
    assert b'kvferry_handoffs_total{cause="",stage="",state="recomputed"} 0.0' in body


def test_outcomes_count_bytes_only_when_delivered_and_tokens_only_when_recomputed():
    registry = CollectorRegistry()
    metrics = HandoffMetrics(registry)
    end: dict[str, Any] = {"handoff": HandoffId("0" * 32), "tokens_computed": 7, "bytes_moved": 4096}
    end |= {"duration_s": 0.1, "transport": "shm"}
    metrics.count_end(Outcome(state=TerminalState.DELIVERED, **end))
    metrics.count_end(Outcome(state=TerminalState.RECOMPUTED, stage=Stage.WAITING, cause="peer_gone", **end))

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    assert value("kvferry_handoff_bytes_total", transport="shm") == 4096
    assert value("kvferry_handoff_recomputed_tokens_total") == 7
    assert value("kvferry_handoffs_total", state="recomputed", stage="waiting", cause="peer_gone") == 1
    assert value("kvferry_handoff_seconds_count") == 2


def test_request_ends():
    registry = CollectorRegistry()
    metrics = RequestMetrics(registry)
    metrics.count_end(TerminalState.FAILED, Stage.QUEUE, "no_instance_available")
    labels = {"state": "failed", "stage": "queue", "cause": "no_instance_available"}
    assert registry.get_sample_value("kvferry_requests_total", labels) == 1
