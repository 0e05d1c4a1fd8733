"""Faults of interface variables, UCX and GPUs."""

from __future__ import annotations

from catalogue.bench import Bench, nixl, own_interface, run
from catalogue.table import fault
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
