"""The instance's numbers for Prometheus, brought up to date when they are asked for."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry

from kvferry.connector.transformers.snapshot import EngineSnapshot
from kvferry.observe import HandoffMetrics, InstanceMetrics, render_metrics
from kvferry.observe.attachment import AttachmentMetrics, PoolStats


class EngineMetrics:
    """One instance's metrics; `render` may be called from any thread but not from two at once."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.handoffs = HandoffMetrics(self.registry)
        self._instance = InstanceMetrics(self.registry)
        self._last = EngineSnapshot()

    def watch_pool(self, read: Callable[[], PoolStats]) -> None:
        """Show the KV pool's side of the instance, too; once."""
        AttachmentMetrics(self.registry, read)

    def render(self, now: EngineSnapshot) -> tuple[bytes, str]:
        """The body of /metrics and its content type."""
        instance, last = self._instance, self._last
        instance.running.set(now.running)
        instance.waiting.set(now.waiting + now.parked)
        instance.steps.inc(now.step - last.step)
        for phase, new, old in (
            ("prefill", now.computed_prompt_tokens, last.computed_prompt_tokens),
            ("reused", now.reused_prompt_tokens, last.reused_prompt_tokens),
            ("pooled", now.pooled_prompt_tokens, last.pooled_prompt_tokens),
            ("decode", now.generated_tokens, last.generated_tokens),
        ):
            instance.tokens.labels(phase).inc(new - old)
        instance.blocks.labels("free").set(now.free_blocks)
        instance.blocks.labels("held").set(now.held_blocks)
        self._last = now
        return render_metrics(self.registry)
