"""Removing blocks from all nodes of a directory: the node that is asked to tells the others.

The directory's epoch of the space is changed first, so that whoever is not reached sees at its next renewal that it
missed something. What is removed here leaves the disk, too, before the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from kvferry.errors import KVError, PoolError, TransportError
from kvferry.observe import get_log
from kvferry.pool.epochs import FIRST, Epoch, new_epoch
from kvferry.pool.index import BlockIndex
from kvferry.pool.keys import BlockSpace
from kvferry.pool.messages import Counted
from kvferry.pool.neighbours import Cluster
from kvferry.pool.node_messages import Forget

TRIES = 8
TELL_S = 2.0
TOLD_WITHIN_S = 0.4
_log = get_log(__name__)


class Removals:
    """One node's removals, its own and those that it is told of. On the node's event loop."""

    def __init__(self, index: BlockIndex, forgotten: Callable[[], Awaitable[None]], cluster: Cluster | None) -> None:
        """
        Args:
            forgotten: called after blocks were forgotten; returns when no copy of them is left on this node's disk.
        """
        self._index, self._forgotten, self._cluster = index, forgotten, cluster
        self._turns = asyncio.Lock()

    async def remove(self, space: BlockSpace, hashes: Sequence[bytes] | None) -> int:
        """Remove blocks (all of the space for None) everywhere; returns how many copies there were.

        Raises: PoolError where a node, or the directory, could not be told. It forgets all of the space as soon as it
        hears from the directory.
        """
        async with self._turns:
            if self._cluster is None:
                return await self._here(space, hashes)
            count, untold = 0, list[str]()
            for _ in range(TRIES):
                previous, epoch = await self._begin(space, hashes)
                count += await self._here(space, hashes, previous, epoch)
                copies, untold = await self._tell_all(Forget(0, space, _listed(hashes), previous, epoch))
                count += copies
                # A directory that was lost meanwhile, or another removal, may have hidden this one from those who
                # were not told: then it is begun again.
                if self._index.epochs.descends(space, await self._known_epoch(space), epoch):
                    break
            else:
                raise PoolError("others remove blocks of this namespace all the time; try again", stage="remove")
            if untold:
                raise PoolError(
                    f"{count} copies are removed, and {len(untold)} nodes could not be told ({', '.join(untold)}): "
                    "they forget the namespace as soon as they hear from the directory",
                    stage="remove",
                )
            return count

    async def told(self, forget: Forget) -> int:
        """Another node removes blocks; returns how many there were here."""
        return await self._here(forget.space, forget.hashes, Epoch(forget.previous), Epoch(forget.epoch))

    async def _here(
        self,
        space: BlockSpace,
        hashes: Sequence[bytes] | None,
        previous: Epoch | None = None,
        epoch: Epoch | None = None,
    ) -> int:
        removed = self._index.apply_removal(space, hashes, previous=previous, epoch=epoch)
        await self._forgotten()
        return len(removed)

    async def _begin(self, space: BlockSpace, hashes: Sequence[bytes] | None) -> tuple[Epoch, Epoch]:
        assert self._cluster is not None
        try:
            for _ in range(TRIES):
                theirs = await self._known_epoch(space)
                previous, epoch = self._index.epochs.current(space), new_epoch()
                if await self._cluster.directory.change_epoch(space, theirs, epoch):
                    return previous, epoch
        except TransportError as error:
            await self._here(space, hashes)
            raise PoolError(
                f"the directory can't be asked ({error.message}): the blocks are removed from this node, and the "
                "others forget the namespace when the directory is back",
                stage="remove",
            ) from error
        raise PoolError("others remove blocks of this namespace all the time; try again", stage="remove")

    async def _known_epoch(self, space: BlockSpace) -> Epoch:
        """The directory's epoch; one that this node is still being told of is waited for, or the space is forgotten."""
        assert self._cluster is not None
        for _ in range(TRIES):
            theirs = await self._epoch(space)
            standing = self._index.epochs.compare(space, theirs)
            if standing in ("same", "ahead"):
                return theirs
            if standing == "forked":
                break
            await asyncio.sleep(TOLD_WITHIN_S / TRIES)
        await self._cluster.reporter.catch_up()
        return self._index.epochs.current(space)

    async def _epoch(self, space: BlockSpace) -> Epoch:
        assert self._cluster is not None
        return (await self._cluster.directory.epochs()).spaces.get(space, FIRST)

    async def _tell_all(self, forget: Forget) -> tuple[int, list[str]]:
        """Tell every live node, those that join meanwhile too. Returns: copies that there were, nodes not told."""
        assert self._cluster is not None
        count, told, untold = 0, set[str](), list[str]()
        while True:
            new = [address for address in await self._cluster.neighbours.addresses() if address not in told]
            if not new:
                return count, untold
            for address, copies in zip(new, await asyncio.gather(*(self._tell(a, forget) for a in new)), strict=True):
                told.add(address)
                if copies is None:
                    untold.append(address)
                else:
                    count += copies

    async def _tell(self, address: str, forget: Forget) -> int | None:
        assert self._cluster is not None
        neighbours = self._cluster.neighbours
        message = Forget(neighbours.new_id(), forget.space, forget.hashes, forget.previous, forget.epoch)
        try:
            peer = await neighbours.connect(address, deadline_s=TELL_S)
            return (await neighbours.ask(peer, message, Counted, deadline_s=TELL_S)).count
        except KVError as error:
            _log.warning("a node could not be told of a removal", node=address, cause=error.cause, error=str(error))
            return None


def _listed(hashes: Sequence[bytes] | None) -> list[bytes] | None:
    return None if hashes is None else list(hashes)
