"""The handoff node's event loop on a thread of its own, its tasks, and its one timer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from kvferry.clock import Clock

CLOSE_TIMEOUT_S = 5.0
T = TypeVar("T")


class NodeLoop:
    """`start`, `run` and `close` are for other threads, `spawn` and `arm` for the loop's own, `call` for any."""

    def __init__(self, clock: Clock) -> None:
        self.closing = False
        self._clock = clock
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="kvferry-handoff", daemon=True)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at_s: float | None = None

    def start(self) -> None:
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Run it on the loop and wait for its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def call(self, call: Callable[..., object], *args: Any) -> None:
        """Run `call` on the loop, after everything that was put there before."""
        if threading.get_ident() == self._thread.ident:
            self._loop.call_soon(call, *args)  # no wake-up through a socket, of which each message would need several
            return
        try:
            self._loop.call_soon_threadsafe(call, *args)
        except RuntimeError:
            # The loop has ended: this node is closed, and its peers see that.
            for arg in args:
                if asyncio.iscoroutine(arg):
                    arg.close()

    def close(self, shut_down: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Cancel the tasks, run `shut_down` when they have ended, join the thread."""
        self.closing = True
        if self._thread.is_alive():
            self.run(self._end(shut_down), CLOSE_TIMEOUT_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(CLOSE_TIMEOUT_S)
        if not self._loop.is_running():
            self._loop.close()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task that `close` cancels."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def arm(self, at_s: float | None, ring: Callable[[float], None]) -> None:
        """Call `ring(at_s)` at that time of the clock, instead of what was armed before; None: not at all."""
        if at_s == self._timer_at_s:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_at_s = None, at_s
        if at_s is not None:
            self._timer = self._loop.call_later(max(0.0, at_s - self._clock.now_s()), self._ring, at_s, ring)

    def _ring(self, at_s: float, ring: Callable[[float], None]) -> None:
        self._timer, self._timer_at_s = None, None
        ring(at_s)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _end(self, shut_down: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await shut_down()
