"""Tasks that run beside everything else: one that dies of what nobody expected says so at once."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from kvferry.observe.logs import get_log

_log = get_log(__name__)


def start_background(work: Coroutine[Any, Any, None], *, what: str) -> asyncio.Task[None]:
    """Run `work` as a task of the running loop.

    Nobody awaits such a task before the end, so an exception in it would stay unseen and its work silently undone: it
    is logged with its traceback, and stays in the task. A cancellation is no error.

    Args:
        what: its work, as the log shall name it.
    """
    task = asyncio.get_running_loop().create_task(work, name=what)
    task.add_done_callback(_tell_if_it_died)
    return task


def _tell_if_it_died(task: asyncio.Task[None]) -> None:
    error = None if task.cancelled() else task.exception()
    if error is not None:
        _log.exception("a background task died, which is a bug: its work is not done any more", of=error,
                       task=task.get_name())  # fmt: skip
