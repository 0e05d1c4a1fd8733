"""What an engine's attachment to the KV pool counts, and the metrics that show it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


class PoolStats(msgspec.Struct, frozen=True):
    """Figures since the start. `loaded_blocks` by tier; `failures` by cause; seconds are sums over all calls."""

    lookups: int = 0
    loads: int = 0
    loaded_blocks: dict[str, int] = {}
    missed_blocks: int = 0
    loaded_bytes: int = 0
    load_seconds: float = 0.0
    saves: int = 0
    saved_blocks: int = 0
    duplicate_blocks: int = 0
    refused_blocks: int = 0
    saved_bytes: int = 0
    save_seconds: float = 0.0
    saving_bytes: int = 0
    failures: dict[str, int] = {}


class AttachmentMetrics(Collector):
    """One engine's side of the pool, read when it is scraped."""

    def __init__(self, registry: CollectorRegistry, read: Callable[[], PoolStats] = PoolStats) -> None:
        self._read = read
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        now = self._read()
        loaded = {tier: now.loaded_blocks.get(tier, 0) for tier in ("host", "disk", "remote")}
        saved = {"stored": now.saved_blocks, "duplicate": now.duplicate_blocks, "refused": now.refused_blocks}
        yield _counter(
            "loaded_blocks",
            "Blocks asked of the pool, by the tier that had them or miss",
            "tier",
            {**loaded, "miss": now.missed_blocks},
        )
        yield _counter("saved_blocks", "Blocks offered to the pool, by what became of them", "result", saved)
        yield _counter(
            "bytes", "Bytes loaded and saved", "direction", {"loaded": now.loaded_bytes, "saved": now.saved_bytes}
        )
        yield _counter(
            "seconds",
            "Time that loads and saves took, summed",
            "direction",
            {"loaded": now.load_seconds, "saved": now.save_seconds},
        )
        yield _counter(
            "calls",
            "Calls of the pool",
            "call",
            {"lookup": now.lookups, "load": now.loads, "save": now.saves},
        )
        yield _counter("failures", "Calls of the pool that failed, by cause", "cause", now.failures)
        yield GaugeMetricFamily(
            "kvferry_engine_pool_saving_bytes", "Bytes of blocks that wait to be saved", value=now.saving_bytes
        )


def _counter(name: str, text: str, label: str, values: dict[str, int] | dict[str, float]) -> Metric:
    family = CounterMetricFamily(f"kvferry_engine_pool_{name}", text, labels=(label,))
    for value, count in values.items():
        family.add_metric((value,), count)
    return family
