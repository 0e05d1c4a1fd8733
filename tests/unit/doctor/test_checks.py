"""Checks as functions from values to findings, where this machine cannot show the fault itself."""

from __future__ import annotations

import json

import msgspec
import pytest

from kvferry.doctor import Facts, examine
from kvferry.doctor.case import old_mooncake_ports, version_tuple
from kvferry.doctor.facts import Gpu, Host, ProbeStep, Process, Reach, Side
from kvferry.doctor.settings import parse_command, read_settings, split_host_port

LOOPBACK = {"lo": ("127.0.0.1",), "eth0": ("10.0.0.1",)}
HOST = Host(interfaces=LOOPBACK, netns="net:[1]")


def ids(facts: Facts) -> list[str]:
    return [f.id for f in examine(facts)]


def side(role: str, *args: str, **environment: str) -> Side:
    return Side(role, role, "values", environment, args)  # type: ignore[arg-type]


def running(given: Side, **changes: object) -> Side:
    process = msgspec.structs.replace(Process(7, (7,), "sleeping", "net:[1]", interfaces=LOOPBACK), **changes)
    return msgspec.structs.replace(given, process=process)


def nixl(role: str, port: int = 5600, **environment: str) -> Side:
    config = json.dumps({"kv_connector": "NixlConnector", "kv_role": "kv_both"})
    environment = {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(port), **environment}
    return side(role, "vllm", "serve", "m", "--port", str(port + 1000), "--kv-transfer-config", config, **environment)


def test_tcp_is_told_of_where_rdma_is() -> None:
    config = {"metadata_server": "P2PHANDSHAKE", "protocol": "tcp", "device_name": "", "local_hostname": "10.0.0.1"}
    host = msgspec.structs.replace(HOST, rdma_devices=("mlx5_0",))
    findings = examine(Facts(mooncake=config, mooncake_path="mooncake.json", host=host))
    assert [f.id for f in findings] == ["KVF057"]
    assert findings[0].severity == "warning"
    assert '"device_name":"mlx5_0"' in findings[0].fix


def test_a_device_that_is_not_among_the_active_ones() -> None:
    config = {"metadata_server": "P2PHANDSHAKE", "protocol": "rdma", "device_name": "mlx5_7"}
    host = msgspec.structs.replace(HOST, rdma_devices=("mlx5_0", "mlx5_1"))
    findings = examine(Facts(mooncake=config, mooncake_path="mooncake.json", host=host))
    assert [f.id for f in findings] == ["KVF059"]
    assert "mlx5_0,mlx5_1" in findings[0].fix


def test_rdma_with_its_device_is_fine() -> None:
    config = {"metadata_server": "P2PHANDSHAKE", "protocol": "rdma", "device_name": "mlx5_0"}
    host = msgspec.structs.replace(HOST, rdma_devices=("mlx5_0",))
    assert ids(Facts(mooncake=config, mooncake_path="mooncake.json", host=host)) == []


def test_a_gpu_number_that_the_machine_does_not_have() -> None:
    host = msgspec.structs.replace(HOST, gpus=(Gpu(0, "GPU-a", "H200"), Gpu(1, "GPU-b", "H200")))
    sides = (
        running(nixl("prefill", CUDA_VISIBLE_DEVICES="0")),
        running(nixl("decode", 5700, CUDA_VISIBLE_DEVICES="2")),
    )
    findings = examine(Facts(sides=sides, host=host))
    assert [f.id for f in findings] == ["KVF041"]
    assert "there is no GPU 2, this machine has 2" in findings[0].seen


def test_two_instances_without_a_list_share_every_gpu_that_is_there() -> None:
    sides = (running(nixl("prefill")), running(nixl("decode", 5700)))
    assert ids(Facts(sides=sides, host=HOST)) == []
    host = msgspec.structs.replace(HOST, gpus=(Gpu(0, "GPU-a", "H200"),))
    assert ids(Facts(sides=sides, host=host)) == ["KVF040"]


@pytest.mark.parametrize(
    ("step", "finding"),
    [
        ("bind", "KVF120"),
        ("connect", "KVF121"),
        ("handshake", "KVF122"),
        ("transfer", "KVF123"),
        ("verify", "KVF124"),
        ("metadata", "KVF125"),
    ],
)
def test_each_step_of_the_probe_has_its_finding_that_says_how_far_it_got(step: str, finding: str) -> None:
    steps = (ProbeStep("tcp", "start", True), ProbeStep("tcp", step, False, "why"))
    findings = examine(Facts(probe=steps))
    assert [f.id for f in findings] == [finding]
    assert "tcp" in findings[0].seen
    assert "why" in findings[0].seen
    assert "it got through start" in findings[0].seen


def test_a_faster_transport_that_does_not_work_is_a_downgrade_where_a_slower_one_does() -> None:
    shm = ProbeStep("shm", "use", False, "no transport leads to the peer: shm: not permitted")
    tcp = (ProbeStep("tcp", "transfer", True), ProbeStep("tcp", "verify", True))
    assert ids(Facts(probe=(shm, *tcp))) == ["KVF112"]
    assert ids(Facts(probe=(shm,))) == ["KVF123"]


def test_from_outside_the_cluster_silence_tells_nothing() -> None:
    config = {"prefill_url": "10.9.0.1:1", "decode_url": "10.9.0.2:1", "metadata_server": "10.9.0.1:2379"}
    silent = Reach("this node", "10.9.0.1", 2379, "timeout", "etcd metadata_server (mooncake.json)")
    facts = Facts(mooncake=config, mooncake_path="mooncake.json", host=HOST, reaches=(silent,))
    assert ids(facts) == []
    refused = msgspec.structs.replace(silent, outcome="refused")
    assert ids(msgspec.structs.replace(facts, reaches=(refused,))) == ["KVF050"]


def test_the_ports_of_the_first_mooncake_connector() -> None:
    assert old_mooncake_ports(13003, 1) == {13003, 13012, 13013}
    assert old_mooncake_ports(13003, 2) == {13003, 13004, 13012, 13013, 13014, 13015}


def test_side_channels_need_a_port_for_each_rank_up_to_vllm_0_11() -> None:
    sides = [nixl("prefill"), nixl("decode", 5601)]
    for version, expected in (("0.11.0", ["KVF010"]), ("0.12.0", [])):
        both = tuple(
            running(msgspec.structs.replace(s, command=(*s.command, "-tp", "2"), versions={"vllm": version}))
            for s in sides
        )
        assert ids(Facts(sides=both, host=HOST)) == expected


@pytest.mark.parametrize(
    ("command", "flags", "model"),
    [
        ("vllm serve Qwen/Q --port 8100 -tp 2", {"port": "8100", "tensor-parallel-size": "2"}, "Qwen/Q"),
        ("python -m vllm.entrypoints.x --model a --tensor_parallel_size=4", {"tensor-parallel-size": "4"}, None),
        ("vllm serve --enforce-eager x", {"enforce-eager": "x"}, None),
        ("vllm serve m --seed -1", {"seed": "-1"}, "m"),
    ],
)  # fmt: skip
def test_command_lines_are_taken_apart(command: str, flags: dict[str, str], model: str | None) -> None:
    parsed, positional = parse_command(tuple(command.split()))
    assert flags.items() <= parsed.items()
    assert positional == model


def test_a_multi_connector_is_its_parts() -> None:
    parts = [{"kv_connector": "MooncakeConnector"}, {"kv_connector": "MooncakeStoreConnector"}]
    config = {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": parts}}
    settings = read_settings(side("prefill", "vllm", "serve", "m", "--kv-transfer-config", json.dumps(config)))
    assert settings.connectors == ("MooncakeConnector", "MooncakeStoreConnector")


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("10.0.0.1:2379", "10.0.0.1", 2379),
        ("etcd://10.0.0.1:2379", "10.0.0.1", 2379),
        ("http://h:8080/metadata", "h", 8080),
        ("[fd00::2]:5600", "fd00::2", 5600),
        ("fd00::2", "fd00::2", None),
        ("h", "h", None),
    ],
)
def test_addresses_are_taken_apart(text: str, host: str, port: int | None) -> None:
    assert split_host_port(text) == (host, port)


def test_versions_are_numbers() -> None:
    assert version_tuple("0.11.0rc2+cpu") == (0, 11, 0)
    assert version_tuple("0.3.3.post2") == (0, 3, 3)


@pytest.mark.parametrize("connector", ["KVFerryConnector", "LMCacheConnectorV1"])
def test_sides_of_different_tensor_parallel_sizes_are_fine_where_the_connector_maps_them(connector: str) -> None:
    def of(role: str, kv_role: str, port: int, size: int) -> Side:
        config = {"kv_connector": connector, "kv_role": kv_role, "kv_load_failure_policy": "recompute"}
        flags = ("--port", str(port), "--tensor-parallel-size", str(size), "--kv-transfer-config", json.dumps(config))
        return side(role, "vllm", "serve", "m", *flags)

    facts = Facts(sides=(of("prefill", "kv_producer", 8100, 1), of("decode", "kv_consumer", 8200, 2)))
    assert ("KVF065" in ids(facts)) == (connector == "LMCacheConnectorV1")
