"""Keeps a directory told of what a node has: changes in order, the node's lease, everything again where it was lost.

It is also how a node that was away learns that blocks were removed meanwhile: by each space's epoch.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

from kvferry.errors import KVError, TransportError
from kvferry.observe import get_log, start_background
from kvferry.pool.directory import BlockName, Directory
from kvferry.pool.epochs import FIRST, Epoch, new_epoch
from kvferry.pool.index import BlockIndex
from kvferry.pool.keys import BlockSpace
from kvferry.types import Incarnation

FLUSH_S = 0.05
TIDY_S = 3.0
TRIES = 8
_log = get_log(__name__)


class Reporter:
    """One node's reports. On the node's event loop."""

    def __init__(
        self,
        directory: Directory,
        index: BlockIndex,
        *,
        node: Incarnation,
        address: Callable[[], str],
        ttl_s: float,
        counts: Counter[str],
        on_joined: Callable[[], None],
        on_epochs: Callable[[], Awaitable[None]],
    ) -> None:
        """
        Args:
            address: where clients reach the node; asked when it joins.
            ttl_s: the node's lease; renewed three times as often.
            counts: gets `directory_failures` and `removals_missed`.
            on_joined: the node is live and missed no removal; called each time, before it reports what it has.
            on_epochs: spaces have other epochs now, and blocks were forgotten where the node had missed a removal.
        """
        self._directory, self._index, self._node = directory, index, node
        self._address, self._ttl_s, self._counts = address, ttl_s, counts
        self._on_joined, self._on_epochs = on_joined, on_epochs
        self._task: asyncio.Task[None] | None = None
        self._joined = False
        self._reachable = True
        self._unknown: dict[BlockSpace, Epoch] = {}

    def start(self) -> None:
        """Begin to report; an absent directory is tried again until it is there."""
        self._task = start_background(self._run(), what="reports to the pool's directory")

    async def close(self) -> None:
        """Leave the directory, as far as it can be told. Idempotent."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._task = None
        try:
            await self._directory.leave(self._node)
            # Nobody looks at them any more, but a directory of many hosts would keep them for ever.
            async with asyncio.timeout(TIDY_S):
                await self._directory.report(self._node, [], self._index.names())
        except TimeoutError:
            _log.info("the directory keeps entries of this node until they are looked up")
        except KVError as error:
            _log.info("the directory could not be told that this node leaves", cause=error.cause)

    async def catch_up(self, *, patient: bool = False) -> Epoch:
        """Compare the epochs of all spaces with the directory's; forget those in which a removal was missed.

        Args:
            patient: the node is live, so that it will be told of a removal which has just begun; it missed one whose
                epoch it does not know at the next patient look either.
        Returns: the latest epoch that the directory had.
        Raises: TransportError.
        """
        epochs, (latest, theirs, born) = self._index.epochs, await self._directory.epochs()
        waited, self._unknown = self._unknown, {}
        before, heard, agreed = epochs.all(), True, True
        for space, epoch in theirs.items():
            standing = epochs.compare(space, epoch)
            if standing == "missed" and patient and waited.get(space) != epoch:
                self._unknown[space], heard = epoch, False
            elif standing == "ahead":
                agreed &= await self._directory.change_epoch(space, epoch, epochs.current(space))
            elif standing != "same":
                # Other nodes may have missed what this one did not: an epoch that is new to all makes them forget.
                alone = standing == "forked" or epochs.may_be_alone(space, born)
                if standing == "missed":
                    self._forget(space, epoch)
                agreed &= not alone or await self._begin_anew(space, epoch)
        for space, epoch in epochs.all().items():
            if space not in theirs:
                agreed &= await self._directory.change_epoch(space, FIRST, epoch)
        news = epochs.all() != before
        if heard and agreed and (epochs.agreed_with != born or epochs.own):
            epochs.agreed(born)
            news = True
        if news:
            await self._on_epochs()
        return latest

    def _forget(self, space: BlockSpace, epoch: Epoch) -> None:
        forgotten = self._index.apply_removal(space, None, epoch=epoch)
        if forgotten:
            self._counts["removals_missed"] += 1
            _log.warning("a removal was missed; all of its space is forgotten",
                         namespace=space.namespace, blocks=len(forgotten))  # fmt: skip

    async def _begin_anew(self, space: BlockSpace, theirs: Epoch) -> bool:
        previous, merged = self._index.epochs.current(space), new_epoch()
        if not await self._directory.change_epoch(space, theirs, merged):
            return False
        self._index.apply_removal(space, [], previous=previous, epoch=merged)
        return True

    async def _run(self) -> None:
        renew_at_s = 0.0
        loop = asyncio.get_running_loop()
        while True:
            try:
                if loop.time() >= renew_at_s:
                    if self._joined and await self._directory.renew(self._node, self._ttl_s):
                        await self.catch_up(patient=True)
                    else:
                        await self._join()
                    renew_at_s = loop.time() + self._ttl_s / 3
                await self._report_changes()
                if not self._reachable:
                    _log.info("the directory is back")
                self._reachable = True
            except KVError as error:
                # What was under way may be told or not: all of it is told again.
                self._joined, renew_at_s = False, loop.time() + self._ttl_s / 3
                self._counts["directory_failures"] += 1
                if self._reachable:
                    _log.warning("the directory can't be told", cause=error.cause, error=str(error))
                self._reachable = False
                await asyncio.sleep(self._ttl_s / 3)
            await asyncio.sleep(FLUSH_S)

    async def _join(self) -> None:
        self._joined = False
        for _ in range(TRIES):
            # What is removed after this look, and before the node is visible, it would not be told of.
            seen = await self.catch_up()
            if await self._directory.join(self._node, self._address(), self._ttl_s, seen=seen):
                break
        else:
            raise TransportError("blocks are removed all the time; this node joins the directory later")
        self._on_joined()
        self._index.take_changes()
        names = self._index.names()
        await self._directory.report(self._node, names, [])
        self._joined = True
        _log.info("reported everything to the directory", blocks=len(names))

    async def _report_changes(self) -> None:
        changes = self._index.take_changes()
        if changes:
            added: list[BlockName] = [name for name, present in changes.items() if present]
            removed: list[BlockName] = [name for name, present in changes.items() if not present]
            await self._directory.report(self._node, added, removed)
