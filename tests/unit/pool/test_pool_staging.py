"""Pieces between two copies: one step ahead, never more than there are, all of them back whatever ends it."""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from kvferry.pool.staging import Staging, on_thread
from kvferry.transport.base import StopToken


def made() -> tuple[Staging, list[tuple[int, int]]]:
    return Staging(100, 3), []


async def turns() -> None:
    """Let everything run that can."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_one_step_is_filled_while_the_one_before_is_used() -> None:
    staging, filled = made()

    async def fill(step: int, at: int) -> None:
        filled.append((step, at))

    used = []
    async with contextlib.aclosing(staging.through(range(5), fill)) as pieces:
        async for step, at in pieces:
            used.append((step, at))
            await turns()
            assert len(filled) == min(5, step + 2)
            assert filled[: step + 1] == used
            assert staging.num_free == (1 if step < 4 else 2)
    assert [step for step, _ in used] == list(range(5))
    assert all(at in (0, 100, 200) for _, at in used)
    assert staging.num_free == 3


async def test_a_piece_is_not_filled_again_before_it_was_given_back() -> None:
    staging, _ = made()
    lent: set[int] = set()

    async def fill(step: int, at: int) -> None:
        assert at not in lent
        await asyncio.sleep(0)

    async def use(num_steps: int) -> None:
        async with contextlib.aclosing(staging.through(range(num_steps), fill)) as pieces:
            async for _, at in pieces:
                assert at not in lent
                lent.add(at)
                await turns()
                lent.discard(at)

    async with asyncio.timeout(30):
        await asyncio.gather(*(use(7) for _ in range(6)))
    assert staging.num_free == 3


@pytest.mark.parametrize("failing", [0, 1, 2])
async def test_a_step_that_cannot_be_filled_ends_it_with_all_pieces_back(failing: int) -> None:
    staging, _ = made()

    async def fill(step: int, at: int) -> None:
        if step == failing:
            raise RuntimeError("no")

    seen = []
    with pytest.raises(RuntimeError, match="no"):
        async with contextlib.aclosing(staging.through(range(4), fill)) as pieces:
            async for step, _ in pieces:
                seen.append(step)
    assert seen == list(range(failing))
    assert staging.num_free == 3


@pytest.mark.parametrize("cancel_in", ["use", "fill", "the end of a fill"])
async def test_a_user_that_is_cancelled_leaves_when_nothing_is_filled_any_more(cancel_in: str) -> None:
    staging, _ = made()
    threads, begun, go_on = ThreadPoolExecutor(2), asyncio.Event(), Future[None]()
    stop = StopToken()

    async def fill(step: int, at: int) -> None:
        if step == 1:
            begun.set()
            await on_thread(threads, lambda: go_on.result(30), stop)

    async def use() -> None:
        async with contextlib.aclosing(staging.through(range(4), fill)) as pieces:
            async for step, _ in pieces:
                if step == 0 and cancel_in == "use":
                    await asyncio.Event().wait()

    user = asyncio.create_task(use())
    async with asyncio.timeout(30):
        await begun.wait()
        await turns()
        if cancel_in == "the end of a fill":
            go_on.set_result(None)
        user.cancel()
        await turns()
        assert stop.is_set() or cancel_in == "the end of a fill"
        if cancel_in != "the end of a fill":
            assert not user.done()
            user.cancel()
            await turns()
            assert not user.done(), "a second time is no sooner"
            go_on.set_result(None)
        await asyncio.wait([user])
    assert user.cancelled()
    assert staging.num_free == 3
    threads.shutdown()


async def test_nothing_to_do_takes_nothing() -> None:
    staging, _ = made()

    async def fill(step: Any, at: int) -> None:
        raise AssertionError

    async with contextlib.aclosing(staging.through([], fill)) as pieces:
        assert [piece async for piece in pieces] == []
    assert staging.num_free == 3
