"""Faults that show in logs: lines of both sides as vLLM, Mooncake, NIXL, UCX and kvferry write them."""

from __future__ import annotations

import msgspec

from catalogue.bench import Bench
from catalogue.table import fault, healthy
from kvferry.doctor import Facts, Finding, examine
from kvferry.doctor.logs import read_logs


def _read(bench: Bench, prefill: list[str], decode: list[str]) -> list[Finding]:
    files = [
        bench.file("prefill.log", "\n".join(prefill) + "\n"),
        bench.file("decode.log", "\n".join(decode) + "\n"),
    ]
    return examine(msgspec.structs.replace(Facts(), logs=read_logs(files).findings))


@healthy
def logs_of_a_good_request(bench: Bench) -> list[Finding]:
    return _read(
        bench,
        [
            "INFO 11-22 10:00:00 [logger.py:39] Received request cmpl-a1-0: prompt: 'x'",
            "INFO 11-22 10:00:00 [engine.py:310] Added request cmpl-a1-0.",
            "DEBUG 11-22 10:00:01 [scheduler.py:1183] Finished sending KV transfer for request cmpl-a1-0",
            'INFO:     127.0.0.1:33084 - "POST /v1/completions HTTP/1.1" 200 OK',
        ],
        [
            "INFO 11-22 10:00:00 [nixl_connector.py:120] Initializing NIXL wrapper",
            "W1122 10:00:00.000000 77 transfer_engine.cpp:350] Metrics reporting is disabled (set MC_TE_METRIC=1)",
            "DEBUG 11-22 10:00:01 [scheduler.py:1190] Finished recving KV transfer for request cmpl-a1-0",
            'INFO:     127.0.0.1:33090 - "POST /v1/completions HTTP/1.1" 200 OK',
        ],
    )


@fault("KVF200", "every request is recomputed", also=("KVF202",))
def log_of_a_handshake_with_the_wrong_engine(bench: Bench) -> list[Finding]:
    return _read(
        bench,
        [
            "WARNING 11-22 17:25:10 [nixl_connector.py:1048] Releasing expired KV blocks for request chatcmpl-7 which "
            "were retrieved by 0 decode worker(s) within 120 seconds.",
        ],
        [
            "ERROR 11-22 17:22:56 [nixl_connector.py:815] RuntimeError: Remote NIXL agent engine ID mismatch. Expected "
            "46126a31_dp0,received 96b1c4ff_dp0.",
            "ERROR 11-22 17:22:56 [nixl_connector.py:827] Handshake failed for request chatcmpl-7",
        ],
    )


@fault("KVF202", "answers are wrong, status 200")
def log_of_blocks_that_expired(bench: Bench) -> list[Finding]:
    lines = [
        "WARNING 11-22 08:09:07 [worker.py:2967] Releasing expired KV blocks for request 8f07dfc0 which were retrieved "
        "by 0 remote worker(s) before lease expired.",
        "ERROR 11-22 08:09:28 [worker.py:3004] Potentially invalid KV blocks for unrecognized request 8f07dfc0 were "
        "retrieved by a decode worker. They may have expired.",
    ]
    return _read(bench, lines, ["INFO 11-22 08:09:29 [engine.py:310] Added request cmpl-9-0."])


@fault("KVF203", "requests fail after days of uptime")
def log_of_a_lost_ucx_connection(bench: Bench) -> list[Finding]:
    return _read(
        bench,
        ["INFO 11-22 08:00:00 [engine.py:310] Added request cmpl-9-0."],
        [
            "(Worker_TP0 pid=9) ERROR 11-22 08:00:02 [worker.py:2298] nixlRemoteDisconnectError: "
            "NIXL_ERR_REMOTE_DISCONNECT"
        ],
    )


@fault("KVF204", "no peer is found", also=("KVF205",))
def log_of_an_absent_etcd(bench: Bench) -> list[Finding]:
    return _read(
        bench,
        [
            "E1122 16:55:35.139716 281933 transfer_metadata_plugin.cpp:290] EtcdStoragePlugin: unable to set "
            "mooncake/rpc_meta/10.0.0.2:12345 from 10.0.0.1:2379: connections to all backends failing"
        ],
        ["W1122 16:55:41.856264 77969 transfer_metadata.cpp:153] Failed to retrieve segment descriptor, name 10.0.0.2"],
    )


@fault("KVF206", "decode redoes the forward pass", also=("KVF210",))
def log_of_a_closed_master(bench: Bench) -> list[Finding]:
    return _read(
        bench,
        ["E1122 09:39:00.285537 382 client.cpp:323] Failed to start put operation: RPC_FAIL"],
        [
            "WARNING 11-22 09:39:00 [mooncake_store_connector.py:182] [rank0]: Failed to receive all KVs and hidden "
            "states, redo model forwarding."
        ],
    )


@fault("KVF207", "the engine does not start", also=("KVF213",))
def log_of_rdma_without_devices(bench: Bench) -> list[Finding]:
    return _read(
        bench,
        ["E1122 16:55:35.140089 281933 rdma_context.cpp:387] ibv_get_device_list failed"],
        ["ERROR 11-22 16:55:36 [core.py:682] EngineCore failed to start."],
    )


@fault("KVF208", "Destination is unreachable")
def log_of_ucx_without_a_path(bench: Bench) -> list[Finding]:
    line = "select.c:657  UCX  ERROR   no active messages transport to <no debug data>: Unsupported operation"
    return _read(bench, [], [f"[1772973848.813341] [node-1:191983:0]  {line}"])


@fault("KVF211", "decode does not come up")
def log_of_a_gpu_that_is_full(bench: Bench) -> list[Finding]:
    return _read(
        bench,
        ["INFO 11-22 10:00:00 [engine.py:310] Added request cmpl-9-0."],
        ["ValueError: Free memory on device (12.3/139.8 GiB) on startup is less than desired GPU memory utilization"],
    )


@fault("KVF212", "decode hangs, prefill is fine", also=("KVF214",))
def log_of_a_port_in_use(bench: Bench) -> list[Finding]:
    return _read(
        bench,
        ["zmq.error.ZMQError: Address already in use (addr='tcp://localhost:5600')"],
        ["DEBUG 11-22 19:47:51 [scheduler.py:345] cmpl-c7da0225-0 is still in WAITING_FOR_REMOTE_KVS state."],
    )


@fault("KVF215", "a request fails at its deadline")
def log_of_a_kvferry_handoff_that_timed_out(bench: Bench) -> list[Finding]:
    line = "request ended  request=r-2 handoff=4f0e state=failed stage=waiting cause=transfer_timeout"
    return _read(bench, [], [f"2026-11-22T22:16:03.120Z WARNING router  {line}"])


@fault("KVF205", "transfers have no target")
def log_of_two_metadata_places(bench: Bench) -> list[Finding]:
    line = "transfer_metadata_plugin.cpp:173] GET http://10.0.0.5:8998/metadata"
    return _read(
        bench, [f"E1122 03:56:41.856248 77969 {line} response code: 404 response body: metadata not found"], []
    )


@fault("KVF209", "the pair is refused")
def log_of_versions_that_do_not_fit(bench: Bench) -> list[Finding]:
    line = "RuntimeError: NIXL compatibility hash mismatch. Local: 1a2b, remote: 3c4d."
    return _read(bench, [], [f"(Worker_TP0 pid=9) ERROR 11-22 08:00:02 [worker.py:700] {line}"])


@fault("KVF210", "decode is slow")
def log_of_recomputed_requests(bench: Bench) -> list[Finding]:
    line = "request ended  request=r-3 handoff=4f0e state=recomputed stage=waiting cause=peer_gone"
    return _read(bench, [f"2026-11-22T22:16:03.120Z INFO    router  {line}"], [])


@fault("KVF213", "requests wait for an engine that is dead")
def log_of_a_dead_engine(bench: Bench) -> list[Finding]:
    return _read(
        bench,
        ["(EngineCore_0 pid=12) ERROR 11-22 13:26:09 [core.py:710] EngineCore encountered a fatal error."],
        ["INFO 11-22 13:26:10 [engine.py:310] Added request cmpl-9-0."],
    )


@fault("KVF214", "requests without end")
def log_of_requests_that_wait_for_remote_kvs(bench: Bench) -> list[Finding]:
    line = "cmpl-c7da0225-0 is still in WAITING_FOR_REMOTE_KVS state."
    return _read(bench, [], [f"DEBUG 11-22 19:47:5{i} [scheduler.py:345] {line}" for i in range(4)])


@fault("KVF216", "half of the cluster was restarted with another secret")
def log_of_refused_peers(bench: Bench) -> list[Finding]:
    line = "channel refused  peer=10.0.0.7:40123 cause=authentication_error"
    return _read(bench, [], [f"2026-11-22T22:16:03.120Z WARNING decode-0  {line}"])


@fault("KVF217", "handoffs take twenty times longer than they could")
def log_of_a_fallback(bench: Bench) -> list[Finding]:
    return _read(bench, ["W1122 10:00:00.0 77 multi_transport.cpp:44] RDMA not available, falling back to TCP"], [])


@fault("KVF201", "connections are refused again and again")
def log_of_refused_connections(bench: Bench) -> list[Finding]:
    line = "transfer_metadata_plugin.cpp:500] SocketHandShakePlugin: connect() 10.0.0.7:15624: Connection refused [111]"
    return _read(bench, [], [f"E1122 10:00:00.000000 77 {line}"])


@fault("KVF220", "decode computes each prompt itself", also=("KVF210",))
def log_of_requests_without_their_params(bench: Bench) -> list[Finding]:
    params = "Got invalid KVTransferParams: {'do_remote_prefill': True}. This request will not utilize KVTransfer"
    return _read(
        bench,
        [],
        [
            f"(EngineCore_0 pid=12) WARNING 11-22 10:00:00 [nixl_connector.py:330] {params}",
            "INFO 11-22 10:00:10 [loggers.py:259] Engine 000: Running: 1 reqs, External prefix cache hit rate: 0.0%",
        ],
    )


@fault("KVF221", "one of two instances gets no request")
def log_of_two_instances_with_one_name(bench: Bench) -> list[Finding]:
    line = "the router at http://10.0.0.1:8000 knows a newer instance of this name; this one stops reporting: b'{}'"
    return _read(bench, [], [f"2026-11-22T22:16:03.120Z ERROR   decode-0  {line}"])


@fault("KVF222", "half an hour of silence, then a traceback")
def log_of_a_group_that_did_not_form(bench: Bench) -> list[Finding]:
    line = "torch.distributed.DistStoreError: Timed out after 1801 seconds waiting for clients. 1/2 clients joined."
    return _read(bench, ["INFO 11-22 10:00:00 [parallel_state.py:1200] world_size=2 rank=0"], [line])


@fault("KVF223", "each node finds its own blocks only")
def log_of_an_absent_pool_directory(bench: Bench) -> list[Finding]:
    line = "the directory can't be told  cause=peer_gone error='Error 111 connecting to 10.0.0.1:6379.'"
    return _read(bench, [f"2026-11-22T22:16:03.120Z WARNING node-0  {line}"], [])


@fault("KVF224", "blocks that were on disk are misses")
def log_of_a_pool_disk_that_fails(bench: Bench) -> list[Finding]:
    line = "a block could not be written to disk  slot=4 error='Input/output error'"
    return _read(bench, [f"2026-11-22T22:16:03.120Z WARNING node-0  {line}"], [])


@fault("KVF226", "prompts that the pool should have are computed again")
def log_of_a_pool_node_that_does_not_answer(bench: Bench) -> list[Finding]:
    line = (
        'the pool did not serve; misses  node=tcp://10.0.0.1:7400 cause=transfer_timeout error="no answer within 1 s"'
    )
    return _read(bench, [], [f"2026-11-22T22:16:03.120Z WARNING decode-0  {line}"])


@fault("KVF225", "some requests are late at one moment of the day", also=("KVF210",))
def log_of_an_instance_that_fell_silent(bench: Bench) -> list[Finding]:
    gone = "instance gone  instance=prefill-0 role=prefill silent_s=3.0319"
    ended = "handoff ended  handoff=5e5591bd state=recomputed stage=waiting cause=source_silent detail=none"
    return _read(
        bench,
        [f"2026-11-22T22:16:03.120Z WARNING router  {gone}"],
        [f"2026-11-22T22:16:05.120Z INFO    decode-0  {ended}"],
    )
