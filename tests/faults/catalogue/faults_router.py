"""Faults of a running cluster as its router sees them, of proxies in front of it, and of the ways between the sides."""

from __future__ import annotations

import msgspec

from catalogue.bench import Bench, nixl, run
from catalogue.router import (
    FINGERPRINT,
    MODEL,
    Fleet,
    ask_doctor,
    post,
    probe,
    run_requests,
    start_proxy,
    start_router,
    view,
    wait_for_instances,
)
from catalogue.table import fault, healthy
from kvferry.doctor import Finding
from kvferry.doctor.echo import EchoServer
from kvferry.types import TerminalState

HANDOFF = "0123456789abcdef0123456789abcdef"


@healthy
def router_with_one_of_each(bench: Bench) -> list[Finding]:
    url = start_router(bench)
    fleet = Fleet(bench, url)
    fleet.join("prefill-0", "prefill")
    fleet.join("decode-0", "decode", running=2)
    return ask_doctor(url)


@healthy
def router_with_long_prompts_under_way(bench: Bench) -> list[Finding]:
    url = start_router(bench)
    fleet = Fleet(bench, url)
    fleet.join(
        "prefill-0", "prefill", handoffs=(view(HANDOFF, "source", "publishing", 5.0, "1f"),), running=1, waiting=2
    )
    fleet.join("decode-0", "decode", handoffs=(view(HANDOFF, "target", "pulling", 5.0, "prefill-0"),), running=9)
    return ask_doctor(url)


@healthy
def router_probed_through_a_plain_proxy(bench: Bench) -> list[Finding]:
    return probe(start_proxy(bench, start_router(bench), "plain"))


@healthy
def router_whose_requests_are_delivered(bench: Bench) -> list[Finding]:
    url = start_router(bench)
    run_requests(bench, url, TerminalState.DELIVERED, "", 5)
    return ask_doctor(url)


@fault("KVF100", "every request is refused")
def the_router_is_not_there(bench: Bench) -> list[Finding]:
    return ask_doctor(f"http://127.0.0.1:{bench.port()}")


@fault("KVF100", "the URL belongs to something else")
def the_router_is_a_web_server(bench: Bench) -> list[Finding]:
    return ask_doctor(f"http://127.0.0.1:{bench.server('http')}")


@fault("KVF100", "the instances wait for a router that has ended")
def the_instances_router_is_not_there(bench: Bench) -> list[Finding]:
    return _with_router(bench, f"http://127.0.0.1:{bench.port()}")


@fault("KVF100", "the instances report to a router that is stopped")
def the_instances_router_is_stopped(bench: Bench) -> list[Finding]:
    url = start_router(bench)
    bench.stop(str(bench.processes[-1].pid))
    return _with_router(bench, url)


@healthy
def instances_with_their_router(bench: Bench) -> list[Finding]:
    return _with_router(bench, start_router(bench))


def _with_router(bench: Bench, url: str) -> list[Finding]:
    """Two running instances of kvferry that are to report to this router."""
    pids = []
    for role in ("prefill", "decode"):
        p, _ = nixl(bench)
        p.args = ["kvferry", "engine", "--role", role, "--port", p.args[p.args.index("--port") + 1]]
        p.env = {"KVFERRY_CLUSTER_SECRET": "s" * 32, "KVFERRY_CLUSTER_ROUTER_URL": url}
        pids.append(bench.start(p))
    return bench.examine(prefill=pids[:1], decode=pids[1:])


@fault("KVF101", "Chinese text and emoji arrive broken, English is fine")
def a_proxy_decodes_and_encodes_each_chunk(bench: Bench) -> list[Finding]:
    return probe(start_proxy(bench, start_router(bench), "mangle"))


@fault("KVF102", "no token for long, then all of them")
def a_proxy_buffers_the_stream(bench: Bench) -> list[Finding]:
    return probe(start_proxy(bench, start_router(bench), "buffer"))


@fault("KVF103", "decode recomputes everything, prefill's blocks expire")
def a_proxy_drops_unknown_fields(bench: Bench) -> list[Finding]:
    return probe(start_proxy(bench, start_router(bench), "drop"))


@fault("KVF104", "clients retry bad requests")
def a_proxy_turns_4xx_into_5xx(bench: Bench) -> list[Finding]:
    return probe(start_proxy(bench, start_router(bench), "status"))


@fault("KVF105", "requests wait or are refused")
def no_decode_instance(bench: Bench) -> list[Finding]:
    url = start_router(bench)
    Fleet(bench, url).join("prefill-0", "prefill")
    return ask_doctor(url)


@fault("KVF106", "heartbeats come, tokens do not")
def a_serving_loop_stands_still(bench: Bench) -> list[Finding]:
    url = start_router(bench)
    fleet = Fleet(bench, url)
    fleet.join("prefill-0", "prefill")
    fleet.join("decode-0", "decode", moving=False, running=3, step=41)
    return ask_doctor(url)


@fault("KVF107", "stuck in drop_select")
def decode_waits_for_what_prefill_never_published(bench: Bench) -> list[Finding]:
    url = start_router(bench)
    fleet = Fleet(bench, url)
    fleet.join("prefill-0", "prefill", handoffs=(view(HANDOFF, "source", "open", 12.0, "decode-0"),), waiting=1)
    fleet.join("decode-0", "decode", handoffs=(view(HANDOFF, "target", "waiting", 12.0, "prefill-0"),))
    return ask_doctor(url)


@fault("KVF107", "stuck in drop_select, and prefill knows nothing of it")
def the_prefill_request_got_lost(bench: Bench) -> list[Finding]:
    url = start_router(bench)
    fleet = Fleet(bench, url)
    fleet.join("prefill-0", "prefill")
    fleet.join("decode-0", "decode", handoffs=(view(HANDOFF, "target", "waiting", 8.0, "prefill-0"),))
    return ask_doctor(url)


@fault("KVF108", "stuck in drop_select since the other node went away")
def the_prefill_instance_is_gone(bench: Bench) -> list[Finding]:
    url = start_router(bench)
    fleet = Fleet(bench, url)
    fleet.join("prefill-0", "prefill")
    fleet.join("decode-0", "decode", handoffs=(view(HANDOFF, "target", "pulling", 8.0, "prefill-1"),))
    return ask_doctor(url)


@fault("KVF109", "requests queue on an idle machine")
def the_kv_cache_is_full(bench: Bench) -> list[Finding]:
    url = start_router(bench)
    fleet = Fleet(bench, url)
    fleet.join("prefill-0", "prefill")
    fleet.join("decode-0", "decode", free_blocks=0, running=1, waiting=4)
    return ask_doctor(url)


@fault("KVF110", "clients get errors")
def handoffs_fail(bench: Bench) -> list[Finding]:
    url = start_router(bench)
    run_requests(bench, url, TerminalState.FAILED, "transfer_timeout", 3)
    return ask_doctor(url)


@fault("KVF111", "answers are right and slow")
def everything_is_recomputed(bench: Bench) -> list[Finding]:
    url = start_router(bench)
    run_requests(bench, url, TerminalState.RECOMPUTED, "peer_gone", 5)
    return ask_doctor(url)


@fault("KVF111", "answers are right and slow, the proxy is another connector's")
def decode_never_fetches(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    d.answer = _counted(asked=4096, came=0)
    return run(bench, p, d)


@healthy
def decode_that_fetches(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    d.answer = _counted(asked=4096, came=4080)
    return run(bench, p, d)


def _counted(*, asked: int, came: int) -> str:
    """What vLLM's /metrics says of its connector."""
    labels = '{engine="0",model_name="m"}'
    return (
        f"vllm:external_prefix_cache_queries_total{labels} {float(asked)}\n"
        f"vllm:external_prefix_cache_hits_total{labels} {float(came)}\n"
    )


@fault("KVF114", "requests to one instance hang until its lease ends")
def a_registered_instance_was_killed(bench: Bench) -> list[Finding]:
    url = start_router(bench)
    fleet = Fleet(bench, url)
    fleet.join("prefill-0", "prefill", url=f"http://127.0.0.1:{bench.port()}")
    fleet.join("decode-0", "decode")
    return ask_doctor(url)


@fault("KVF114", "requests to one instance hang though it is registered")
def a_registered_instance_is_stopped(bench: Bench) -> list[Finding]:
    url = start_router(bench)
    fleet = Fleet(bench, url)
    fleet.join("prefill-0", "prefill")
    fleet.join("decode-0", "decode", url=f"http://127.0.0.1:{bench.server('http', stopped=True)}")
    return ask_doctor(url)


@fault("KVF115", "now and then a request is late")
def one_handoff_did_not_deliver(bench: Bench) -> list[Finding]:
    url = start_router(bench)
    run_requests(bench, url, TerminalState.DELIVERED, "", 4)
    run_requests(bench, url, TerminalState.RECOMPUTED, "lease_expired", 1)
    return ask_doctor(url)


@fault("KVF115", "answers are right, and nothing tells whether KV comes over")
def a_polled_decode_has_no_connector(bench: Bench) -> list[Finding]:
    engine = _instance_without_connector(bench)
    url = start_router(bench, "--prefill", f"{engine},handoff=tcp://127.0.0.1:9", "--decode", engine)
    wait_for_instances(url, 2)
    post(url + "/v1/completions", {"prompt": "0", "max_tokens": 4, "stream": True})
    (finding,) = said = ask_doctor(url)
    assert "decode/outcome_unknown" in finding.seen.replace(" with ", "/"), finding.seen
    return said


@fault("KVF105", "answers are right and slow: decode does every prefill", also=("KVF115",))
def no_prefill_instance(bench: Bench) -> list[Finding]:
    url = start_router(bench)
    Fleet(bench, url).join("decode-0", "decode", url=_instance_without_connector(bench))
    post(url + "/v1/completions", {"model": MODEL, "prompt": "0", "max_tokens": 4, "stream": True})
    return ask_doctor(url)


def _instance_without_connector(bench: Bench) -> str:
    """The URL of an instance that answers, and reports no outcome."""
    echo = EchoServer("127.0.0.1", lambda request: None)
    echo.__enter__()
    bench.undo.append(lambda: echo.__exit__(None, None, None))
    return echo.url


@fault("KVF107", "stuck in drop_select while prefill is overloaded")
def the_prefill_request_queues(bench: Bench) -> list[Finding]:
    url = start_router(bench)
    fleet = Fleet(bench, url)
    fleet.join("prefill-0", "prefill", running=16, waiting=40)
    fleet.join("decode-0", "decode", handoffs=(view(HANDOFF, "target", "waiting", 12.0, "prefill-0"),))
    return ask_doctor(url)


@fault("KVF109", "decode has no room for what prefill offers")
def decode_waits_for_its_own_blocks(bench: Bench) -> list[Finding]:
    url = start_router(bench)
    fleet = Fleet(bench, url)
    fleet.join("prefill-0", "prefill", handoffs=(view(HANDOFF, "source", "sealed", 12.0, "decode-0"),))
    waiting = (view(HANDOFF, "target", "reserving", 12.0, "prefill-0"),)
    fleet.join("decode-0", "decode", handoffs=waiting, free_blocks=2, running=3)
    return ask_doctor(url)


@fault("KVF003", "right answers, and every prefill is thrown away")
def a_polled_prefill_has_no_connector(bench: Bench) -> list[Finding]:
    p, _ = nixl(bench)
    bench.start(p.flag("--kv-transfer-config", None))
    url = start_router(bench, "--prefill", f"http://{p.listens[0]}")
    Fleet(bench, url).join("decode-0", "decode")
    wait_for_instances(url, 2)
    return ask_doctor(url)


@fault("KVF113", "no pair is ever chosen")
def fingerprints_differ(bench: Bench) -> list[Finding]:
    url = start_router(bench)
    fleet = Fleet(bench, url)
    fleet.join("prefill-0", "prefill")
    fleet.join("decode-0", "decode", fingerprint=msgspec.structs.replace(FINGERPRINT, dtype="float32"))
    return ask_doctor(url)


@fault("KVF088", "requests wait for a pair that never forms")
def the_sides_join_different_routers(bench: Bench) -> list[Finding]:
    return _kvferry(bench, KVFERRY_CLUSTER_ROUTER_URL=("http://127.0.0.1:8000", "http://127.0.0.1:8001"))


@fault("KVF009", "the peer is there, no transport leads to it")
def transports_without_one_in_common(bench: Bench) -> list[Finding]:
    return _kvferry(bench, KVFERRY_TRANSFER_TRANSPORTS=("shm", "tcp"))


@fault("KVF010", "decode does not start")
def handoff_listeners_on_one_port(bench: Bench) -> list[Finding]:
    port = f"tcp://127.0.0.1:{bench.port()}"
    return _kvferry(bench, KVFERRY_HANDOFF_LISTEN=(port, port))


@fault("KVF064", "handshakes are refused")
def block_sizes_of_kvferry_differ(bench: Bench) -> list[Finding]:
    return _kvferry(bench, KVFERRY_ENGINE_BLOCK_SIZE=("16", "32"))


@healthy
def kvferry_engines_described_by_files(bench: Bench) -> list[Finding]:
    return _kvferry(bench, KVFERRY_CLUSTER_ROUTER_URL=("http://127.0.0.1:8000", "http://127.0.0.1:8000"))


def _kvferry(bench: Bench, **pairs: tuple[str, str]) -> list[Finding]:
    """Two of kvferry's own instances, described by files that differ in these variables."""
    files = []
    for i, role in enumerate(("prefill", "decode")):
        lines = [f"{name}={values[i]}" for name, values in pairs.items()]
        lines += ["KVFERRY_CLUSTER_SECRET=" + "s" * 32, f"COMMAND=kvferry engine --role {role} --port {bench.port()}"]
        files.append(bench.file(f"{role}.env", "\n".join(lines) + "\n"))
    return bench.examine(prefill=files[:1], decode=files[1:])
