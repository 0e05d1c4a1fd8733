"""Good answers: bytes unchanged, both legs, outcomes told."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web
from router_fakes import (
    DONE,
    WAIT_S,
    Cluster,
    FakeInstance,
    Script,
    Seen,
    completion,
    delivered,
    open_stream,
    text_event,
    when_released,
)

EVENTS = b"".join(text_event(t) for t in ("Grü", "ße, ", "世界", " 🚢"))


async def test_both_legs_get_the_request_at_once(cluster: Cluster, good_decode: Script) -> None:
    prefill, decode = await cluster.pair(good_decode)
    body = {"model": "m", "prompt": "abc", "temperature": 0.5, "max_tokens": 9, "min_tokens": 3, "logprobs": 2}
    async with cluster.session().post("/v1/completions", json=body, headers={"authorization": "Bearer k"}) as answer:
        assert answer.status == 200
        assert json.loads(await answer.read()) == completion()
        outcome = answer.headers["x-kvferry-outcome"]
    (at_p,), (at_d,) = prefill.seen, decode.seen
    assert at_p.ticket is not None and at_d.ticket is not None
    assert (at_p.ticket.side, at_d.ticket.side) == ("source", "target")
    assert at_p.ticket.handoff == at_d.ticket.handoff
    assert at_p.ticket.source.instance_id == "p0" and at_p.ticket.source.incarnation == 7
    assert at_d.ticket.source.addresses == ("tcp://127.0.0.1:9",) and at_d.ticket.target.instance_id == "d0"
    assert 0 < at_d.ticket.remaining_s <= 30
    assert {k: v for k, v in at_p.body.items() if k != "kv_transfer_params"} == {
        "model": "m",
        "prompt": "abc",
        "temperature": 0.5,
        "max_tokens": 1,
        "stream": False,
    }
    assert {k: v for k, v in at_d.body.items() if k != "kv_transfer_params"} == body
    assert at_p.headers["x-request-id"] == at_d.headers["x-request-id"]
    assert at_p.headers["authorization"] == at_d.headers["authorization"] == "Bearer k"
    assert outcome == f"delivered; tokens_computed=0; bytes=4096; handoff={at_d.ticket.handoff}"
    record = cluster.last_record()
    assert (record.state, record.prefill, record.decode, record.attempts) == ("delivered", "p0", "d0", 1)
    assert record.handoff_bytes == 4096


async def test_a_stream_goes_through_unchanged_with_its_outcome_before_done(
    cluster: Cluster, good_decode: Script
) -> None:
    _, decode = await cluster.pair(good_decode)
    status, headers, body = await cluster.post(stream=True)
    assert status == 200 and headers["content-type"] == "text/event-stream; charset=utf-8"
    ticket = decode.seen[0].ticket
    assert ticket is not None
    comment = f": kvferry-outcome delivered; tokens_computed=0; bytes=4096; handoff={ticket.handoff}\n\n".encode()
    assert body == EVENTS + comment + DONE


async def test_every_split_of_the_bytes_gives_the_same_stream(cluster: Cluster) -> None:
    whole = text_event("ü世🚢") + DONE
    splits = iter(range(1, len(whole)))

    async def script(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
        assert seen.ticket is not None
        cluster.outcome(delivered(seen.ticket))
        at = next(splits)
        response = await open_stream(request)
        await response.write(whole[:at])
        await asyncio.sleep(0.002)
        await response.write(whole[at:])
        return response

    await cluster.pair(script)
    session = cluster.session()
    for at in range(1, len(whole)):
        async with session.post("/v1/completions", json={"prompt": "a", "stream": True}) as answer:
            body = await answer.read()
        before, comment, after = body.partition(b": kvferry-outcome delivered")
        assert before + DONE == whole, at
        assert comment and after.endswith(b"\n\n" + DONE), at


async def test_other_bytes_pass_too(cluster: Cluster) -> None:
    """Bytes that are no UTF-8 and no events are nobody's business on the way."""
    payload = bytes(range(256)) * 300

    async def script(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
        return web.Response(body=payload, content_type="application/octet-stream", headers={"x-own": "kept"})

    await cluster.start()
    await cluster.add("b0", "both", script)
    status, headers, body = await cluster.post()
    assert (status, body) == (200, payload)
    assert headers["x-own"] == "kept" and headers["content-type"] == "application/octet-stream"


async def test_one_instance_alone_serves_direct(cluster: Cluster, good_decode: Script) -> None:
    await cluster.start()
    both = await cluster.add("b0", "both", good_decode)
    _, headers, _ = await cluster.post()
    assert headers["x-kvferry-outcome"] == "delivered; cause=one_instance; path=direct"
    assert both.seen[0].ticket is None


async def test_the_client_s_bytes_reach_decode_as_they_are(cluster: Cluster, good_decode: Script) -> None:
    _, decode = await cluster.pair(good_decode)
    raw = '  { "prompt" : "Gr\\u00fc\\u00dfe 世界", "stream":null,"top_p":1.0e0 }\n'.encode()
    async with cluster.session().post("/v1/completions", data=raw) as answer:
        assert answer.status == 200
    sent = decode.seen[0].raw
    assert sent.startswith(b'{"kv_transfer_params":{') and sent.endswith(raw.strip()[1:] + b"\n")


async def test_n_above_one_goes_to_one_instance(cluster: Cluster, good_decode: Script) -> None:
    prefill, decode = await cluster.pair(good_decode)
    _, headers, _ = await cluster.post(n=3)
    assert headers["x-kvferry-outcome"] == "delivered; cause=n_above_one; path=direct"
    assert not prefill.seen and decode.seen[0].ticket is None and decode.seen[0].body["n"] == 3


async def test_several_prompts_have_a_handoff_each(cluster: Cluster) -> None:
    async def script(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
        assert seen.ticket is not None
        cluster.outcome(delivered(seen.ticket))
        await asyncio.sleep(0.02 if seen.body["prompt"] == "one" else 0)
        return web.json_response(completion(f"<{seen.body['prompt']}>"))

    prefill, decode = await cluster.pair(script)
    prompts = ["one", "two", [1, 2, 3]]
    status, headers, body = await cluster.post(prompt=prompts)
    answer: dict[str, Any] = json.loads(body)
    assert status == 200
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [(0, "<one>"), (1, "<two>"), (2, "<[1, 2, 3]>")]
    assert answer["usage"] == {"prompt_tokens": 9, "completion_tokens": 6, "total_tokens": 15}
    assert headers["x-kvferry-outcome"].count("delivered; ") == 3
    assert len(prefill.seen) == len(decode.seen) == 3
    assert len({s.ticket.handoff for s in decode.seen if s.ticket}) == 3


async def test_several_prompts_fail_with_the_failing_one_s_answer(cluster: Cluster) -> None:
    async def script(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
        if seen.body["prompt"] == "bad":
            return web.json_response({"error": {"message": "too long"}}, status=400)
        await asyncio.Event().wait()
        raise AssertionError

    _, decode = await cluster.pair(script)
    status, _, body = await cluster.post(prompt=["one", "bad", "two"])
    assert (status, json.loads(body)) == (400, {"error": {"message": "too long"}})
    await decode.idle()
    assert decode.gone == 2


async def test_one_prompt_in_a_list_and_streams_of_several(cluster: Cluster, good_decode: Script) -> None:
    prefill, decode = await cluster.pair(good_decode)
    _, headers, _ = await cluster.post(prompt=["one"])
    assert headers["x-kvferry-outcome"].startswith("delivered; tokens_computed=0")
    _, _, body = await cluster.post(prompt=["one", "two"], stream=True)
    assert b": kvferry-outcome delivered; cause=many_prompts_streamed; path=direct\n\n" + DONE in body
    assert len(prefill.seen) == 1 and len(decode.seen) == 2


async def test_an_outcome_that_never_comes_is_not_called_delivered(cluster: Cluster) -> None:
    async def script(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
        if not seen.body.get("stream"):
            return web.json_response(completion())
        response = await open_stream(request)
        await response.write(text_event("x") + DONE)
        return response

    await cluster.start(outcome_wait_s=0.3)
    await cluster.pair(script)
    _, headers, body = await cluster.post()
    unknown = "recomputed; stage=decode; cause=outcome_unknown; path=pair"
    assert headers["x-kvferry-outcome"] == unknown and json.loads(body) == completion()
    _, _, body = await cluster.post(stream=True)
    assert body == text_event("x") + f": kvferry-outcome {unknown}\n\n".encode() + DONE


async def test_an_outcome_that_comes_after_the_last_byte_is_waited_for(cluster: Cluster) -> None:
    async def script(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
        assert seen.ticket is not None
        outcome = delivered(seen.ticket, state="recomputed", stage="pulling", cause="peer_gone", tokens_computed=40)
        asyncio.get_running_loop().call_later(0.1, cluster.outcome, outcome)
        return web.json_response(completion())

    await cluster.pair(script)
    _, headers, _ = await cluster.post()
    assert headers["x-kvferry-outcome"].startswith("recomputed; stage=pulling; cause=peer_gone; tokens_computed=40;")
    metrics = (await (await cluster.session().get("/metrics")).read()).decode()
    assert 'kvferry_requests_total{cause="peer_gone",stage="pulling",state="recomputed"} 1.0' in metrics


async def test_a_stream_without_done_ends_with_its_outcome(cluster: Cluster) -> None:
    async def script(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
        response = await open_stream(request)
        await response.write(b"data: a\n\ndata: unfinished")
        return response

    await cluster.start()
    await cluster.add("b0", "both", script)
    _, _, body = await cluster.post(stream=True)
    assert body == b"data: a\n\n: kvferry-outcome delivered; cause=one_instance; path=direct\n\ndata: unfinished"


async def test_an_error_event_of_the_instance_is_a_failure(cluster: Cluster) -> None:
    broken = b'data: {"error": {"message": "out of memory"}}\n\n'

    async def script(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
        response = await open_stream(request)
        await response.write(text_event("x") + broken + DONE)
        return response

    await cluster.start(outcome_wait_s=0.1)
    await cluster.pair(script)
    _, _, body = await cluster.post(stream=True)
    outcome = b": kvferry-outcome failed; stage=streaming; cause=instance_error; path=pair\n\n"
    assert body == text_event("x") + broken + outcome + DONE


async def test_a_slow_reader_slows_the_instance_and_loses_nothing(cluster: Cluster) -> None:
    event = text_event("x" * 60_000)
    num_events = 400
    written = 0

    async def script(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
        nonlocal written
        response = await open_stream(request)
        for _ in range(num_events):
            await response.write(event)
            written += 1
        await response.write(DONE)
        return response

    await cluster.start()
    await cluster.add("b0", "both", script)
    async with cluster.session().post("/v1/completions", json={"prompt": "a", "stream": True}) as answer:
        first = await answer.content.readany()
        await asyncio.sleep(0.5)
        # 24 MB in all: sockets and buffers hold a part, the rest must wait at the instance.
        assert written < num_events - 50
        rest = await answer.read()
    assert (first + rest).startswith(event * num_events + b": kvferry-outcome")


async def test_prefill_that_answers_after_decode_is_not_waited_for(cluster: Cluster, good_decode: Script) -> None:
    prefill, _ = await cluster.pair(good_decode, when_released)
    status, _, _ = await asyncio.wait_for(cluster.post(), WAIT_S)
    assert status == 200
    await asyncio.wait_for(prefill.arrived.wait(), WAIT_S)
    assert prefill.running == 1
    prefill.release.set()
    await prefill.idle()
    # The KV had arrived: that leg was left to end by itself.
    assert prefill.gone == 0


async def test_a_delivery_that_did_not_happen_is_counted_and_warned_of(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    computed = iter((16, 17))

    async def script(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
        assert seen.ticket is not None
        cluster.outcome(delivered(seen.ticket, tokens_computed=next(computed)))
        return web.json_response(completion())

    await cluster.pair(script)
    warned = []
    for _ in range(2):
        await cluster.post()
        warned.append("prompt computed although its handoff was delivered" in caplog.text)
    assert warned == [False, True]
    async with cluster.session().get("/metrics") as answer:
        assert "kvferry_router_promised_tokens_computed_total 33.0" in await answer.text()
