"""What would be started: settings, secrets, GPUs and ports of each process, read without starting any."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from kvferry.cluster.instances import (
    VllmOptions,
    assign_gpus,
    start_engine,
    start_router,
    start_vllm,
    threads_each,
    visible_gpus,
)
from kvferry.config import load
from kvferry.errors import ConfigError
from kvferry.policy.ports import plan_ports

SECRET = "0123456789abcdef"
INHERITED = {"PATH": "/bin", "KVFERRY_ROUTER_PORT": "1", "KVFERRY_TEST_KEPT": "yes"}


def test_children_read_exactly_the_parents_tree():
    settings = load('[engine]\nblock_size = 32\n[handoff]\ndeadline_s = "7s"\n', {"KVFERRY_CLUSTER_SECRET": SECRET})
    start = start_engine(settings, INHERITED, name="decode-1", role="decode", router_url="http://r:1", gpus=["3"])
    child = load(None, start.environ)
    assert (child.engine.role, child.engine.instance_id, child.engine.port) == ("decode", "decode-1", 0)
    assert (child.engine.block_size, child.handoff.deadline_s, child.cluster.router_url) == (32, 7.0, "http://r:1")
    assert child.router.port == 8000, "a variable of the parent's that its own flags overrode must not come back"
    assert start.environ["KVFERRY_TEST_KEPT"] == "yes" and start.environ["PATH"] == "/bin"
    assert start.environ["CUDA_VISIBLE_DEVICES"] == "3"
    router = start_router(settings, INHERITED)
    assert load(None, router.environ) == settings


def test_the_secret_is_in_no_command_line():
    settings = load(None, {"KVFERRY_CLUSTER_SECRET": SECRET, "KVFERRY_ENGINE_MODEL": "m"})
    ports = plan_ports(20000, num_prefill=0, num_decode=1, num_internal=16).decode[0]
    starts = [
        start_router(settings, {}),
        start_engine(settings, {}, name="a", role="both", router_url=None, gpus=None),
        start_vllm(
            settings,
            {},
            name="b",
            role="decode",
            router_url="http://r:1",
            ports=ports,
            gpus=None,
            options=VllmOptions(),
        ),
    ]
    for start in starts:
        assert SECRET not in " ".join(start.argv)
        assert start.environ["KVFERRY_CLUSTER_SECRET"] == SECRET
        assert "CUDA_VISIBLE_DEVICES" not in start.environ


@pytest.mark.parametrize(
    ("role", "kv_role"), [("prefill", "kv_producer"), ("decode", "kv_consumer"), ("both", "kv_both")]
)
def test_the_command_line_of_vllm(role, kv_role: str):
    settings = load(None, {"KVFERRY_ENGINE_MODEL": "org/model", "KVFERRY_HANDOFF_ON_FAILURE": "fail"})
    ports = plan_ports(20000, num_prefill=1, num_decode=1, num_internal=16).prefill[0]
    options = VllmOptions(command=("/venv/bin/vllm",), arguments=("--enforce-eager",), environ={"A": "b"})
    start = start_vllm(
        settings, {}, name="x-0", role=role, router_url="http://r:1", ports=ports, gpus=["GPU-7"], options=options
    )
    argv = list(start.argv)
    assert argv[:3] == ["/venv/bin/vllm", "serve", "org/model"] and argv[-1] == "--enforce-eager"
    assert argv[argv.index("--port") + 1] == str(ports.http) and start.url == f"http://127.0.0.1:{ports.http}"
    transfer = json.loads(argv[argv.index("--kv-transfer-config") + 1])
    extra = transfer.pop("kv_connector_extra_config")
    assert transfer == {
        "kv_connector": "KVFerryConnector",
        "kv_connector_module_path": "kvferry.connector.vllm",
        "kv_role": kv_role,
        "kv_load_failure_policy": "fail",
    }
    assert (extra["router"], extra["url"], extra["instance_id"]) == ("http://r:1", start.url, "x-0")
    assert start.environ["VLLM_HOST_IP"] == start.environ["MASTER_ADDR"] == "127.0.0.1"
    assert int(start.environ["VLLM_PORT"]) in ports.internal and start.environ["MASTER_PORT"] == str(ports.master)
    assert start.environ["A"] == "b" and start.environ["CUDA_VISIBLE_DEVICES"] == "GPU-7"
    assert start.death_signal == signal.SIGTERM


def test_what_vllm_gets_is_what_its_connector_takes():
    from kvferry.connector.vllm.settings import settings_from_extra_config

    pool = {"KVFERRY_ENGINE_POOL": "tcp://h:1,tcp://i:1", "KVFERRY_POOL_DIRECTORY": "redis://r:6379/0"}
    settings = load(None, {"KVFERRY_ENGINE_MODEL": "m", **pool})
    ports = plan_ports(20000, num_prefill=0, num_decode=1, num_internal=16).decode[0]
    start = start_vllm(
        settings, {}, name="x", role="decode", router_url="http://r:1", ports=ports, gpus=None, options=VllmOptions()
    )
    extra = json.loads(start.argv[start.argv.index("--kv-transfer-config") + 1])["kv_connector_extra_config"]
    taken = settings_from_extra_config(extra)
    assert (taken.router, taken.pool, taken.pool_directory) == ("http://r:1", "tcp://h:1", "redis://r:6379/0")


def test_vllm_needs_a_model():
    ports = plan_ports(20000, num_prefill=0, num_decode=1, num_internal=1).decode[0]
    with pytest.raises(ConfigError, match="--model"):
        start_vllm(load(), {}, name="x", role="decode", router_url=None, ports=ports, gpus=None, options=VllmOptions())


def test_gpus_are_assigned_one_each():
    assert assign_gpus([], 2, share=False, needed=True) == [None, None]
    assert assign_gpus(["0", "1"], 2, share=False, needed=True) == [["0"], ["1"]]
    with pytest.raises(ConfigError, match="3 instances need a GPU each and 2"):
        assign_gpus(["0", "1"], 3, share=False, needed=True)
    assert assign_gpus(["4"], 2, share=True, needed=True) == [["4"], ["4"]]
    assert assign_gpus(["4"], 2, share=False, needed=False) == [["4"], ["4"]]


def test_visible_gpus(tmp_path: Path):
    assert visible_gpus({}, tmp_path) == []
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / name).mkdir()
    assert visible_gpus({}, tmp_path) == ["0", "1"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "3, GPU-1"}, tmp_path) == ["3", "GPU-1"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == []
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}, tmp_path) == []


def test_threads_are_spread_unless_set():
    assert threads_each(load(), 3, 8).engine.num_threads == 2
    assert threads_each(load(), 8, 2).engine.num_threads == 1
    assert threads_each(load(None, {"KVFERRY_ENGINE_NUM_THREADS": "5"}), 3, 8).engine.num_threads == 5
