"""Clusters that are set up correctly, as the documentation of their connectors says. No finding is right for any."""

from __future__ import annotations

import json

from catalogue.bench import MODEL, Bench, Spec, mooncake, nixl, old_mooncake, run
from catalogue.router import start_router
from catalogue.table import healthy
from kvferry.doctor import Finding


@healthy
def nixl_1p1d(bench: Bench) -> list[Finding]:
    return run(bench, *nixl(bench))


@healthy
def nixl_1p1d_described_by_files(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    return bench.examine(prefill=[bench.env_file("p.env", p)], decode=[bench.env_file("d.env", d)])


@healthy
def nixl_tp2(bench: Bench) -> list[Finding]:
    return run(bench, *nixl(bench, tp=2))


@healthy
def nixl_prefill_tp2_decode_tp4(bench: Bench) -> list[Finding]:
    p, d = nixl(bench, tp=2)
    d.flag("--tensor-parallel-size", "4").env["CUDA_VISIBLE_DEVICES"] = "4,5,6,7"
    return run(bench, p, d)


@healthy
def nixl_2p2d(bench: Bench) -> list[Finding]:
    pairs = [nixl(bench), nixl(bench, first_gpu=2)]
    return bench.examine(prefill=[bench.start(p) for p, _ in pairs], decode=[bench.start(d) for _, d in pairs])


@healthy
def nixl_both_roles(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    return run(bench, p.kv(kv_role="kv_both"), d.kv(kv_role="kv_both"))


@healthy
def nixl_on_two_machines_by_files(bench: Bench) -> list[Finding]:
    specs = []
    for i, role in enumerate(("kv_producer", "kv_consumer"), 1):
        config = json.dumps({"kv_connector": "NixlConnector", "kv_role": role})
        specs.append(
            Spec(
                env={
                    "VLLM_NIXL_SIDE_CHANNEL_HOST": f"192.168.0.{i}",
                    "VLLM_NIXL_SIDE_CHANNEL_PORT": "5600",
                    "UCX_NET_DEVICES": "all",
                },
                args=["vllm", "serve", MODEL, "--port", "8000", "-tp", "8", "--kv-transfer-config", config],
            )
        )
    return bench.examine(prefill=[bench.env_file("p.env", specs[0])], decode=[bench.env_file("d.env", specs[1])])


@healthy
def nixl_with_libfabric(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    extra = {"backends": ["LIBFABRIC"]}
    return run(bench, p.kv(kv_connector_extra_config=extra), d.kv(kv_connector_extra_config=extra))


@healthy
def nixl_configured_by_dotted_flags(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    for spec, role in ((p, "kv_producer"), (d, "kv_consumer")):
        spec.flag("--kv-transfer-config", None)
        spec.args += ["--kv-transfer-config.kv_connector", "NixlConnector", "--kv-transfer-config.kv_role", role]
    return run(bench, p, d)


@healthy
def nixl_on_a_cpu(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    for spec in (p, d):
        spec.env.update(
            CUDA_VISIBLE_DEVICES="",
            VLLM_CPU_KVCACHE_SPACE="1",
            VLLM_HOST_IP="127.0.0.1",
            GLOO_SOCKET_IFNAME="lo",
            UCX_NET_DEVICES="lo",
        )
        spec.kv(kv_buffer_device="cpu")
    return run(bench, p, d)


@healthy
def one_gpu_shared_on_purpose(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    for spec in (p, d):
        spec.flag("--gpu-memory-utilization", "0.25").env["CUDA_VISIBLE_DEVICES"] = "0"
    return run(bench, p, d)


@healthy
def mooncake_1p1d_over_tcp(bench: Bench) -> list[Finding]:
    return run(bench, *mooncake(bench))


@healthy
def mooncake_tp2(bench: Bench) -> list[Finding]:
    return run(bench, *mooncake(bench, tp=2))


@healthy
def mooncake_on_two_machines_by_files(bench: Bench) -> list[Finding]:
    specs = []
    for port, role in ((8010, "kv_producer"), (8020, "kv_consumer")):
        config = json.dumps({"kv_connector": "MooncakeConnector", "kv_role": role})
        specs.append(Spec(args=["vllm", "serve", MODEL, "--port", str(port), "--kv-transfer-config", config]))
    return bench.examine(prefill=[bench.env_file("p.env", specs[0])], decode=[bench.env_file("d.env", specs[1])])


@healthy
def old_mooncake_on_one_host(bench: Bench) -> list[Finding]:
    p, d, path = old_mooncake(bench)
    return run(bench, p, d, config=path)


@healthy
def old_mooncake_tp4(bench: Bench) -> list[Finding]:
    p, d, _ = old_mooncake(bench, tp=4)
    return run(bench, p, d)


@healthy
def old_mooncake_with_etcd(bench: Bench) -> list[Finding]:
    p, d, path = old_mooncake(bench, metadata_server=f"etcd://127.0.0.1:{bench.server('etcd')}")
    return run(bench, p, d, config=path)


@healthy
def old_mooncake_by_its_guide(bench: Bench) -> list[Finding]:
    config = {
        "prefill_url": "192.168.0.137:13003",
        "decode_url": "192.168.0.139:13003",
        "metadata_server": "192.168.0.139:2379",
        "metadata_backend": "etcd",
        "protocol": "rdma",
        "device_name": "erdma_0",
    }
    path = bench.file("mooncake.json", config)
    sides = {}
    for role in ("producer", "consumer"):
        env = {
            "VLLM_HOST_IP": "192.168.0.137",
            "VLLM_PORT": "51000",
            "MASTER_ADDR": "192.168.0.137",
            "MASTER_PORT": "54324",
            "MOONCAKE_CONFIG_PATH": path,
            "VLLM_DISTRIBUTED_KV_ROLE": role,
        }
        args = ["python3", "-m", "vllm.entrypoints.openai.api_server", "--model", MODEL, "--port"]
        sides[role] = bench.env_file(
            f"{role}.env", Spec(env=env, args=[*args, "8100" if role == "producer" else "8200"])
        )
    return bench.examine(prefill=[sides["producer"]], decode=[sides["consumer"]], config=path)


@healthy
def mooncake_store_with_master(bench: Bench) -> list[Finding]:
    p, d = mooncake(bench)
    config = {
        "mode": "embedded",
        "metadata_server": "P2PHANDSHAKE",
        "master_server_address": f"127.0.0.1:{bench.server('redis')}",
        "global_segment_size": "4GB",
        "local_buffer_size": "1GB",
        "protocol": "tcp",
        "device_name": "",
        "enable_offload": False,
    }
    path = bench.file("mooncake_config.json", config)
    for spec, role in ((p, "kv_producer"), (d, "kv_consumer")):
        spec.env["MOONCAKE_CONFIG_PATH"] = path
        parts = [
            {
                "kv_connector": "MooncakeConnector",
                "kv_role": role,
                "kv_connector_extra_config": {"mooncake_protocol": "tcp"},
            },
            {"kv_connector": "MooncakeStoreConnector", "kv_role": "kv_both"},
        ]
        whole = {"kv_connector": "MultiConnector", "kv_role": role, "kv_connector_extra_config": {"connectors": parts}}
        spec.flag("--kv-transfer-config", json.dumps(whole))
    return run(bench, p, d, config=path)


@healthy
def store_config_alone(bench: Bench) -> list[Finding]:
    config = {
        "local_hostname": "127.0.0.1",
        "metadata_server": f"http://127.0.0.1:{bench.server('http')}/metadata",
        "master_server_address": f"127.0.0.1:{bench.server('redis')}",
        "protocol": "tcp",
        "device_name": "",
        "global_segment_size": 3355443200,
        "local_buffer_size": 1073741824,
    }
    return bench.examine(config=bench.file("mooncake.json", config))


@healthy
def kvferry_settings_file(bench: Bench) -> list[Finding]:
    return bench.examine(config=bench.file("kvferry.toml", '[router]\nttl_s = "3s"\n[engine]\nblock_size = 16\n'))


@healthy
def nixl_under_starters(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    for spec in (p, d):
        spec.by_script = True  # The pid is the script's; the instance is its child.
    return run(bench, p, d)


@healthy
def nixl_in_pods_described_by_their_manifests(bench: Bench) -> list[Finding]:
    sides = []
    for role, port in (("prefill", 8000), ("decode", 8200)):
        kv = json.dumps({"kv_connector": "NixlConnector", "kv_role": "kv_both"})
        sides.append(
            bench.file(
                f"{role}.env",
                "# containers[0].env of the pod\n"
                "VLLM_NIXL_SIDE_CHANNEL_HOST=$(POD_IP)\nVLLM_NIXL_SIDE_CHANNEL_PORT=5600\n"
                "UCX_TLS=cuda_ipc,cuda_copy,tcp\nVLLM_LOGGING_LEVEL=DEBUG\nHF_HUB_CACHE=/model-cache\n"
                f"COMMAND=vllm serve meta-llama/Llama-3.1-8B-Instruct --port {port} --block-size 128 "
                f"--kv-transfer-config '{kv}' --disable-log-requests --gpu-memory-utilization 0.95\n",
            )
        )
    return bench.examine(prefill=sides[:1], decode=sides[1:])


@healthy
def nixl_in_two_containers_of_one_machine(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    for i, spec in enumerate((p, d)):
        spec.env.update(NVIDIA_VISIBLE_DEVICES=str(i), CUDA_VISIBLE_DEVICES="0")
    return run(bench, p, d)


@healthy
def lmcache_by_its_disaggregation_example(bench: Bench) -> list[Finding]:
    sides = []
    for i, (role, port, rpc) in enumerate((("kv_producer", 7100, "producer1"), ("kv_consumer", 7200, "consumer1"))):
        extra = {"discard_partial_chunks": False, "lmcache_rpc_port": rpc}
        kv = json.dumps({"kv_connector": "LMCacheConnectorV1", "kv_role": role, "kv_connector_extra_config": extra})
        variables = "UCX_TLS=cuda_ipc,cuda_copy,tcp\nPYTHONHASHSEED=0\nLMCACHE_USE_EXPERIMENTAL=True\n"
        command = f"COMMAND=CUDA_VISIBLE_DEVICES={i} vllm serve {MODEL} --port {port} --enforce-eager"
        text = f"{variables}LMCACHE_CONFIG_FILE=lmcache-{rpc}.yaml\n{command} --kv-transfer-config '{kv}'\n"
        sides.append(bench.file(f"{role}.env", text))
    return bench.examine(prefill=sides[:1], decode=sides[1:])


@healthy
def nixl_with_data_parallel_ranks_on_each_of_two_nodes(bench: Bench) -> list[Finding]:
    sides = []
    for i, role in enumerate(("kv_producer", "kv_consumer"), 1):
        kv = json.dumps({"kv_connector": "NixlConnector", "kv_role": role, "kv_load_failure_policy": "fail"})
        text = (
            f"export VLLM_NIXL_SIDE_CHANNEL_HOST=10.20.0.{i}\nexport VLLM_HOST_IP=10.20.0.{i}\n"
            'export NVIDIA_GDRCOPY="enabled"\nexport GLOO_SOCKET_IFNAME=eth0\nexport NCCL_SOCKET_IFNAME=eth0\n'
            "export UCX_TLS=rc,sm,self,cuda_ipc,cuda_copy,tcp\nexport UCX_NET_DEVICES=mlx5_0:1\n"
            f"COMMAND=vllm serve deepseek-ai/DeepSeek-V3 --port 8000 --data-parallel-size 16 "
            f"--data-parallel-size-local 8 --enable-expert-parallel "
            f"--kv-events-config '{{\"enable_kv_cache_events\": true}}' "
            f"--kv-transfer-config '{kv}'\n"
        )
        sides.append(bench.file(f"{role}.env", text))
    return bench.examine(prefill=sides[:1], decode=sides[1:])


@healthy
def ascend_mooncake_on_one_machine(bench: Bench) -> list[Finding]:
    sides = []
    for role, port, kv_port, engine in (("kv_producer", 8100, "30000", "0"), ("kv_consumer", 8200, "30100", "1")):
        extra = {"prefill": {"dp_size": 1, "tp_size": 2}, "decode": {"dp_size": 1, "tp_size": 2}}
        kv = {"kv_connector": "MooncakeConnectorV1", "kv_buffer_device": "npu", "kv_role": role, "kv_parallel_size": 1}
        kv |= {"kv_port": kv_port, "engine_id": engine, "kv_connector_extra_config": extra}
        variables = "HCCL_IF_IP=10.0.0.8\nGLOO_SOCKET_IFNAME=eth7\nASCEND_RT_VISIBLE_DEVICES=0,1\nVLLM_VERSION=0.14.1\n"
        command = f"COMMAND=vllm serve {MODEL} --port {port} --tensor-parallel-size 2 --kv-transfer-config"
        sides.append(bench.file(f"{role}.env", f"{variables}{command} '{json.dumps(kv)}'\n"))
    return bench.examine(prefill=sides[:1], decode=sides[1:])


@healthy
def kvferry_in_vllm_with_tensor_parallelism(bench: Bench) -> list[Finding]:
    pids, url = [], start_router(bench)
    for i, role in enumerate(("kv_producer", "kv_consumer")):
        p, _ = nixl(bench, tp=2, first_gpu=2 * i)
        kv = {"kv_connector": "KVFerryConnector", "kv_connector_module_path": "kvferry.connector.vllm", "kv_role": role}
        extra = {"router": url, "listen": "tcp://127.0.0.1:0", "transports": ["cuda", "shm", "tcp"]}
        p.flag("--kv-transfer-config", json.dumps({**kv, "kv_connector_extra_config": extra}))
        p.env.pop("VLLM_NIXL_SIDE_CHANNEL_PORT")
        p.env["KVFERRY_CLUSTER_SECRET"] = "s" * 32
        pids.append(bench.start(p))
    return bench.examine(prefill=pids[:1], decode=pids[1:])
