"""The directories that pool tests run with: embedded, and a real Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from kvferry.pool.directory import Directory, EmbeddedDirectory
from pool_processes import redis_server


@pytest.fixture(params=["embedded", pytest.param("redis", marks=pytest.mark.redis)])
async def directories(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Callable[[], Directory]]:
    """Makes views of one directory."""
    if request.param == "embedded":
        shared = EmbeddedDirectory()
        yield lambda: shared
        return
    pytest.importorskip("redis")
    from kvferry.pool.directory_redis import RedisDirectory

    views: list[RedisDirectory] = []
    with redis_server(tmp_path) as server:

        def view() -> Directory:
            views.append(RedisDirectory(server.url))
            return views[-1]

        yield view
        for each in views:
            await each.close()
