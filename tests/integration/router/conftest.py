"""A router and fake instances on one event loop."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from router_fakes import DONE, Cluster, FakeInstance, Script, Seen, completion, delivered, open_stream, text_event


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    made = Cluster()
    yield made
    await made.close()


@pytest.fixture
def good_decode(cluster: Cluster) -> Script:
    """A decode instance to which every handoff is delivered."""

    async def script(instance: FakeInstance, request: web.Request, seen: Seen) -> web.StreamResponse:
        if seen.ticket is not None:
            cluster.outcome(delivered(seen.ticket))
        if not seen.body.get("stream"):
            return web.json_response(completion())
        response = await open_stream(request)
        for piece in ("Grü", "ße, ", "世界", " 🚢"):
            await response.write(text_event(piece))
        await response.write(DONE)
        return response

    return script
