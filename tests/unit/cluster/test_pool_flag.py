"""`kvferry up --pool`: every instance gets the nodes; the demo has none, whatever the environment says."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from kvferry.cluster import command
from kvferry.cluster.instances import start_engine
from kvferry.cluster.local import ClusterPlan, LocalCluster
from kvferry.config import Settings

NODES = ("tcp://127.0.0.1:7400", "tcp://10.0.0.2:7400")


def planned(monkeypatch: pytest.MonkeyPatch, *argv: str) -> ClusterPlan:
    """What a command line would start."""
    plans: list[ClusterPlan] = []

    def keep(plan: ClusterPlan, *_: Any) -> None:
        plans.append(plan)

    monkeypatch.setattr(command, "_up", keep)
    monkeypatch.setattr(command, "run_demo", keep)
    monkeypatch.setattr(command, "_run_until_signal", lambda work, **_: _drain(work))
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(argv)
    args.run(args)
    return plans[0]


def _drain(work: Any) -> int:
    if work is not None:
        with pytest.raises(TypeError):
            work.send(None)
    return 0


def test_up_gives_all_nodes_to_every_instance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = planned(monkeypatch, "up", "--pool", NODES[0], "--pool", NODES[1], "--logs", str(tmp_path))
    assert plan.settings.engine.pool == NODES
    cluster = LocalCluster(plan, lambda line: None)
    start = start_engine(cluster.settings, {}, name="p", role="prefill", router_url=None, gpus=None)
    assert start.environ["KVFERRY_ENGINE_POOL"] == ",".join(NODES)
    # The node was started without a secret, so a secret of this cluster's own would shut it out.
    assert cluster.settings.cluster.secret is None


def test_without_a_pool_a_cluster_has_a_secret_of_its_own(tmp_path: Path) -> None:
    cluster = LocalCluster(ClusterPlan(1, 1, Settings(), logs_dir=tmp_path), lambda line: None)
    assert cluster.settings.cluster.secret


def test_the_demo_has_no_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFERRY_ENGINE_POOL", NODES[0])
    assert planned(monkeypatch, "demo").settings.engine.pool == ()
