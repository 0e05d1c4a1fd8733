"""Instances that refuse, die, fall silent; clients that leave: each request ends once, honestly, both legs freed."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from router_fakes import (
    DONE,
    WAIT_S,
    Cluster,
    FakeInstance,
    Script,
    Seen,
    answer_prefill,
    completion,
    delivered,
    kill,
    never,
    open_stream,
    text_event,
    until,
)


async def die(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
    kill(request)
    raise asyncio.CancelledError


async def die_after_head(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
    response = await open_stream(request)
    kill(request)
    return response


async def die_within_first_event(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
    response = await open_stream(request)
    await response.write(text_event("lost")[:-1])
    await asyncio.sleep(0.05)
    kill(request)
    return response


async def die_after_first_event(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
    response = await open_stream(request)
    await response.write(text_event("first") + text_event("half")[:20])
    await asyncio.sleep(0.05)
    kill(request)
    return response


def refuse(status: int) -> Script:
    async def script(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
        body = {"error": {"message": f"no ({status})", "type": "t", "param": None, "code": "c"}}
        return web.json_response(body, status=status, headers={"retry-after": "7"})

    return script


@pytest.mark.parametrize("death", [die, die_after_head, die_within_first_event, refuse(503), refuse(500), refuse(429)])
@pytest.mark.parametrize("stream", [False, True])
async def test_decode_lost_before_the_first_byte_is_replaced(
    cluster: Cluster, good_decode: Script, death: Script, stream: bool
) -> None:
    prefill, bad = await cluster.pair(death)
    # Busier, so that the bad one is asked first.
    good = await cluster.add("d1", "decode", good_decode, running=5)
    status, headers, body = await cluster.post(stream=stream)
    assert status == 200
    assert b"lost" not in body and (b"delivered" in body if stream else headers["x-kvferry-outcome"].startswith("del"))
    first, second = bad.seen[0].ticket, good.seen[0].ticket
    assert first is not None and second is not None
    assert first.handoff != second.handoff and (first.attempt, second.attempt) == (0, 1)
    assert [s.ticket.attempt for s in prefill.seen if s.ticket] == [0, 1]
    assert cluster.last_record().attempts == 2


async def test_decode_that_takes_no_connection_is_replaced(cluster: Cluster, good_decode: Script) -> None:
    _, bad = await cluster.pair(never)
    await bad.stop()
    await cluster.add("d1", "decode", good_decode, running=5)
    status, _, _ = await cluster.post()
    assert status == 200 and cluster.last_record().decode == "d1"


async def test_decode_lost_and_no_other_is_an_honest_503(cluster: Cluster) -> None:
    prefill, _ = await cluster.pair(die, never)
    status, headers, body = await cluster.post(stream=True)
    assert status == 503 and headers["retry-after"] == "1" and headers["content-type"] == "application/json"
    error = json.loads(body)["error"]
    assert error["type"] == "server_error" and error["code"] == "peer_gone" and "d0" in error["message"]
    assert headers["x-kvferry-outcome"] == "failed; stage=decode; cause=peer_gone; path=pair"
    await asyncio.wait_for(prefill.gone_event.wait(), WAIT_S)


async def test_decode_lost_after_the_first_byte_ends_the_stream_with_an_error(
    cluster: Cluster, good_decode: Script
) -> None:
    prefill, _ = await cluster.pair(die_after_first_event, never)
    spare = await cluster.add("d1", "decode", good_decode, running=5)
    status, _, body = await cluster.post(stream=True)
    assert status == 200
    head, comment, event = body.partition(b": kvferry-outcome failed; stage=streaming; cause=peer_gone; path=pair\n\n")
    assert head == text_event("first") and comment
    assert event.startswith(b"data: ") and event.endswith(b"\n\n") and DONE not in body
    error = json.loads(event[6:])["error"]
    assert error["type"] == "server_error" and error["code"] == "peer_gone"
    # Nothing is replayed elsewhere, and the other leg is ended.
    assert not spare.seen
    await asyncio.wait_for(prefill.gone_event.wait(), WAIT_S)


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
async def test_the_client_s_own_errors_pass_through(cluster: Cluster, status: int) -> None:
    prefill, decode = await cluster.pair(refuse(status), never)
    await cluster.add("d1", "decode", never, running=5)
    answer = await cluster.post(stream=True)
    expected = {"error": {"message": f"no ({status})", "type": "t", "param": None, "code": "c"}}
    assert answer[0] == status and json.loads(answer[2]) == expected
    assert answer[1]["x-kvferry-outcome"] == f"failed; stage=decode; cause=http_{status}; path=pair"
    assert len(decode.seen) == 1
    await asyncio.wait_for(prefill.gone_event.wait(), WAIT_S)


async def test_the_last_refusal_passes_through_with_its_own_words(cluster: Cluster) -> None:
    await cluster.pair(refuse(503))
    status, headers, body = await cluster.post()
    assert status == 503 and headers["retry-after"] == "7" and json.loads(body)["error"]["message"] == "no (503)"


async def test_prefill_that_takes_no_request_is_replaced(cluster: Cluster, good_decode: Script) -> None:
    async def patient(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
        assert seen.ticket is not None
        if seen.ticket.attempt == 0:
            return await never(instance, request, seen)
        return await good_decode(instance, request, seen)

    _, decode = await cluster.pair(patient, refuse(503))
    other = await cluster.add("p1", "prefill", answer_prefill, running=5)
    status, headers, _ = await asyncio.wait_for(cluster.post(), WAIT_S)
    assert status == 200 and headers["x-kvferry-outcome"].startswith("delivered")
    assert len(other.seen) == 1 and [s.ticket.attempt for s in decode.seen if s.ticket] == [0, 1]
    # The first attempt at the target was closed, so that its blocks are free.
    await until(lambda: decode.gone == 1)


@pytest.mark.parametrize("death", [die, refuse(500), refuse(400)])
async def test_prefill_lost_on_the_way_leaves_the_work_to_decode(cluster: Cluster, death: Script) -> None:
    async def recompute(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
        assert seen.ticket is not None
        await asyncio.sleep(0.1)
        outcome = delivered(seen.ticket, state="recomputed", stage="waiting", cause="peer_gone", tokens_computed=3)
        cluster.outcome(outcome)
        return web.json_response(completion())

    _, decode = await cluster.pair(recompute, death)
    spare = await cluster.add("p1", "prefill", answer_prefill, running=5)
    status, headers, _ = await cluster.post()
    assert status == 200 and headers["x-kvferry-outcome"].startswith("recomputed; stage=waiting; cause=peer_gone")
    assert len(decode.seen) == 1 and not spare.seen


async def test_without_a_prefill_instance_decode_computes_and_says_so(cluster: Cluster, good_decode: Script) -> None:
    await cluster.start()
    decode = await cluster.add("d0", "decode", good_decode)
    status, headers, _ = await cluster.post()
    assert status == 200
    assert headers["x-kvferry-outcome"] == "recomputed; stage=queue; cause=no_prefill_instance; path=direct"
    assert decode.seen[0].ticket is None


@pytest.mark.parametrize("moment", range(10))
async def test_a_client_that_leaves_frees_both_legs(cluster: Cluster, moment: int) -> None:
    async def slow_stream(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
        await asyncio.sleep(0.04)
        response = await open_stream(request)
        for _ in range(1000):
            await response.write(text_event("x"))
            await asyncio.sleep(0.01)
        return response

    prefill, decode = await cluster.pair(slow_stream, never)
    session = cluster.session()

    async def read() -> None:
        async with session.post("/v1/completions", json={"prompt": "a", "stream": True}) as answer:
            await answer.read()

    task = asyncio.create_task(read())
    await asyncio.wait_for(asyncio.gather(prefill.arrived.wait(), decode.arrived.wait()), WAIT_S)
    await asyncio.sleep(moment * 0.011)
    task.cancel()
    await asyncio.wait_for(asyncio.gather(prefill.idle(), decode.idle()), WAIT_S)
    assert (prefill.gone, decode.gone) == (1, 1)
    record = cluster.last_record()
    assert (record.state, record.cause, record.status) == ("aborted", "client_gone", 499)


async def test_a_client_that_leaves_the_queue_never_reaches_an_instance(cluster: Cluster, good_decode: Script) -> None:
    await cluster.start(max_in_flight=1)
    prefill, decode = await cluster.pair(never)
    first = asyncio.create_task(cluster.post())
    await asyncio.wait_for(decode.arrived.wait(), WAIT_S)
    second = asyncio.create_task(cluster.post())
    assert cluster.router is not None
    await until(lambda: len(cluster.router._exchanges) == 2)
    second.cancel()
    await until(lambda: len(cluster.router._exchanges) == 1)
    decode.script = good_decode
    first.cancel()
    await asyncio.wait_for(decode.idle(), WAIT_S)
    status, _, _ = await cluster.post()
    assert status == 200 and len(decode.seen) == 2
    assert prefill.gone == 0


async def test_back_pressure_queues_then_refuses_with_retry_after(cluster: Cluster, good_decode: Script) -> None:
    release = asyncio.Event()

    async def held(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
        await release.wait()
        return await good_decode(instance, request, seen)

    await cluster.start(max_in_flight=2, max_queue=3)
    await cluster.pair(held)
    waiting = [asyncio.create_task(cluster.post()) for _ in range(5)]
    await until(lambda: len(cluster.router._exchanges) == 5)
    status, headers, body = await cluster.post()
    assert status == 429 and int(headers["retry-after"]) >= 1
    assert json.loads(body)["error"]["type"] == "rate_limit_error"
    metrics = (await (await cluster.session().get("/metrics")).read()).decode()
    assert "kvferry_requests_in_flight 2.0" in metrics and "kvferry_requests_queued 3.0" in metrics
    release.set()
    assert [answer[0] for answer in await asyncio.gather(*waiting)] == [200] * 5


async def test_the_deadline_ends_a_request(cluster: Cluster) -> None:
    router = await cluster.start(request_deadline_s=500.0)
    prefill, decode = await cluster.pair(never, never)
    asked = asyncio.create_task(cluster.post())
    await asyncio.wait_for(asyncio.gather(prefill.arrived.wait(), decode.arrived.wait()), WAIT_S)
    (exchange,) = router._exchanges
    assert 500.0 - WAIT_S < exchange.deadline_s - time.monotonic() <= 500.0
    exchange.deadline_s -= 500.0
    status, headers, body = await asyncio.wait_for(asked, WAIT_S)
    assert status == 504 and json.loads(body)["error"]["code"] == "deadline"
    assert headers["x-kvferry-outcome"] == "failed; stage=prefill; cause=deadline; path=pair"
    await asyncio.gather(prefill.idle(), decode.idle())


async def test_a_silent_decode_instance_is_replaced(cluster: Cluster, good_decode: Script) -> None:
    router = await cluster.start(ttl_s=60.0)
    prefill = await cluster.add("p0", "prefill", answer_prefill)
    silent = await cluster.add("d0", "decode", never)
    good = await cluster.add("d1", "decode", good_decode, running=5)
    answer = asyncio.create_task(cluster.post())
    await asyncio.wait_for(silent.arrived.wait(), WAIT_S)
    for instance in (prefill, good):
        router.fleet.report(instance.report(), time.monotonic() + 60.0)
    router.fleet.expire(time.monotonic() + 60.0)
    status, _, _ = await asyncio.wait_for(answer, WAIT_S)
    assert status == 200
    await until(lambda: silent.gone == 1)
    assert cluster.last_record().decode == "d1"


async def test_an_instance_that_leaves_ends_what_it_has(cluster: Cluster, good_decode: Script) -> None:
    release = asyncio.Event()

    async def held(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
        await release.wait()
        return await good_decode(instance, request, seen)

    _, decode = await cluster.pair(held)
    other = await cluster.add("d1", "decode", good_decode, running=5)
    answer = asyncio.create_task(cluster.post())
    await asyncio.wait_for(decode.arrived.wait(), WAIT_S)
    assert cluster.router is not None and cluster.router.fleet.leave("d0", 7)
    assert (await cluster.post())[0] == 200 and len(other.seen) == 1
    await asyncio.sleep(0.3)
    release.set()
    assert (await answer)[0] == 200 and len(decode.seen) == 1


async def test_no_instance_is_a_503(cluster: Cluster) -> None:
    await cluster.start()
    status, headers, body = await cluster.post()
    assert status == 503 and headers["retry-after"] == "1"
    assert json.loads(body)["error"]["code"] == "no_instance_available"
    assert headers["x-kvferry-outcome"] == "failed; stage=queue; cause=no_instance_available; path=direct"


async def test_a_dead_kept_connection_is_replaced_without_notice(cluster: Cluster) -> None:
    async def close_after(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
        if seen.ticket is not None:
            cluster.outcome(delivered(seen.ticket))
        transport = request.transport
        assert transport is not None
        asyncio.get_running_loop().call_later(0.05, transport.close)
        return web.json_response(completion())

    await cluster.pair(close_after)
    for _ in range(5):
        status, _, _ = await cluster.post()
        assert status == 200 and cluster.last_record().attempts == 1
        await asyncio.sleep(0.05)


async def test_shutting_down_tells_running_requests(cluster: Cluster) -> None:
    router = await cluster.start(drain_s=0.1)
    _, decode = await cluster.pair(never)
    answer: asyncio.Task[Any] = asyncio.create_task(cluster.post())
    await asyncio.wait_for(decode.arrived.wait(), WAIT_S)
    await router.close()
    status, _, body = await answer
    assert status == 503 and json.loads(body)["error"]["code"] == "router_ending"
    with pytest.raises(aiohttp.ClientConnectorError):
        await cluster.post()


async def test_a_stream_that_breaks_off_on_the_second_attempt_is_ended_as_honestly(cluster: Cluster) -> None:
    await cluster.pair(refuse(503))
    await cluster.add("d1", "decode", die_after_first_event, running=5)
    status, _, body = await cluster.post(stream=True)
    assert status == 200 and body.startswith(text_event("first") + b": kvferry-outcome failed; stage=streaming; ")
    assert json.loads(body.rpartition(b"data: ")[2])["error"]["code"] == "peer_gone"
