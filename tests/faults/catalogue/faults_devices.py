"""Faults of interface variables, UCX and GPUs."""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec

from catalogue.bench import Bench, Spec, nixl, own_interface, run
from catalogue.table import fault, healthy
from kvferry.doctor import Finding


@fault("KVF045", "gloo cannot connect")
def one_side_bound_to_lo(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    p.env["GLOO_SOCKET_IFNAME"], d.env["GLOO_SOCKET_IFNAME"] = "lo", own_interface()
    return run(bench, p, d)


@fault("KVF046", "the worker ends in a thread")
def an_interface_that_is_not_there(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    p.env["NCCL_SOCKET_IFNAME"] = d.env["NCCL_SOCKET_IFNAME"] = "ib7"
    return run(bench, p, d)


@fault("KVF047", "Destination is unreachable", also=("KVF081",))
def ucx_transports_have_nothing_in_common(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    p.env["UCX_TLS"], d.env["UCX_TLS"] = "rc,cuda_copy,self", "tcp,cuda_copy,self"
    return run(bench, p, d)


@fault("KVF047", "Destination is unreachable on two hosts", needs="root")
def ucx_transports_that_do_not_cross_hosts(bench: Bench) -> list[Finding]:
    (a, b), (p, d) = bench.two_hosts(), nixl(bench)
    for spec, prefix, host in ((p, a, "10.77.0.1"), (d, b, "10.77.0.2")):
        spec.prefix = prefix
        spec.env.update(VLLM_NIXL_SIDE_CHANNEL_HOST=host, UCX_TLS="sm,cuda_copy,cuda_ipc,self")
        spec.listens = [x.replace("127.0.0.1", "0.0.0.0") for x in spec.listens]
    return run(bench, p, d)


@fault("KVF048", "Destination is unreachable")
def ucx_devices_on_different_networks(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    p.env["UCX_NET_DEVICES"], d.env["UCX_NET_DEVICES"] = "mlx5_0:1", "lo"
    return run(bench, p, d)


@fault("KVF040", "decode's steps wait for whole prefills, or it ends out of memory")
def one_gpu_for_both(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    d.env["CUDA_VISIBLE_DEVICES"] = "0"
    return run(bench, p, d)


@fault("KVF040", "one rank of each side shares a GPU")
def gpu_lists_overlap(bench: Bench) -> list[Finding]:
    p, d = nixl(bench, tp=2)
    d.env["CUDA_VISIBLE_DEVICES"] = "1,2"
    return run(bench, p, d)


@fault("KVF041", "a rank without a GPU")
def gpu_listed_twice(bench: Bench) -> list[Finding]:
    p, d = nixl(bench, tp=2)
    d.env["CUDA_VISIBLE_DEVICES"] = "2,2"
    return run(bench, p, d)


@fault("KVF041", "no GPU is found")
def gpu_list_with_semicolons(bench: Bench) -> list[Finding]:
    p, d = nixl(bench, tp=2)
    d.env["CUDA_VISIBLE_DEVICES"] = "2;3"
    return run(bench, p, d)


@fault("KVF042", "decode starts on no device")
def gpu_list_empty(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    d.env["CUDA_VISIBLE_DEVICES"] = ""
    return run(bench, p, d)


@fault("KVF043", "ranks wait for ranks that never start")
def fewer_gpus_than_ranks(bench: Bench) -> list[Finding]:
    p, d = nixl(bench, tp=2)
    d.env["CUDA_VISIBLE_DEVICES"] = "2"
    return run(bench, p, d)


@fault("KVF044", "decode finds fewer blocks than yesterday")
def a_left_over_worker_holds_the_gpu(bench: Bench) -> list[Finding]:
    return _with_gpus(bench, held=True)


@healthy
def gpus_that_only_their_instances_hold(bench: Bench) -> list[Finding]:
    return _with_gpus(bench, held=False)


def _with_gpus(bench: Bench, *, held: bool) -> list[Finding]:
    """Two instances on a machine with two GPUs, as the NVML of this stand-in shows it to the command."""
    p, d = nixl(bench)
    pids = [bench.start(p), bench.start(d)]
    others = [bench.start(Spec(args=["VLLM::Worker_TP0"]))] if held else []
    bench.file("pynvml.py", _NVML.format(holders=[[int(pids[0])], [int(x) for x in (pids[1], *others)]]))
    command = [sys.executable, "-m", "kvferry.cli", "doctor", "--prefill", pids[0], "--decode", pids[1], "--json"]
    environment = {**os.environ, "PYTHONPATH": str(bench.directory)}
    done = subprocess.run(command, capture_output=True, cwd=bench.directory, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return msgspec.convert(msgspec.json.decode(done.stdout)["findings"], list[Finding])


_NVML = """
from types import SimpleNamespace as Process
HOLDERS = {holders}
class NVMLError(Exception): pass
def nvmlInit(): pass
def nvmlShutdown(): pass
def nvmlDeviceGetCount(): return len(HOLDERS)
def nvmlDeviceGetHandleByIndex(i): return i
def nvmlDeviceGetNvLinkState(handle, link): raise NVMLError
def nvmlDeviceGetComputeRunningProcesses(handle): return [Process(pid=p) for p in HOLDERS[handle]]
def nvmlDeviceGetName(handle): return "stand-in"
def nvmlDeviceGetUUID(handle): return f"GPU-{{handle}}"
"""
