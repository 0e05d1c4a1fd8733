"""Failures from public issues, told with what their reporters had: command lines, variables, configs and logs.

Each goes through the command itself, as its reporter would have run it.
"""

from __future__ import annotations

import json
import subprocess
import sys

import msgspec

from catalogue.bench import Bench
from catalogue.table import fault
from kvferry.doctor import Finding


def _doctor(bench: Bench, *arguments: str) -> list[Finding]:
    command = [sys.executable, "-m", "kvferry.cli", "doctor", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, cwd=bench.directory, timeout=60, check=False)
    assert done.returncode in (0, 1), done.stderr
    return msgspec.convert(msgspec.json.decode(done.stdout)["findings"], list[Finding])


def _serve(model: str, port: int, kv: dict[str, object], more: str = "") -> str:
    return f"COMMAND=vllm serve {model} --port {port} {more} --kv-transfer-config '{json.dumps(kv)}'\n"


@fault("KVF011", "prefill is ok, decode is stuck in drop_select (Mooncake issue 8)", also=("KVF214",))
def story_of_two_ports_side_by_side(bench: Bench) -> list[Finding]:
    config = {
        "prefill_url": "127.0.0.1:13003",
        "decode_url": "127.0.0.1:13006",
        "metadata_server": f"127.0.0.1:{bench.server('etcd')}",
        "metadata_backend": "etcd",
        "protocol": "tcp",
        "device_name": "",
    }
    bench.file("mooncake.json", config)
    for i, role in enumerate(("producer", "consumer")):
        bench.file(
            f"{role}.env",
            f"VLLM_HOST_IP=127.0.0.1\nVLLM_PORT={51000 + 100 * i}\nMASTER_ADDR=127.0.0.1\nMASTER_PORT=54324\n"
            f"MOONCAKE_CONFIG_PATH=./mooncake.json\nVLLM_DISTRIBUTED_KV_ROLE={role}\nCUDA_VISIBLE_DEVICES={i}\n"
            f"COMMAND=python3 -m vllm.entrypoints.openai.api_server --model Qwen/Qwen2.5-7B --port {8100 + 100 * i}\n",
        )
    bench.file(
        "decode.log", "Thread 1 (idle): MainThread\n    drop_select (vllm/distributed/kv_transfer/buffer.py:140)\n"
    )
    sides = ("--prefill", "producer.env", "--decode", "consumer.env")
    return _doctor(bench, *sides, "--config", "mooncake.json", "--logs", "decode.log")


@fault(
    "KVF010",
    "1P1D in one container, decode's handshake listener is dead (vLLM issue 20965)",
    also=("KVF212", "KVF200", "KVF071"),
)
def story_of_the_default_side_channel(bench: Bench) -> list[Finding]:
    model = "/models/Meta-Llama-3.1-8B-Instruct"
    for name, gpu, port, rank, role in (("p", 0, 8888, 0, "kv_producer"), ("d", 1, 9999, 1, "kv_consumer")):
        kv = {"kv_connector": "NixlConnector", "kv_role": role, "kv_rank": rank, "kv_parallel_size": 2}
        more = "--gpu-memory-utilization 0.8 --dtype bfloat16 --tensor-parallel-size 1 --enforce-eager"
        bench.file(f"{name}.env", f"VLLM_USE_V1=1\nCUDA_VISIBLE_DEVICES={gpu}\n" + _serve(model, port, kv, more))
    bench.file("prefill.log", "INFO 07-15 14:59:10 [api_server.py:1395] vLLM API server version 0.9.2\n")
    bench.file(
        "decode.log",
        "INFO 07-15 14:59:12 [api_server.py:1395] vLLM API server version 0.9.2\n"
        "Exception in thread nixl_handshake_listener:\n"
        "zmq.error.ZMQError: Address already in use (addr='tcp://localhost:5557')\n",
    )
    logs = ("--logs", "prefill.log", "decode.log")
    found = _doctor(bench, "--prefill", "p.env", "--decode", "d.env", *logs)
    assert "5557" in found[0].seen, "the default port of that version"
    return found


@fault("KVF033", "puts fail, decode redoes the forward pass (Mooncake issue 456)", also=("KVF206", "KVF210"))
def story_of_a_wildcard_host_name(bench: Bench) -> list[Finding]:
    config = {
        "local_hostname": "0.0.0.0",
        "metadata_server": f"etcd://0.0.0.0:{bench.server('etcd')}",
        "protocol": "tcp",
        "device_name": "",
        "master_server_address": f"0.0.0.0:{bench.server('redis')}",
        "global_segment_size": 3355443200,
        "local_buffer_size": 1073741824,
    }
    bench.file("mooncake.json", config)
    for name, gpus, port, role in (("p", "0,1", 8100, "kv_producer"), ("d", "2,3", 8200, "kv_consumer")):
        kv = {"kv_connector": "MooncakeStoreConnector", "kv_role": role}
        command = _serve("Qwen/Qwen2.5-7B-Instruct", port, kv, "-tp 2")
        bench.file(f"{name}.env", f"MOONCAKE_CONFIG_PATH=./mooncake.json\nCUDA_VISIBLE_DEVICES={gpus}\n" + command)
    bench.file("prefill.log", "E0606 09:39:00.285537   382 client.cpp:323] Failed to start put operation: RPC_FAIL\n")
    lost = "[rank0]: Failed to receive all KVs and hidden states, redo model forwarding."
    bench.file("decode.log", f"WARNING 06-06 09:39:00 [mooncake_store_connector.py:182] {lost}\n")
    logs = ("--logs", "prefill.log", "decode.log")
    return _doctor(bench, "--prefill", "p.env", "--decode", "d.env", *logs)


@fault("KVF219", "etcd runs and the engine dies at start (Mooncake issues 375, 386 and 476)", also=("KVF213",))
def story_of_a_wheel_without_etcd(bench: Bench) -> list[Finding]:
    bench.file(
        "prefill.log",
        "F0518 13:12:12.139716 281933 transfer_metadata_plugin.cpp:540] Unable to find metadata storage plugin etcd "
        "with conn string: etcd://10.0.0.1:2379\n*** Check failure stack trace: ***\n"
        "ERROR 05-18 13:12:13 [core.py:682] EngineCore failed to start.\n",
    )
    return _doctor(bench, "logs", "prefill.log")


@fault("KVF210", "right answers, and decode runs the prefill again (vLLM issue 26896)")
def story_of_another_connectors_proxy(bench: Bench) -> list[Finding]:
    for name, gpus, side, port, role in (
        ("p", "0,1,2,3", 5550, 8100, "kv_producer"),
        ("d", "4,5,6,7", 5556, 8200, "kv_consumer"),
    ):
        kv = {"kv_connector": "NixlConnector", "kv_role": role}
        more = "--max-model-len 8192 --gpu-memory-utilization 0.9 --trust-remote-code --tensor-parallel-size 4"
        variables = f"VLLM_NIXL_SIDE_CHANNEL_PORT={side}\nVLLM_USE_V1=1\nCUDA_VISIBLE_DEVICES={gpus}\n"
        bench.file(f"{name}.env", variables + _serve("/home/Qwen3-32B/", port, kv, more))
    rates = "Prefix cache hit rate: 0.0%, External prefix cache hit rate: 0.0%"
    running = "Running: 1 reqs, Waiting: 0 reqs, GPU KV cache usage: 0.1%"
    line = f"[loggers.py:127] Engine 000: Avg prompt throughput: 0.5 tokens/s, {running}, {rates}"
    for name in ("prefill", "decode"):
        bench.file(f"{name}.log", f"(APIServer pid=7) INFO 10-15 09:00:00 {line}\n")
    logs = ("--logs", "prefill.log", "decode.log")
    return _doctor(bench, "--prefill", "p.env", "--decode", "d.env", *logs)


@fault("KVF218", "decode's requests pile up in WAITING_FOR_REMOTE_KVS (vLLM issue 50719)", also=("KVF214",))
def story_of_a_prefill_that_is_late(bench: Bench) -> list[Finding]:
    late = "[mooncake_connector.py:1899] pulling kv_caches for ['973ca62f1bc3666d'] failed: Timeout waiting for P side"
    bench.file(
        "decode.log",
        f"(Worker_DP6_EP6 pid=9774) ERROR 08-01 12:42:13 {late} ready.\n"
        "DEBUG 08-01 12:42:14 [scheduler.py:345] 973ca62f1bc3666d is still in WAITING_FOR_REMOTE_KVS state.\n",
    )
    bench.file("prefill.log", "INFO 08-01 12:41:00 [engine.py:310] Added request 973ca62f1bc3666d.\n")
    return _doctor(bench, "logs", "prefill.log", "decode.log")


@fault("KVF071", "P2pNccl hangs with every port right (vLLM issues 34277 and 42839)")
def story_of_request_ids_that_differ(bench: Bench) -> list[Finding]:
    sides = (("p", 0, 20003, 0, "kv_producer", 21001), ("d", 1, 20005, 1, "kv_consumer", 22001))
    for name, gpu, port, rank, role, kv_port in sides:
        extra = {"send_type": "PUT_ASYNC", "nccl_num_channels": "8", "mem_pool_size_gb": "1"}
        kv = {"kv_connector": "P2pNcclConnector", "kv_role": role, "kv_rank": rank, "kv_parallel_size": 2}
        kv |= {"kv_buffer_size": 1000000000, "kv_port": kv_port, "kv_connector_extra_config": extra}
        more = "--host 0.0.0.0 --tensor-parallel-size 1 --dtype float16 --max-model-len 4096 --enforce-eager"
        command = _serve("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", port, kv, more)
        bench.file(f"{name}.env", f"CUDA_VISIBLE_DEVICES={gpu}\n" + command)
    version = "INFO 05-16 10:00:00 [utils.py:233] vLLM API server version 0.21.0\n"
    bench.file("prefill.log", version)
    bench.file("decode.log", version)
    logs = ("--logs", "prefill.log", "decode.log")
    return _doctor(bench, "--prefill", "p.env", "--decode", "d.env", *logs)


@fault("KVF033", "every handshake of two nodes fails (srt-slurm pull request 158)")
def story_of_a_side_channel_on_all_interfaces(bench: Bench) -> list[Finding]:
    for name, node, role in (("p", 1, "kv_producer"), ("d", 2, "kv_consumer")):
        kv = {"kv_connector": "NixlConnector", "kv_role": role}
        variables = f"VLLM_HOST_IP=10.6.0.{node}\nVLLM_NIXL_SIDE_CHANNEL_HOST=0.0.0.0\n"
        bench.file(f"{name}.env", variables + _serve("moonshotai/Kimi-K2.5", 8000, kv, "-tp 8"))
    return _doctor(bench, "--prefill", "p.env", "--decode", "d.env")
