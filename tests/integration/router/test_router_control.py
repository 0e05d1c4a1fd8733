"""The endpoints that instances call, what the router tells about itself, and the instance's client."""

from __future__ import annotations

import asyncio
import re
import time

import msgspec
import pytest
from prometheus_client import generate_latest
from router_fakes import WAIT_S, Cluster, FakeInstance, Script, answer_prefill, never, until, when_released

from kvferry.errors import ConfigError
from kvferry.handoff.membership import RouterClient
from kvferry.layout import Fingerprint
from kvferry.protocol.membership import HandoffView, InstanceReport
from kvferry.router.app import Router
from kvferry.types import Outcome, TerminalState
from kvferry.wire import sign_http

SECRET = b"a secret of the cluster, long enough"
PATH = "/kvferry/v1/instances"


def report(**changes: object) -> InstanceReport:
    base = InstanceReport(instance_id="d/0 ä", incarnation=5, role="decode", url="http://127.0.0.1:9", model="m")
    return msgspec.structs.replace(base, **changes)


async def test_register_heartbeat_and_leave(cluster: Cluster) -> None:
    router = await cluster.start(ttl_s=3.0)
    http = cluster.session()
    async with http.get("/ready") as answer:
        assert answer.status == 503
    for _ in range(2):
        async with http.post(PATH, data=msgspec.json.encode(report())) as answer:
            assert answer.status == 200
            assert await answer.json() == {"ttl_s": 3.0, "heartbeat_s": 1.0, "warnings": []}
    async with http.get("/ready") as answer:
        assert answer.status == 200
    async with http.get("/v1/models") as answer:
        assert [card["id"] for card in (await answer.json())["data"]] == ["m"]
    async with http.delete(PATH + "/d%2F0%20%C3%A4?incarnation=6") as answer:
        assert answer.status == 404
    assert len(router.fleet.membership) == 1
    async with http.delete(PATH + "/d%2F0%20%C3%A4?incarnation=5") as answer:
        assert answer.status == 200
    assert len(router.fleet.membership) == 0


async def test_a_router_whose_deadlines_nobody_keeps_any_more_is_not_healthy(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    router = await cluster.start()
    http = cluster.session()
    async with http.get("/health") as answer:
        assert answer.status == 200
    monkeypatch.setattr(router.fleet, "expire", lambda now_s: 1 // 0)
    async with asyncio.timeout(WAIT_S):
        status = 200
        while status == 200:
            await asyncio.sleep(0.02)
            async with http.get("/health") as answer:
                status = answer.status
    assert status == 503
    assert "a background task died" in caplog.text and "ZeroDivisionError" in caplog.text


async def test_silence_ends_a_registration(cluster: Cluster) -> None:
    await cluster.start(ttl_s=0.3)
    http = cluster.session()
    async with http.post(PATH, data=msgspec.json.encode(report())):
        pass
    async with asyncio.timeout(WAIT_S):
        status = 200
        while status != 503:
            await asyncio.sleep(0.05)
            async with http.get("/ready") as answer:
                status = answer.status


async def test_bad_reports_are_refused(cluster: Cluster) -> None:
    await cluster.start()
    http = cluster.session()
    for body in (b"", b"{}", b"[1]", msgspec.json.encode(report(url="ftp://x")), msgspec.json.encode(report(role="x"))):
        async with http.post(PATH, data=body) as answer:
            assert answer.status == 400, body
    async with http.post("/kvferry/v1/outcomes", data=b'[{"handoff": 1}]') as answer:
        assert answer.status == 400


async def test_with_a_secret_control_needs_a_signature(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    router = await cluster.start(secret=SECRET)
    http = cluster.session()
    body = msgspec.json.encode(report())
    wrong = sign_http(b"another secret, also long enough", "POST", PATH, body)
    old = sign_http(SECRET, "POST", PATH, body, now_s=time.time() - 120)
    other_body = sign_http(SECRET, "POST", PATH, body + b" ")
    for headers in ({}, {"x-kvferry-auth": "x"}, *({"x-kvferry-auth": s} for s in (wrong, old, other_body))):
        async with http.post(PATH, data=body, headers=headers) as answer:
            assert answer.status == 401
            assert (await answer.json())["error"]["code"] == "not_authenticated"
    assert re.search(rf"refused 127\.0\.0\.1:\d+ at {PATH}: the request carries no valid", caplog.text)
    assert len(router.fleet.membership) == 0
    good = {"x-kvferry-auth": sign_http(SECRET, "POST", PATH, body)}
    async with http.post(PATH, data=body, headers=good) as answer:
        assert answer.status == 200
    async with http.delete(PATH + "/d%2F0%20%C3%A4?incarnation=5") as answer:
        assert answer.status == 401
    async with http.get("/health") as answer:
        assert answer.status == 200


async def test_debug_tells_stage_age_deadline_and_peers(cluster: Cluster) -> None:
    prefill, decode = await cluster.pair(never, when_released)
    assert cluster.router is not None
    view = HandoffView(handoff="ab" * 16, side="target", stage="waiting", age_s=0.5, remaining_s=29.5, peer="p0")
    cluster.router.fleet.report(decode.report(handoffs=(view,)), time.monotonic())
    task = asyncio.create_task(cluster.post())
    await asyncio.wait_for(asyncio.gather(prefill.arrived.wait(), decode.arrived.wait()), WAIT_S)
    async with cluster.session().get("/debug/handoffs") as answer:
        told = await answer.json()
    (request,) = told["requests"]
    ticket = decode.seen[0].ticket
    assert ticket is not None and request["handoff"] == ticket.handoff
    assert (request["stage"], request["prefill"], request["decode"]) == ("prefill", "p0", "d0")
    assert 0 <= request["age_s"] < WAIT_S and request["deadline_s"] > 500
    assert request["age_s"] + request["remaining_s"] == pytest.approx(30, abs=1)
    (side,) = told["instances"]
    assert (side["instance"], side["stage"], side["remaining_s"]) == ("d0", "waiting", 29.5)
    async with cluster.session().get(PATH) as answer:
        rows = (await answer.json())["instances"]
    assert {row["instance_id"]: row["load"] for row in rows} == {"p0": 1, "d0": 1}
    # What prefill has done is no load any more, though decode still works on the request.
    prefill.release.set()
    await until(lambda: cluster.router.fleet.load("p0") == 0)
    assert cluster.router.fleet.load("d0") == 1
    task.cancel()
    await asyncio.wait_for(asyncio.gather(prefill.idle(), decode.idle()), WAIT_S)
    async with cluster.session().get("/debug/handoffs") as answer:
        told = await answer.json()
    assert told["requests"] == [] and told["recent"][0]["state"] == "aborted"
    assert cluster.router.fleet.load("p0") == cluster.router.fleet.load("d0") == 0


async def test_instances_that_differ_are_not_paired_and_both_values_are_named(
    cluster: Cluster, good_decode: Script
) -> None:
    one = Fingerprint(model="m", dtype="float32", block_size=16, num_layers=2, num_kv_heads=2, head_size=8)
    other = msgspec.structs.replace(one, block_size=32)
    await cluster.start()
    await cluster.add("p0", "prefill", answer_prefill, fingerprint=one)
    decode = await cluster.add("d0", "decode", good_decode, fingerprint=other)
    status, headers, _ = await cluster.post()
    assert status == 200
    assert headers["x-kvferry-outcome"].startswith("recomputed; stage=queue; cause=no_compatible_prefill_instance")
    body = msgspec.json.encode(decode.report(fingerprint=other))
    async with cluster.session().post(PATH, data=body) as answer:
        (warning,) = (await answer.json())["warnings"]
    assert "block_size: here 32, there 16" in warning


async def test_static_upstreams_are_polled(cluster: Cluster, good_decode: Script) -> None:
    prefill = FakeInstance("p", "prefill", answer_prefill)
    decode = FakeInstance("d", "decode", good_decode)
    for instance in (prefill, decode):
        await instance.start()
        cluster.instances.append(instance)
    await cluster.start(
        ttl_s=60.0, heartbeat_s=0.05, prefill=(prefill.url, "handoff=tcp://127.0.0.1:5"), decode=(decode.url,)
    )
    await until(lambda: len(cluster.router.fleet.membership) == 2)
    assert cluster.router.fleet.models() == ["m", "m-lora"]
    status, headers, _ = await cluster.post(model="m-lora")
    assert status == 200 and headers["x-kvferry-outcome"].startswith("delivered")
    ticket = decode.seen[0].ticket
    assert ticket is not None and ticket.source.addresses == ("tcp://127.0.0.1:5",) and ticket.source.incarnation == 0
    # Once it registers, its own word counts, and the poll stops.
    cluster.router.fleet.report(decode.report(instance_id="own-name"), time.monotonic())
    await asyncio.sleep(0.2)
    assert {m.report.instance_id for m in cluster.router.fleet.membership if m.report.role == "decode"} == {"own-name"}
    await prefill.stop()
    await asyncio.sleep(0.2)
    heard_s = {m.report.role: m.seen_s for m in cluster.router.fleet.membership}["prefill"]
    await asyncio.sleep(0.2)
    assert {m.report.role: m.seen_s for m in cluster.router.fleet.membership}["prefill"] == heard_s
    cluster.router.fleet.expire(heard_s + 60.1)
    assert "prefill" not in {m.report.role for m in cluster.router.fleet.membership}


def metrics_of(router: Router) -> bytes:
    return generate_latest(router.metrics.registry)


async def test_the_instance_s_client_registers_reports_and_leaves(cluster: Cluster) -> None:
    router = await cluster.start(secret=SECRET, heartbeat_s=0.05)
    steps = iter(range(10_000))
    client = RouterClient(router.url, SECRET, lambda: report(step=next(steps)))
    client.start()
    await until(lambda: len(router.fleet.membership) == 1)
    member = router.fleet.membership.get("d/0 ä")
    assert member is not None
    await until(lambda: member.report.step > 3)
    await asyncio.to_thread(client.wait_registered, WAIT_S)
    for i in range(300):
        client.report_outcome(Outcome(f"{i:032x}", TerminalState.RECOMPUTED, tokens_computed=1))
    await until(lambda: b"kvferry_router_late_outcomes_total 300.0" in metrics_of(router))
    await asyncio.to_thread(client.close)
    assert len(router.fleet.membership) == 0


async def test_the_instance_s_client_survives_a_restart_of_the_router(cluster: Cluster) -> None:
    router = await cluster.start(heartbeat_s=0.05)
    port = router.port
    client = RouterClient(router.url, None, report)
    client.start()
    await until(lambda: len(router.fleet.membership) == 1)
    await router.close()
    await asyncio.sleep(0.1)
    client.report_outcome(Outcome("ab" * 16, TerminalState.DELIVERED))
    again = await cluster.start(heartbeat_s=0.05, port=port)
    await until(lambda: len(again.fleet.membership) == 1)
    await until(lambda: b"kvferry_router_late_outcomes_total 1.0" in metrics_of(again))
    await asyncio.to_thread(client.close)


async def test_two_processes_of_one_name_do_not_take_turns(cluster: Cluster) -> None:
    router = await cluster.start(heartbeat_s=0.05)
    old = RouterClient(router.url, None, report)
    old.start()
    await until(lambda: len(router.fleet.membership) == 1)
    new = RouterClient(router.url, None, lambda: report(incarnation=6))
    new.start()
    await until(lambda: old.superseded)
    assert not new.superseded
    member = router.fleet.membership.get("d/0 ä")
    assert member is not None and member.report.incarnation == 6
    await asyncio.to_thread(old.close)
    await asyncio.to_thread(new.close)


async def test_metrics_are_prometheus_text(cluster: Cluster, good_decode: Script) -> None:
    await cluster.pair(good_decode)
    await cluster.post()
    async with cluster.session().get("/metrics") as answer:
        assert answer.headers["content-type"].startswith("text/plain")
        text = await answer.text()
    assert 'kvferry_requests_total{cause="",stage="",state="delivered"} 1.0' in text
    assert 'kvferry_instances{role="decode",state="serving"} 1.0' in text


async def test_settings_that_cannot_be_used_say_what_to_do(cluster: Cluster) -> None:
    router = await cluster.start()
    for changes, expected in (
        ({"host": "0.0.0.0"}, "KVFERRY_CLUSTER_SECRET"),
        ({"port": router.port}, f"router.port: port {router.port} on 127.0.0.1 is taken: .*pid"),
        ({"host": "192.0.2.1"}, "KVFERRY_CLUSTER_SECRET"),
        ({"prefill": ("localhost:1",)}, "expected http://host:port"),
        ({"prefill": ("handoff=tcp://h:1",)}, "follows no URL"),
    ):
        with pytest.raises(ConfigError, match=expected):
            await Cluster().start(**changes)
    with pytest.raises(ConfigError, match=r"router\.host: cannot bind 192\.0\.2\.1"):
        await Cluster().start(secret=SECRET, host="192.0.2.1")
