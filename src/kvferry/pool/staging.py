"""Memory between two copies: a few pieces, lent one at a time, so that what waits there is bounded."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from concurrent.futures import Executor
from typing import Any, TypeVar

from kvferry.transport.base import StopToken

T = TypeVar("T")


class Staging:
    """`num_pieces` pieces of `piece_bytes`, known by their byte offsets. On one event loop."""

    def __init__(self, piece_bytes: int, num_pieces: int) -> None:
        self._free: asyncio.Queue[int] = asyncio.Queue()
        self.num_pieces = num_pieces
        for piece in range(num_pieces):
            self._free.put_nowait(piece * piece_bytes)

    @property
    def num_free(self) -> int:
        """Pieces that nobody has."""
        return self._free.qsize()

    async def through(
        self, steps: Sequence[T], fill: Callable[[T, int], Coroutine[Any, Any, None]]
    ) -> AsyncGenerator[tuple[T, int], None]:
        """Each step with the piece that was filled for it, which is the caller's until it asks for the next one.

        One step ahead is filled meanwhile. Use it within `contextlib.aclosing`: when that is left, however it is,
        every piece is back.

        Args:
            fill: brings a step's bytes into the piece at an offset; when it ends, however it does, it writes no more.
        """
        filling = self._begin(fill, steps[0]) if steps else None
        try:
            for number, step in enumerate(steps):
                assert filling is not None
                at = await filling
                filling = self._begin(fill, steps[number + 1]) if number + 1 < len(steps) else None
                try:
                    yield step, at
                finally:
                    self._free.put_nowait(at)
        finally:
            if filling is not None:
                await self._take_back(filling)

    def _begin(self, fill: Callable[[T, int], Coroutine[Any, Any, None]], step: T) -> asyncio.Task[int]:
        return asyncio.get_running_loop().create_task(self._fill(fill, step))

    async def _fill(self, fill: Callable[[T, int], Coroutine[Any, Any, None]], step: T) -> int:
        at = await self._free.get()
        try:
            await fill(step, at)
        except BaseException:
            self._free.put_nowait(at)
            raise
        return at

    async def _take_back(self, filling: asyncio.Task[int]) -> None:
        filling.cancel()
        while not filling.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([filling])
        if not filling.cancelled() and filling.exception() is None:
            self._free.put_nowait(filling.result())


async def on_thread(threads: Executor, work: Callable[[], T], stop: StopToken) -> T:
    """Run `work` on a thread. Cancelled, it sets `stop` and ends only when the thread has."""
    running = asyncio.get_running_loop().run_in_executor(threads, work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        stop.set()
        while not running.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([running])
        running.exception()
        raise
