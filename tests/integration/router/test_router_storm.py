"""Many requests at once while instances die, refuse and fall silent: each ends once, right or with an honest error."""

from __future__ import annotations

import asyncio
import json
import random

import aiohttp
from aiohttp import web
from router_fakes import (
    DONE,
    Cluster,
    FakeInstance,
    Seen,
    answer_prefill,
    completion,
    delivered,
    kill,
    open_stream,
    text_event,
    until,
)

SEED = 20261122
NUM_REQUESTS = 200
PIECES = ("Grü", "ße ", "世界")


async def test_200_requests_while_everything_fails_now_and_then(cluster: Cluster) -> None:
    chance = random.Random(SEED)
    print(f"seed {SEED}")

    async def decode(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
        fate = chance.random()
        await asyncio.sleep(chance.random() * 0.03)
        if fate < 0.08:
            kill(request)
            raise asyncio.CancelledError
        if fate < 0.14:
            return web.json_response({"error": {"message": "full"}}, status=503)
        if seen.ticket is not None and fate < 0.9:
            cluster.outcome(delivered(seen.ticket))
        if not seen.body.get("stream"):
            return web.json_response(completion(seen.body["prompt"]))
        response = await open_stream(request)
        await response.write(text_event(seen.body["prompt"]))
        for piece in PIECES:
            await asyncio.sleep(chance.random() * 0.005)
            if 0.14 < fate < 0.2:
                kill(request)
                return response
            await response.write(text_event(piece))
        await response.write(DONE)
        return response

    async def prefill(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
        fate = chance.random()
        await asyncio.sleep(chance.random() * 0.03)
        if fate < 0.1:
            kill(request)
            raise asyncio.CancelledError
        if fate < 0.2:
            return web.json_response({"error": {"message": "full"}}, status=503)
        return await answer_prefill(instance, request, seen)

    router = await cluster.start(max_in_flight=64, max_queue=100, outcome_wait_s=0.1)
    for name, role, script in (("p0", "prefill", prefill), ("p1", "prefill", prefill)):
        await cluster.add(name, role, script)  # type: ignore[arg-type]
    for name in ("d0", "d1"):
        await cluster.add(name, "decode", decode)

    ends: dict[str, int] = {}

    async def ask(number: int, session: aiohttp.ClientSession) -> tuple[int, bytes, str]:
        body = {"model": "m", "prompt": f"prompt {number}", "stream": number % 2 == 0}
        headers = {"x-request-id": f"storm-{number}"}
        async with asyncio.timeout(100), session.post("/v1/completions", json=body, headers=headers) as answer:
            return answer.status, await answer.read(), answer.headers.get("x-kvferry-outcome", "")

    async def one(number: int, session: aiohttp.ClientSession) -> None:
        asking = asyncio.create_task(ask(number, session))
        if number % 10 == 9:
            # This client leaves as soon as the router has its request.
            name = f"storm-{number}"
            while not asking.done() and name not in {exchange.request_id for exchange in router._exchanges}:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            asking.cancel()
        try:
            end = judge(number, number % 2 == 0, *await asking)
        except asyncio.CancelledError:
            assert number % 10 == 9
            end = "left"
        ends[end] = ends.get(end, 0) + 1

    async with aiohttp.ClientSession(router.url, connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(one(i, session) for i in range(NUM_REQUESTS)))
    await asyncio.gather(*(i.idle() for i in cluster.instances))
    await until(lambda: not router._exchanges)
    assert sum(ends.values()) == NUM_REQUESTS
    assert {"whole", "broken off", "refused", "left"} <= ends.keys(), ends
    assert ends["whole"] > NUM_REQUESTS / 2, ends
    # Nothing is left behind anywhere.
    assert not router._shared.handoffs and not router._queue and router._num_started == 0
    assert [router.fleet.load(i.name) for i in cluster.instances] == [0, 0, 0, 0]
    states = {record.state for record in router.metrics.recent}
    assert states == {"delivered", "recomputed", "aborted", "failed"}


def judge(number: int, stream: bool, status: int, got: bytes, outcome: str) -> str:
    """What became of a request, from what its client saw."""
    if status != 200:
        assert status in (429, 502, 503) and json.loads(got)["error"]["message"], (status, got)
        return "refused"
    if not stream:
        assert json.loads(got) == completion(f"prompt {number}") and outcome.startswith(("delivered", "recomputed"))
        return "whole"
    events = [text_event(f"prompt {number}"), *(text_event(p) for p in PIECES), DONE]
    told = [part + b"\n\n" for part in got.split(b"\n\n")[:-1]]
    comments = [part for part in told if part.startswith(b": kvferry-outcome ")]
    seen = [part for part in told if part not in comments]
    assert len(comments) == 1
    if seen == events:
        assert told[-2] == comments[0]
        return "whole"
    # An honest error event ends it, and what came before is a beginning of the answer, nothing replayed.
    assert b'"error"' in seen[-1] and seen[:-1] == events[: len(seen) - 1] and b"failed; stage=streaming" in comments[0]
    return "broken off"
