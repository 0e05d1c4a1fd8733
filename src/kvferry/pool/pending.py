"""What the attachment is doing for an engine, as the engine sees it: a value that comes, which can be asked to end.

`Loaded` and `Saved` are what comes of a load and a save.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Loaded(NamedTuple):
    """The first `num_blocks` blocks are whole in the caller's memory; the others hold unspecified bytes.

    `tiers` says how many came from `host`, `disk` and, over other nodes, `remote`. Without a `cause` the rest is a
    plain miss.
    """

    num_blocks: int = 0
    nbytes: int = 0
    tiers: Mapping[str, int] = {}
    duration_s: float = 0.0
    transport: str | None = None
    cause: str | None = None


class Saved(NamedTuple):
    """Blocks that the pool took, had already, and did not take. `refused` ones have a cause or found no room there."""

    stored: int = 0
    duplicates: int = 0
    refused: int = 0
    nbytes: int = 0
    duration_s: float = 0.0
    cause: str | None = None


class Pending(Generic[T]):
    """A value to come. Thread-safe. It always comes, within the deadline of what is being done, and never fails."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._future: Future[T] = Future()
        self._task: asyncio.Task[T] | None = None
        self._cancelled = False

    def done(self) -> bool:
        """Whether the value is there: from then on nothing is read from or written to the caller's blocks."""
        return self._future.done()

    def result(self, timeout_s: float | None = None) -> T:
        """The value; waits for it. Raises: TimeoutError after `timeout_s`."""
        return self._future.result(timeout_s)

    def on_done(self, call: Callable[[], None]) -> None:
        """Call when the value is there, at once if it is; on any thread."""
        self._future.add_done_callback(lambda _: call())

    def cancel(self) -> None:
        """Ask for an early end. `done` turns true as ever: when nothing more is read or written."""
        if not self.done() and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        self._cancelled = True
        if self._task is not None:
            self._task.cancel()

    def _follow(self, task: asyncio.Task[T], failed: Callable[[BaseException], T]) -> None:
        """The value is the task's; on the loop. `failed` makes one of an exception."""
        self._task = task
        task.add_done_callback(lambda done: self._settle(done, failed))
        if self._cancelled:
            task.cancel()

    def _settle(self, task: asyncio.Task[T], failed: Callable[[BaseException], T]) -> None:
        error: BaseException | None = asyncio.CancelledError() if task.cancelled() else task.exception()
        self._finish(task.result() if error is None else failed(error))

    def _finish(self, value: T) -> None:
        self._future.set_result(value)


def finished(loop: asyncio.AbstractEventLoop, value: Any) -> Pending[Any]:
    """A value that is there already."""
    pending: Pending[Any] = Pending(loop)
    pending._finish(value)
    return pending
