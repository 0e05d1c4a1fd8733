"""The arenas of this host's nodes, pinned for CUDA in an engine's process: its GPU then copies out of them by itself.

What a GPU can reach is a matter of each process, so an engine pins what it maps, and a node pins nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

from kvferry.errors import KVError
from kvferry.observe import get_log
from kvferry.transfer import Peer, TransferEngine
from kvferry.transport import cuda_runtime as cuda

STEP_BYTES = 256 << 20
"""Pinned in one call: the driver lets nothing else in meanwhile, and the model's kernels must be launched."""

_log = get_log(__name__)


class PinnedArena:
    """A node's arena as this process's GPU sees it: its first byte at `address`, while it is used in a `with`."""

    def __init__(self, view: Any, let_go: Callable[[], None]) -> None:
        self.address = int(view.ctypes.data)
        self._view, self._let_go = view, let_go
        self._num_users = 0
        self._is_left = False

    def leave(self) -> None:
        """Let go of the memory as soon as nobody uses it."""
        self._is_left = True
        self._look()

    def __enter__(self) -> PinnedArena:
        self._num_users += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._num_users -= 1
        self._look()

    def _look(self) -> None:
        if self._is_left and not self._num_users:
            self._is_left = False
            self._let_go()


class PinnedArenas:
    """Pins each arena once, on a thread, from when it is first asked for. All calls belong to one event loop."""

    def __init__(self, threads: Executor) -> None:
        """
        Args:
            threads: on which the GPU's device is the current one.
        """
        self._threads = threads
        self._pinned: dict[tuple[Peer, str], PinnedArena | None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def find(self, engine: TransferEngine, peer: Peer, region_id: int) -> PinnedArena | None:
        """A region of a peer, once it is pinned; None until then, on another host, and where the GPU does not take
        it."""
        region = peer.regions.get(region_id)
        if region is None or peer.lost is not None or self._is_closed:
            return None
        key = peer, region.token
        if key not in self._pinned:
            self._pinned[key] = None
            self._spawn(self._pin(engine, peer, region_id, key))
        return self._pinned[key]

    def lost(self, peer: Peer) -> None:
        """The peer is gone: its memory must not stay with this process."""
        for key in [key for key in self._pinned if key[0] is peer]:
            if (arena := self._pinned.pop(key)) is not None:
                arena.leave()

    async def close(self) -> None:
        """Let go of everything; nothing may be in use."""
        self._is_closed = True
        for peer, _ in list(self._pinned):
            self.lost(peer)
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _pin(self, engine: TransferEngine, peer: Peer, region_id: int, key: tuple[Peer, str]) -> None:
        loop = asyncio.get_running_loop()

        def wanted() -> bool:
            return key in self._pinned

        try:
            view = await loop.run_in_executor(self._threads, engine.mapped, peer, region_id)
            if view is None or not await loop.run_in_executor(self._threads, _pin_all, view, wanted):
                return
        except KVError as error:
            _log.warning(
                "a node's memory cannot be pinned; what it has is loaded with one copy more",
                node=peer.name,
                cause=error.cause,
                error=str(error),
            )
            return
        arena = PinnedArena(view, lambda: self._spawn(self._unpin(view)))
        if wanted():
            self._pinned[key] = arena
            _log.info("a node's memory is pinned for CUDA", node=peer.name, nbytes=view.nbytes)
        else:
            arena.leave()

    async def _unpin(self, view: Any) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._threads, _unpin_first, view, view.nbytes)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _pin_all(view: Any, wanted: Callable[[], bool]) -> bool:
    """Pin a mapping, uint8 [n], step by step; False if it was not wanted any more. Raises: KVError; nothing is pinned
    then."""
    address, done = int(view.ctypes.data), 0
    try:
        while done < view.nbytes and wanted():
            step = min(STEP_BYTES, view.nbytes - done)
            cuda.pin(address + done, step, read_only=True)
            done += step
    except KVError:
        _unpin_first(view, done)
        raise
    if done < view.nbytes:
        _unpin_first(view, done)
        return False
    return True


def _unpin_first(view: Any, nbytes: int) -> None:
    for at in range(0, nbytes, STEP_BYTES):
        cuda.unpin(int(view.ctypes.data) + at)
