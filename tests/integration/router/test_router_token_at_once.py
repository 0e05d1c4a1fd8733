"""A stream that begins with the prefill instance's token, and what can become of it."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web
from router_fakes import DONE, WAIT_S, Cluster, FakeInstance, Script, Seen, delivered, kill, open_stream, text_event

TOKEN = "Grü"
LAST = text_event(TOKEN).replace(b"null", b'"length"', 1)


async def stream_token(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
    """A prefill instance that streams its one token, as it is asked to."""
    assert seen.body["stream"] is True and seen.body["max_tokens"] == 1
    response = await open_stream(request)
    await response.write(LAST + DONE)
    return response


def decode(cluster: Cluster, *events: bytes) -> Script:
    """A decode instance that begins to answer once it is released."""

    async def script(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
        await instance.release.wait()
        assert seen.ticket is not None
        cluster.outcome(delivered(seen.ticket))
        response = await open_stream(request)
        for event in events:
            await response.write(event)
        return response

    return script


async def read_begin_then(cluster: Cluster, instance: FakeInstance) -> tuple[bytes, bytes]:
    """What the client has before decode has said anything, and what it gets afterwards."""
    body = {"model": "m", "prompt": "abc", "stream": True, "temperature": 0}
    async with cluster.session().post("/v1/completions", json=body) as answer:
        assert answer.status == 200 and answer.headers["content-type"].startswith("text/event-stream")
        begin = await asyncio.wait_for(answer.content.readuntil(b"\n\n"), WAIT_S)
        instance.release.set()
        return begin, await asyncio.wait_for(answer.content.read(), WAIT_S)


def text_of(event: bytes) -> str:
    return str(json.loads(event[6:])["choices"][0]["text"])


@pytest.mark.parametrize("pieces", [(TOKEN, "ße"), ("Gr", "üße")])
async def test_the_client_has_it_before_decode_has_begun_and_once(cluster: Cluster, pieces: tuple[str, ...]) -> None:
    await cluster.start(stream_first_token=True)
    _, d = await cluster.pair(decode(cluster, *map(text_event, pieces), DONE), stream_token)
    begin, rest = await read_begin_then(cluster, d)
    assert text_of(begin) == TOKEN and json.loads(begin[6:])["choices"][0]["finish_reason"] is None
    event, comment, done = rest.split(b"\n\n", 2)
    assert text_of(event) == "ße"
    assert comment.startswith(b": kvferry-outcome delivered") and done == DONE


@pytest.mark.parametrize("events", [(text_event("Grö"), DONE), (DONE,)])
async def test_another_token_ends_the_stream_with_an_error(cluster: Cluster, events: tuple[bytes, ...]) -> None:
    await cluster.start(stream_first_token=True)
    _, d = await cluster.pair(decode(cluster, *events), stream_token)
    begin, rest = await read_begin_then(cluster, d)
    assert text_of(begin) == TOKEN
    comment, error, nothing = rest.split(b"\n\n", 2)
    assert comment == b": kvferry-outcome failed; stage=streaming; cause=first_token_differs; path=pair"
    assert json.loads(error[6:])["error"]["code"] == "first_token_differs"
    assert nothing == b""
    await d.idle()


async def test_a_decode_instance_that_dies_or_refuses_after_it_is_not_replaced(cluster: Cluster) -> None:
    async def die(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
        await instance.release.wait()
        kill(request)
        return web.Response()

    async def refuse(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
        await instance.release.wait()
        return web.json_response({"error": {"message": "no"}}, status=500)

    await cluster.start(stream_first_token=True)
    _, d = await cluster.pair(die, stream_token)
    for script, cause in ((die, b"peer_gone"), (refuse, b"http_500")):
        d.script = script
        d.release.clear()
        begin, rest = await read_begin_then(cluster, d)
        assert text_of(begin) == TOKEN
        assert rest.startswith(b": kvferry-outcome failed; stage=streaming; cause=" + cause), rest
        assert b'"error"' in rest
    assert len(d.seen) == 2


async def test_decode_may_be_the_quicker_one(cluster: Cluster) -> None:
    async def late(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
        await d.arrived.wait()
        await instance.release.wait()
        return await stream_token(instance, request, seen)

    await cluster.start(stream_first_token=True)
    p, d = await cluster.pair(decode(cluster, text_event(TOKEN), text_event("ße"), DONE), late)
    d.release.set()
    status, _, body = await cluster.post(stream=True, temperature=0)
    assert status == 200
    assert body.startswith(text_event(TOKEN) + text_event("ße") + b": kvferry-outcome delivered")
    p.release.set()
    await p.idle()


async def test_a_request_of_chance_is_prefilled_without_a_stream(cluster: Cluster, good_decode: Script) -> None:
    await cluster.start(stream_first_token=True)
    p, _ = await cluster.pair(good_decode)
    status, _, _ = await cluster.post(stream=True, temperature=0.7)
    assert status == 200
    assert p.seen[0].body["stream"] is False
