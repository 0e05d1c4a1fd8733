"""A background task that dies says so; one that is cancelled or ends does not."""

from __future__ import annotations

import asyncio

import pytest

from kvferry.observe import start_background


async def test_a_bug_in_a_background_task_is_told(caplog: pytest.LogCaptureFixture) -> None:
    async def buggy() -> None:
        raise KeyError("nobody expected this")

    task = start_background(buggy(), what="keeping the promise")
    await asyncio.wait({task})
    await asyncio.sleep(0)
    (record,) = caplog.records
    assert record.levelname == "ERROR" and "a background task died" in record.getMessage()
    assert record.exc_info is not None and isinstance(record.exc_info[1], KeyError)
    assert record.kvferry_fields == {"task": "keeping the promise"}  # type: ignore[attr-defined]


async def test_an_end_and_a_cancellation_are_no_news(caplog: pytest.LogCaptureFixture) -> None:
    ended = start_background(asyncio.sleep(0), what="a short one")
    cancelled = start_background(asyncio.sleep(60), what="a long one")
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.gather(ended, cancelled, return_exceptions=True)
    await asyncio.sleep(0)
    assert not caplog.records
