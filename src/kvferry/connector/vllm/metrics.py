"""The connector's figures in vLLM's own `/metrics` and log line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.metrics.utils import create_metric_per_engine

from kvferry.connector.vllm import stats

BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


@dataclass
class KVFerryStats(KVConnectorStats):  # type: ignore[misc]
    """One interval's counts; `data` is as `stats.empty()` has it."""

    data: dict[str, Any] = field(default_factory=stats.empty)

    def reset(self) -> None:
        self.data = stats.empty()

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        stats.add(self.data, other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        return stats.summary(self.data)  # type: ignore[return-value]

    def is_empty(self) -> bool:
        return stats.is_empty(self.data)


class KVFerryPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """Prometheus metrics `vllm:kvferry_*`, each with vLLM's own labels too."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._handoffs = self._counter(
            "handoffs", "Handoffs that ended on this target, by how.", ("state", "stage", "cause")
        )
        self._releases = self._counter("releases", "Source handoffs whose blocks were released, by why.", ("reason",))
        self._publications = self._counter(
            "publications", "Steps of this rank whose blocks were published, by into how many pieces.", ("pieces",)
        )
        self._bytes = self._counter("pulled_bytes", "KV bytes pulled into this instance.", ("transport",))
        self._blocks = self._counter("pulled_blocks", "KV blocks of this rank that came over handoffs.", ())
        self._recomputed = self._counter(
            "recomputed_prompt_tokens", "Prompt tokens computed here in spite of a handoff.", ()
        )
        self._durations = self._histogram(
            "handoff_seconds", "From the reservation of blocks to the verdict, of handoffs that moved bytes."
        )
        self._pool_by_label = {
            stats.POOL_LOOKUPS: self._counter("pool_lookups", "Requests for which the pool was asked.", ("result",)),
            stats.POOL_LOADS: self._counter("pool_loads", "This rank's loads from the pool, by how.", ("result",)),
            stats.POOL_LOADED_BLOCKS: self._counter(
                "pool_loaded_blocks", "KV blocks of this rank that came from the pool.", ("tier",)
            ),
            stats.POOL_SAVED_BLOCKS: self._counter(
                "pool_saved_blocks", "KV blocks of this rank that were offered to the pool.", ("result",)
            ),
            stats.POOL_SAVE_FAILURES: self._counter(
                "pool_save_failures", "Saves that were refused or broke off.", ("cause",)
            ),
        }
        self._pool_numbers = {
            stats.POOL_LOADED_BYTES: self._counter("pool_loaded_bytes", "KV bytes that came from the pool.", ()),
            stats.POOL_SAVED_BYTES: self._counter("pool_saved_bytes", "KV bytes that the pool took.", ()),
        }
        self._pool_durations = self._histogram("pool_load_seconds", "Duration of loads that brought blocks.")

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        data = transfer_stats_data
        for label, count in data[stats.HANDOFFS].items():
            self._labelled(self._handoffs, engine_idx, *label.split("/")).inc(count)
        for reason, count in data[stats.RELEASES].items():
            self._labelled(self._releases, engine_idx, reason).inc(count)
        for pieces, count in data[stats.PUBLICATIONS].items():
            self._labelled(self._publications, engine_idx, pieces).inc(count)
        for transport, count in data[stats.BYTES].items():
            self._labelled(self._bytes, engine_idx, transport).inc(count)
        self._labelled(self._blocks, engine_idx).inc(data[stats.PULLED_BLOCKS])
        self._labelled(self._recomputed, engine_idx).inc(data[stats.RECOMPUTED_TOKENS])
        for seconds in data[stats.DURATIONS]:
            self._durations[engine_idx].observe(seconds)
        for key, counter in self._pool_by_label.items():
            for label, count in data[key].items():
                self._labelled(counter, engine_idx, label).inc(count)
        for key, counter in self._pool_numbers.items():
            self._labelled(counter, engine_idx).inc(data[key])
        for seconds in data[stats.POOL_LOAD_SECONDS]:
            self._pool_durations[engine_idx].observe(seconds)

    def _histogram(self, name: str, documentation: str) -> Any:
        histogram = self._histogram_cls(
            name=f"vllm:kvferry_{name}",
            documentation=documentation,
            buckets=BUCKETS_S,
            labelnames=self._labelnames,
        )
        return create_metric_per_engine(histogram, self.per_engine_labelvalues)

    def _counter(self, name: str, documentation: str, labels: tuple[str, ...]) -> Any:
        counter = self._counter_cls(
            name=f"vllm:kvferry_{name}", documentation=documentation, labelnames=[*self._labelnames, *labels]
        )
        if not labels:
            for values in self.per_engine_labelvalues.values():
                counter.labels(*values)  # shows 0 before the first event
        return counter

    def _labelled(self, metric: Any, engine_idx: int, *labels: str) -> Any:
        return metric.labels(*self.per_engine_labelvalues[engine_idx], *labels)
