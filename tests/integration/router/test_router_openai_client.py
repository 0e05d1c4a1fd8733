"""The official OpenAI client, unmodified, against the router; and the router as a process of its own."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator

import openai
import pytest
from aiohttp import web
from router_fakes import (
    DONE,
    WAIT_S,
    Cluster,
    FakeInstance,
    Seen,
    answer_prefill,
    chat,
    chat_event,
    completion,
    delivered,
    kill,
    open_stream,
    text_event,
)

from kvferry.handoff.membership import RouterClient
from kvferry.types import Outcome, TerminalState

PIECES = ("Grü", "ße, ", "世界", " 🚢")


async def speak(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
    """A decode instance for both endpoints; the text asks for what shall happen."""
    is_chat = "chat" in seen.path
    asked = seen.body["messages"][-1]["content"] if is_chat else seen.body["prompt"]
    if asked == "refuse":
        error = {"message": "too long", "type": "invalid_request_error", "param": "prompt", "code": "too_long"}
        return web.json_response({"error": error}, status=400)
    if not seen.body.get("stream"):
        return web.json_response(chat("".join(PIECES)) if is_chat else completion("".join(PIECES)))
    response = await open_stream(request)
    for piece in PIECES:
        event = chat_event(piece) if is_chat else text_event(piece)
        # Two writes for one event, cut within a character.
        at = event.rindex(piece.encode()) + 1
        await response.write(event[:at])
        await asyncio.sleep(0.005)
        await response.write(event[at:])
    if asked == "die":
        kill(request)
        return response
    await response.write(DONE)
    return response


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[openai.AsyncOpenAI]:
    async def script(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
        if seen.ticket is not None:
            cluster.outcome(delivered(seen.ticket))
        return await speak(instance, request, seen)

    await cluster.pair(script)
    async with openai.AsyncOpenAI(base_url=cluster.url + "/v1", api_key="k", max_retries=0) as made:
        yield made


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [m.id async for m in client.models.list()] == ["m"]
    assert (await client.models.retrieve("m")).owned_by == "kvferry"


async def test_completion_and_chat(client: openai.AsyncOpenAI) -> None:
    text = await client.completions.create(model="m", prompt="a", max_tokens=4)
    assert text.choices[0].text == "".join(PIECES) and text.usage is not None and text.usage.total_tokens == 5
    raw = await client.chat.completions.with_raw_response.create(model="m", messages=[{"role": "user", "content": "a"}])
    assert raw.parse().choices[0].message.content == "".join(PIECES)
    assert raw.headers["x-kvferry-outcome"].startswith("delivered; ")


async def test_streams(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(model="m", prompt="a", stream=True)
    assert [c.choices[0].text async for c in stream] == list(PIECES)
    chat_stream = await client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": "a"}], stream=True
    )
    assert [c.choices[0].delta.content async for c in chat_stream] == list(PIECES)


async def test_several_prompts(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="m", prompt=["a", "b", "c"])
    assert [c.index for c in answer.choices] == [0, 1, 2] and answer.usage is not None
    assert answer.usage.total_tokens == 15


async def test_errors(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.completions.create(model="m", prompt="refuse")
    assert refused.value.code == "too_long" and refused.value.param == "prompt"
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.completions.create(model="other", prompt="a")
    assert unknown.value.code == "model_not_found"
    got = []
    with pytest.raises(openai.APIError, match=r"d0: .* was lost after") as broken:
        async for chunk in await client.completions.create(model="m", prompt="die", stream=True):
            got += [chunk.choices[0].text]
    assert got == list(PIECES) and broken.value.code == "peer_gone"


async def test_the_router_as_a_process(cluster: Cluster) -> None:
    """`kvferry router` with a secret; instances register by their own client and report over HTTP."""
    secret = "a secret of the cluster, long enough"
    environ = {k: v for k, v in os.environ.items() if not k.startswith("KVFERRY_")}
    router = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "kvferry",
        "router",
        "--port",
        "0",
        "--heartbeat-s",
        "100ms",
        "--ttl-s",
        "60s",
        "--outcome-wait-s",
        "30s",
        env={**environ, "KVFERRY_CLUSTER_SECRET": secret, "KVFERRY_CONFIG": ""},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert router.stdout is not None
    line = await asyncio.wait_for(router.stdout.readline(), 60)
    url = line.decode().split()[-1]
    clients: dict[str, RouterClient] = {}

    async def script(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
        assert seen.ticket is not None
        clients["d0"].report_outcome(Outcome(seen.ticket.handoff, TerminalState.DELIVERED, bytes_moved=7))
        return await speak(instance, request, seen)

    for name, role, does in (("p0", "prefill", answer_prefill), ("d0", "decode", script)):
        instance = FakeInstance(name, role, does)  # type: ignore[arg-type]
        await instance.start()
        cluster.instances.append(instance)
        clients[name] = RouterClient(url, secret.encode(), instance.report)
        clients[name].start()
    for client in clients.values():
        assert await asyncio.to_thread(client.wait_registered, WAIT_S)
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="k", max_retries=0) as api:
        stream = await api.completions.create(model="m", prompt="a", stream=True)
        assert [c.choices[0].text async for c in stream] == list(PIECES)
        raw = await api.completions.with_raw_response.create(model="m", prompt="a")
        assert raw.headers["x-kvferry-outcome"].startswith("delivered; tokens_computed=0; bytes=7; ")
    for client in clients.values():
        await asyncio.to_thread(client.close)
    router.terminate()
    _, errors = await asyncio.wait_for(router.communicate(), WAIT_S)
    assert router.returncode == 0
    ends = [line for line in errors.decode().splitlines() if "request ended" in line]
    assert len(ends) == 2 and all("state=delivered" in e and "prefill=p0" in e and "decode=d0" in e for e in ends)
