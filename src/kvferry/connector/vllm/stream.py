"""Doing things after what a device stream was given so far has completed (rule R5). Pure: no vLLM, no torch."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Protocol

_log = logging.getLogger("kvferry.vllm")


class Event(Protocol):
    """A mark in a device stream, such as `torch.cuda.Event`."""

    def synchronize(self) -> None: ...


class AfterForward:
    """Runs actions in order, each after the event recorded with it has fired.

    Args:
        record: marks the current stream; None where the forward is synchronous (the CPU), so that actions run at once.
    """

    def __init__(self, record: Callable[[], Event] | None = None) -> None:
        self._record = record
        self._queue: queue.SimpleQueue[tuple[Event, Callable[[], None]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if record is not None:
            self._thread = threading.Thread(target=self._run, name="kvferry-after-forward", daemon=True)
            self._thread.start()

    @property
    def is_asynchronous(self) -> bool:
        return self._record is not None

    def do(self, action: Callable[[], None]) -> None:
        """Run `action` once all that the current stream holds now has completed. It must not raise."""
        if self._record is None:
            action()
        else:
            self._queue.put((self._record(), action))

    def close(self) -> None:
        """Run what is queued, then end the thread. Idempotent."""
        if self._thread is not None and self._thread.is_alive():
            self._queue.put(None)
            self._thread.join(5.0)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            event, action = item
            try:
                event.synchronize()
            except RuntimeError:
                # The device failed: what it wrote is unknown, so nothing is published; the engine fails by itself.
                _log.exception("waiting for the forward failed; its blocks are not published")
                continue
            action()
