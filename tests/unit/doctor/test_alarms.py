"""Alarms and dashboard ask for metrics that exist, and name findings that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

from prometheus_client import CollectorRegistry

from kvferry.doctor.findings import catalogue
from kvferry.observe.attachment import AttachmentMetrics
from kvferry.observe.metrics import HandoffMetrics, InstanceMetrics, PoolMetrics, RequestMetrics

MONITORING = Path(__file__).parents[3] / "monitoring"
RULES = (MONITORING / "prometheus-rules.yml").read_text()
DASHBOARD = json.loads((MONITORING / "grafana-dashboard.json").read_text())


def _known() -> set[str]:
    registries = [CollectorRegistry() for _ in range(5)]
    RequestMetrics(registries[0])
    HandoffMetrics(registries[1])
    InstanceMetrics(registries[2])
    PoolMetrics(registries[3])
    AttachmentMetrics(registries[4])
    names = set()
    for registry in registries:
        for family in registry.collect():
            base = family.name
            endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
            names |= {base + ending for ending in endings}
    return names


def test_rules_use_metrics_that_exist() -> None:
    expressions = "\n".join(line for line in RULES.splitlines() if not line.lstrip().startswith("#"))
    used = set(re.findall(r"\bkvferry_[a-z_]+", expressions))
    assert used
    assert used <= _known()


def test_the_dashboard_uses_metrics_that_exist() -> None:
    used = {
        name
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", [])
        for name in re.findall(r"\bkvferry_[a-z_]+", target["expr"])
    }
    assert len(used) > 10
    assert used <= _known()


def test_selectors_use_labels_that_their_metrics_have() -> None:
    collectors = {
        c._name: set(c._labelnames) | {"instance", "job", "le"}
        for group in (RequestMetrics, HandoffMetrics, InstanceMetrics)
        for c in vars(group(CollectorRegistry())).values()
        if hasattr(c, "_labelnames")
    }
    for family in PoolMetrics(CollectorRegistry()).collect():
        collectors[family.name] = set(getattr(family, "_labelnames", ())) | {"instance", "job"}
    expressions = [RULES, *(t["expr"] for p in DASHBOARD["panels"] for t in p.get("targets", []))]
    selectors = [m for e in expressions for m in re.findall(r"\b(kvferry_[a-z_]+)\{([^}]*)\}", e)]
    assert len(selectors) > 10
    for metric, inside in selectors:
        name = re.sub(r"_(total|bucket|sum|count)$", "", metric)
        assert set(re.findall(r"(\w+)\s*[=!]", inside)) <= collectors[name], (metric, inside)


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        p = panel["gridPos"]
        mine = {(x, y) for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])}
        assert not mine & cells, panel["title"]
        cells |= mine
    assert len({p["id"] for p in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_each_alarm_names_a_finding_with_a_page() -> None:
    named = set(re.findall(r"KVF\d{3}", RULES))
    assert named <= set(catalogue())
    assert RULES.count("- alert:") == RULES.count("finding: KVF")
