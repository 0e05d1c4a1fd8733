"""A transfer engine on an event loop of its own thread, for tests that are plain functions."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from kvferry.testing.owner import Owner
from kvferry.transfer import Peer, TransferEngine, TransferSettings

T = TypeVar("T")
PATIENCE_S = 90.0
"""How long a test waits for a call that has a deadline of its own; passing it means that a deadline failed."""


class EngineThread:
    """Starts an engine; `run` and `spawn` run coroutines on its loop. Use as a context manager."""

    def __init__(
        self,
        transports: tuple[str, ...],
        *,
        listen: str = "tcp://127.0.0.1:0",
        secret: str = "conformance",
        settings: TransferSettings | None = None,
    ) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="kvferry-test-loop", daemon=True)
        self._thread.start()

        async def make() -> TransferEngine:
            engine = TransferEngine(
                listen=listen, transports=transports, secret=secret.encode() or None, settings=settings
            )
            await engine.start()
            return engine

        try:
            self.engine = self.run(make())
        except BaseException:
            self._end_loop()
            raise

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run it and wait for its result."""
        return self.spawn(coroutine).result(PATIENCE_S)

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run it; cancelling the future cancels the task."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def cancel_after(self, coroutine: Coroutine[Any, Any, T], seconds: float) -> None:
        """Run it, cancel it after a while, return when it has ended (which a transfer does only when nothing can land
        any more). A coroutine that was done before is fine; so is one that failed."""

        async def run() -> None:
            task = asyncio.ensure_future(coroutine)
            await asyncio.wait([task], timeout=seconds)
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                task.exception()

        self.run(run())

    def call(self, function: Callable[[], None]) -> None:
        """Run a plain function on the loop's thread."""

        async def run() -> None:
            function()

        self.run(run())

    def connect(self, address: str) -> Peer:
        return self.run(self.engine.connect(address, deadline_s=PATIENCE_S / 2))

    def close(self) -> None:
        """Close the engine and its loop, join the thread. Idempotent."""
        if self._loop.is_closed():
            return
        self.run(self.engine.close())
        self._end_loop()

    def _end_loop(self) -> None:
        self.run(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> EngineThread:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class LocalOwner:
    """An `Owner` in this process, with the calls of `OwnerProcess` that make sense for it."""

    def __init__(self, transports: tuple[str, ...], *, secret: str = "conformance") -> None:
        self._thread = EngineThread(transports, secret=secret)
        self._owner = Owner(self._thread.engine)
        self.address = self._thread.engine.address

    def call(self, command: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._owner, command)(*args, **kwargs)

    def close(self) -> None:
        self._owner.calm()
        self._thread.close()
