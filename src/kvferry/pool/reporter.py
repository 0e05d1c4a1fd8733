"""Keeps a directory told of what a node has: changes in order, the node's lease, everything again where it was lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kvferry.errors import KVError
from kvferry.observe import get_log
from kvferry.pool.directory import BlockName, Directory
from kvferry.pool.index import BlockIndex
from kvferry.types import Incarnation

FLUSH_S = 0.05
_log = get_log(__name__)


class Reporter:
    """One node's reports. On the node's event loop."""

    def __init__(
        self, directory: Directory, index: BlockIndex, *, node: Incarnation, address: Callable[[], str], ttl_s: float
    ) -> None:
        """
        Args:
            address: where clients reach the node; asked when it joins.
            ttl_s: the node's lease; renewed three times as often.
        """
        self._directory, self._index, self._node = directory, index, node
        self._address, self._ttl_s = address, ttl_s
        self._task: asyncio.Task[None] | None = None
        self._joined = False
        self._reachable = True
        self.failures = 0

    def start(self) -> None:
        """Begin to report; an absent directory is tried again until it is there."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Leave the directory, as far as it can be told. Idempotent."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._task = None
        try:
            await self._directory.leave(self._node)
        except KVError as error:
            _log.info("the directory could not be told that this node leaves", cause=error.cause)

    async def _run(self) -> None:
        renew_at_s = 0.0
        loop = asyncio.get_running_loop()
        while True:
            try:
                if loop.time() >= renew_at_s:
                    if not self._joined or not await self._directory.renew(self._node, self._ttl_s):
                        await self._report_all()
                    renew_at_s = loop.time() + self._ttl_s / 3
                await self._report_changes()
                if not self._reachable:
                    _log.info("the directory is back")
                self._reachable = True
            except KVError as error:
                # What was under way may be told or not: all of it is told again.
                self._joined, renew_at_s = False, loop.time() + self._ttl_s / 3
                self.failures += 1
                if self._reachable:
                    _log.warning("the directory can't be told", cause=error.cause, error=str(error))
                self._reachable = False
                await asyncio.sleep(self._ttl_s / 3)
            await asyncio.sleep(FLUSH_S)

    async def _report_all(self) -> None:
        self._index.take_changes()
        names = self._index.names()
        await self._directory.report(self._node, names, [])
        await self._report_changes()
        await self._directory.join(self._node, self._address(), self._ttl_s)
        self._joined = True
        _log.info("reported everything to the directory", blocks=len(names))

    async def _report_changes(self) -> None:
        changes = self._index.take_changes()
        if changes:
            added: list[BlockName] = [name for name, present in changes.items() if present]
            removed: list[BlockName] = [name for name, present in changes.items() if not present]
            await self._directory.report(self._node, added, removed)
