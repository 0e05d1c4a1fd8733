"""Faults of the connector's configuration."""

from __future__ import annotations

import json

from catalogue.bench import MODEL, Bench, mooncake, nixl, old_mooncake, run
from catalogue.table import fault
from kvferry.doctor import Finding


@fault("KVF001", "requests hang though every port takes connections")
def prefill_is_stopped(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    pid = bench.start(p)
    bench.stop(pid)
    return bench.examine(prefill=[pid], decode=[bench.start(d)])


@fault("KVF001", "prefill is fine, decode takes nothing")
def decode_is_stopped(bench: Bench) -> list[Finding]:
    p, d = mooncake(bench)
    pid = bench.start(d)
    bench.stop(pid)
    return bench.examine(prefill=[bench.start(p)], decode=[pid])


@fault("KVF002", "decode runs without KV transfer or does not start")
def kv_transfer_config_lost_its_quotes(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    d.flag("--kv-transfer-config", "{kv_connector:NixlConnector,kv_role:kv_consumer}")
    return run(bench, p, d)


@fault("KVF002", "the role that was set has no effect", also=("KVF005",))
def kv_role_is_misspelt(bench: Bench) -> list[Finding]:
    p, d = mooncake(bench)
    return run(bench, p, d.kv(kv_role=None, kv_rolle="kv_consumer"))


@fault("KVF003", "right answers, prefill GPUs busy, decode as slow as one instance")
def decode_has_no_connector(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    return run(bench, p, d.flag("--kv-transfer-config", None))


@fault("KVF003", "decode asks for KV and gets connection refused")
def prefill_has_no_connector(bench: Bench) -> list[Finding]:
    p, d = mooncake(bench)
    return run(bench, p.flag("--kv-transfer-config", None), d)


@fault("KVF004", "prefill stores KV, decode waits for metadata")
def different_connectors(bench: Bench) -> list[Finding]:
    p, _ = nixl(bench)
    _, d = mooncake(bench)
    d.env["CUDA_VISIBLE_DEVICES"] = "1"
    return run(bench, p, d)


@fault("KVF005", "both wait for a producer")
def two_consumers(bench: Bench) -> list[Finding]:
    p, d = mooncake(bench)
    return run(bench, p.kv(kv_role="kv_consumer"), d)


@fault("KVF005", "nobody fetches what prefill offers")
def roles_are_swapped(bench: Bench) -> list[Finding]:
    p, d = mooncake(bench)
    return run(bench, p.kv(kv_role="kv_consumer"), d.kv(kv_role="kv_producer"))


@fault("KVF005", "decode does not start")
def unknown_role(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    return run(bench, p, d.kv(kv_role="consumer"))


@fault("KVF006", "both sides bind the prefill's ports")
def equal_ranks(bench: Bench) -> list[Finding]:
    p, d, _ = old_mooncake(bench)
    return run(bench, p, d.kv(kv_rank=0))


@fault("KVF006", "the sides wait for each other")
def ranks_are_swapped(bench: Bench) -> list[Finding]:
    p, d, _ = old_mooncake(bench)
    return run(bench, p.kv(kv_rank=1), d.kv(kv_rank=0))


@fault("KVF006", "one side belongs to no group")
def rank_on_one_side_only(bench: Bench) -> list[Finding]:
    p, d, _ = old_mooncake(bench)
    return run(bench, p, d.kv(kv_rank=None))


@fault("KVF007", "the group is never complete")
def parallel_size_differs(bench: Bench) -> list[Finding]:
    p, d, _ = old_mooncake(bench)
    return run(bench, p, d.kv(kv_parallel_size=1))


@fault("KVF007", "the group is complete with one member")
def parallel_size_is_one(bench: Bench) -> list[Finding]:
    p, d, _ = old_mooncake(bench)
    return run(bench, p.kv(kv_parallel_size=None), d.kv(kv_parallel_size=None))


@fault("KVF008", "each side waits at its own port")
def nccl_sides_meet_at_different_ports(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    for rank, (spec, role) in enumerate(((p, "kv_producer"), (d, "kv_consumer"))):
        spec.env.pop("VLLM_NIXL_SIDE_CHANNEL_PORT")
        kv = {"kv_connector": "PyNcclConnector", "kv_role": role, "kv_rank": rank, "kv_parallel_size": 2}
        spec.flag("--kv-transfer-config", json.dumps({**kv, "kv_port": 14579 + rank}))
    return run(bench, p, d)


@fault("KVF009", "the handshake fails")
def nixl_backends_differ(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    return run(bench, p, d.kv(kv_connector_extra_config={"backends": ["LIBFABRIC"]}))


# RDMA on a machine without any, and with little memory that may be locked, is wrong as well.
@fault("KVF009", "transfers are not supported", also=("KVF058", "KVF081"))
def mooncake_protocols_differ(bench: Bench) -> list[Finding]:
    p, d = mooncake(bench)
    return run(bench, p, d.kv(kv_connector_extra_config={"mooncake_protocol": "rdma"}))


@fault("KVF060", "handshake fails or answers are nonsense")
def different_models(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    d.args[d.args.index(MODEL)] = "Qwen/Qwen3-1.7B"
    return run(bench, p, d)


@fault("KVF061", "answers are subtly wrong")
def different_revisions(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    return run(bench, p.flag("--revision", "c1899de"), d)


@fault("KVF062", "the handshake is refused")
def different_dtypes(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    return run(bench, p.flag("--dtype", "bfloat16"), d.flag("--dtype", "half"))


@fault("KVF063", "the handshake is refused")
def kv_cache_in_fp8_on_one_side(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    return run(bench, p, d.flag("--kv-cache-dtype", "fp8"))


@fault("KVF064", "decode reads other tokens' KV, or refuses")
def different_block_sizes(bench: Bench) -> list[Finding]:
    p, d = mooncake(bench)
    return run(bench, p.flag("--block-size", "32"), d.flag("--block-size", "16"))


@fault("KVF065", "ranks without a peer")
def tensor_parallel_sizes_do_not_divide(bench: Bench) -> list[Finding]:
    p, d = nixl(bench, tp=2)
    d.flag("--tensor-parallel-size", "3").env["CUDA_VISIBLE_DEVICES"] = "4,5,6"
    return run(bench, p, d)


@fault("KVF065", "one rank waits for ever")
def old_mooncake_with_unequal_ranks(bench: Bench) -> list[Finding]:
    p, d, _ = old_mooncake(bench, tp=2)
    d.flag("--tensor-parallel-size", "1").env["CUDA_VISIBLE_DEVICES"] = "2"
    return run(bench, p, d)


@fault("KVF066", "the handshake is refused or the bytes mean something else")
def layouts_differ(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    p.env["VLLM_KV_CACHE_LAYOUT"], d.env["VLLM_KV_CACHE_LAYOUT"] = "HND", "NHD"
    return run(bench, p, d)


@fault("KVF066", "heads cannot be split over the ranks")
def nhd_with_unequal_ranks(bench: Bench) -> list[Finding]:
    p, d = nixl(bench, tp=2)
    d.flag("--tensor-parallel-size", "4").env["CUDA_VISIBLE_DEVICES"] = "4,5,6,7"
    p.env["VLLM_KV_CACHE_LAYOUT"] = d.env["VLLM_KV_CACHE_LAYOUT"] = "NHD"
    return run(bench, p, d)


@fault("KVF067", "compatibility hash differs")
def attention_backends_differ(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    p.env["VLLM_ATTENTION_BACKEND"], d.env["VLLM_ATTENTION_BACKEND"] = "FLASH_ATTN", "FLASHINFER"
    return run(bench, p, d)


@fault("KVF068", "no prefix is ever found")
def prefix_hashes_differ(bench: Bench) -> list[Finding]:
    p, d = mooncake(bench)
    return run(bench, p.flag("--prefix-caching-hash-algo", "sha256_cbor"), d)


@fault("KVF069", "no key of the store is ever found")
def hash_seeds_differ(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    p.env["PYTHONHASHSEED"], d.env["PYTHONHASHSEED"] = "0", "1"
    for spec, role in ((p, "kv_producer"), (d, "kv_consumer")):
        spec.env.pop("VLLM_NIXL_SIDE_CHANNEL_PORT")
        spec.flag("--kv-transfer-config", json.dumps({"kv_connector": "LMCacheConnectorV1", "kv_role": role}))
    return run(bench, p, d)


@fault("KVF070", "compatibility hash differs after half an update")
def vllm_versions_differ(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    p.env["VLLM_VERSION"], d.env["VLLM_VERSION"] = "0.26.0", "0.25.1"
    return run(bench, p, d)


@fault("KVF070", "metadata cannot be decoded")
def nixl_versions_differ(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    p.env["NIXL_VERSION"], d.env["NIXL_VERSION"] = "1.5.1", "1.4.0"
    return run(bench, p, d)


@fault("KVF071", "transfers between GPUs of one host fail")
def a_nixl_that_is_known_to_fail(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    p.env["NIXL_VERSION"] = d.env["NIXL_VERSION"] = "0.10.0"
    return run(bench, p, d)


@fault("KVF072", "long prompts crash decode")
def draft_model_on_one_side(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    return run(bench, p, d.flag("--speculative-config", '{"method":"eagle3","model":"draft"}'))
