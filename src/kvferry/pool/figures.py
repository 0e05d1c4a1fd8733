"""What a node counts: gets, puts and bytes by namespace, events by name, latencies. On the node's event loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Histogram

from kvferry.observe import PoolMetrics, PoolReading, render_metrics
from kvferry.pool.messages import NamespaceStat

MAX_NAMESPACES = 64
"""Counted apart; what comes later counts as `OTHERS`, so that tenants without number fill no monitoring system."""

OTHERS = "(others)"
ALARMING = ("directory_failures", "disk_broken", "disk_errors", "leases_expired", "removals_missed", "replicas_wrong")
"""Counted from 0: a rate over a counter that appears with its first failure would miss that failure."""


class Figures:
    """One node's figures. `counts` are events by name; other parts of the node count theirs in it, too."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter(dict.fromkeys(ALARMING, 0))
        self.by_namespace: dict[str, Counter[str]] = {}
        self._registry = CollectorRegistry()
        self._reading = PoolReading()
        self._metrics = PoolMetrics(self._registry, lambda: self._reading)

    def got(self, namespace: str, *, host: int, disk: int, missed: int, nbytes: int, seconds: float) -> None:
        """A get was leased these blocks, of `nbytes` in all."""
        self.counts["get_host"] += host
        self.counts["get_disk"] += disk
        self.counts["get_missed"] += missed
        self.counts["get_bytes"] += nbytes
        mine = self._of(namespace)
        mine["got_host"] += host
        mine["got_disk"] += disk
        mine["missed"] += missed
        mine["bytes_out"] += nbytes
        self._metrics.get.observe(seconds)

    def put(self, namespace: str, *, stored: int, duplicates: int, refused: int, nbytes: int, seconds: float) -> None:
        """A put stored these blocks, of `nbytes` in all."""
        self.counts["put_stored"] += stored
        self.counts["put_duplicates"] += duplicates
        self.counts["put_refused"] += refused
        self.counts["put_bytes"] += nbytes
        mine = self._of(namespace)
        mine["stored"] += stored
        mine["duplicate"] += duplicates
        mine["refused"] += refused
        mine["bytes_in"] += nbytes
        self._metrics.put.observe(seconds)

    def render(self, reading: PoolReading) -> tuple[bytes, str]:
        """The body of `/metrics` and its content type; `reading` is the node's state now, without `blocks`."""
        self._reading = reading._replace(blocks=self.by_namespace)
        return render_metrics(self._registry)

    def namespaces(self, used: Mapping[str, int], quotas: Mapping[str, int]) -> list[NamespaceStat]:
        """What each namespace got and put.

        Args:
            used: bytes of host memory by namespace.
        """
        return [
            NamespaceStat(
                namespace=namespace,
                host_bytes=used.get(namespace, 0),
                quota_bytes=quotas.get(namespace),
                got_host=counts["got_host"],
                got_disk=counts["got_disk"],
                missed=counts["missed"],
                stored=counts["stored"],
                duplicates=counts["duplicate"],
                refused=counts["refused"],
                bytes_in=counts["bytes_in"],
                bytes_out=counts["bytes_out"],
            )
            for namespace, counts in sorted({**{name: Counter[str]() for name in used}, **self.by_namespace}.items())
        ]

    def latencies_ms(self) -> dict[str, float]:
        """The median and the 99th percentile of gets and puts, to the next step of the histogram; none before the
        first."""
        found = {}
        for what, histogram in (("get", self._metrics.get), ("put", self._metrics.put)):
            for quantile in (50, 99):
                seconds = _quantile_s(histogram, quantile / 100)
                if seconds is not None:
                    found[f"{what}_p{quantile}"] = 1000 * seconds
        return found

    def _of(self, namespace: str) -> Counter[str]:
        counts = self.by_namespace.get(namespace)
        if counts is None:
            name = namespace if len(self.by_namespace) < MAX_NAMESPACES else OTHERS
            counts = self.by_namespace.setdefault(name, Counter())
        return counts


def _quantile_s(histogram: Histogram, quantile: float) -> float | None:
    (family,) = histogram.collect()
    steps = [(float(s.labels["le"]), s.value) for s in family.samples if s.name.endswith("_bucket")]
    total = steps[-1][1]
    return next((upto for upto, count in steps if count >= quantile * total), None) if total else None
