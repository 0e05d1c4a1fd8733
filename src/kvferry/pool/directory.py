"""Who holds what: the contract of a directory, and the embedded one. A hint: the node that is named decides.

A node is known by its incarnation, so that a node that starts again is another one and inherits nothing. It holds a
lease; without one its entries count for nothing. A directory that lost everything, or a node whose lease lapsed, shows
in `renew`, upon which the node joins again and reports all that it has. The directory also keeps each space's epoch
(kvferry.pool.epochs), which no lease ends.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import NamedTuple

from kvferry.clock import Clock, RealClock
from kvferry.pool.epochs import FIRST, Epoch, new_epoch
from kvferry.pool.keys import BlockSpace
from kvferry.types import Incarnation

BlockName = tuple[BlockSpace, bytes]


class KnownEpochs(NamedTuple):
    """The `latest` epoch of all, the current one of each space, and the number that the directory was born with: one
    that was lost comes back with another."""

    latest: Epoch
    spaces: dict[BlockSpace, Epoch]
    born: Epoch


class Directory(abc.ABC):
    """Where nodes report and clients look up. All calls are batches. After a failure they may be repeated."""

    @abc.abstractmethod
    async def renew(self, node: Incarnation, ttl_s: float) -> bool:
        """Prolong the node's lease. False: it has none; `join`, then report everything.

        Raises: TransportError if the directory can't be reached; so do all calls.
        """

    @abc.abstractmethod
    async def join(self, node: Incarnation, address: str, ttl_s: float, *, seen: Epoch = FIRST) -> bool:
        """Make the node visible for `ttl_s`, with what it reported and reports.

        Args:
            seen: the latest epoch that the node saw. False, and nothing is done, where there is a later one: who
                removes blocks tells those that are visible, and who becomes visible has heard of all removals before.
        """

    @abc.abstractmethod
    async def report(self, node: Incarnation, added: Sequence[BlockName], removed: Sequence[BlockName]) -> None:
        """What the node has now and had not, and the other way round."""

    @abc.abstractmethod
    async def leave(self, node: Incarnation) -> None:
        """The node is gone for good."""

    @abc.abstractmethod
    async def lookup(self, space: BlockSpace, hashes: Sequence[bytes]) -> list[tuple[str, ...]]:
        """For each block the addresses of the live nodes that reported it."""

    @abc.abstractmethod
    async def nodes(self) -> dict[Incarnation, str]:
        """The live nodes with their addresses."""

    @abc.abstractmethod
    async def epochs(self) -> KnownEpochs:
        """Of each space in which something was removed, as far as this directory knows."""

    @abc.abstractmethod
    async def change_epoch(self, space: BlockSpace, old: Epoch, new: Epoch) -> bool:
        """Replace the space's epoch. False, and nothing is changed, where `old` is not the current one."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Give connections back. Idempotent."""


class EmbeddedDirectory(Directory):
    """For nodes and clients of one process. Loses everything with it."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or RealClock()
        self._nodes: dict[Incarnation, tuple[str, float]] = {}
        self._holders: dict[BlockName, set[Incarnation]] = {}
        self._epochs: dict[BlockSpace, Epoch] = {}
        self._latest, self._born = FIRST, new_epoch()

    async def renew(self, node: Incarnation, ttl_s: float) -> bool:
        known = self._nodes.get(node)
        if known is None or known[1] <= self._clock.now_s():
            return False
        self._nodes[node] = known[0], self._clock.now_s() + ttl_s
        return True

    async def join(self, node: Incarnation, address: str, ttl_s: float, *, seen: Epoch = FIRST) -> bool:
        if seen != self._latest:
            return False
        self._nodes[node] = address, self._clock.now_s() + ttl_s
        return True

    async def report(self, node: Incarnation, added: Sequence[BlockName], removed: Sequence[BlockName]) -> None:
        for name in removed:
            self._drop(name, node)
        for name in added:
            self._holders.setdefault(name, set()).add(node)

    async def leave(self, node: Incarnation) -> None:
        self._nodes.pop(node, None)
        for name in [name for name, holders in self._holders.items() if node in holders]:
            self._drop(name, node)

    async def lookup(self, space: BlockSpace, hashes: Sequence[bytes]) -> list[tuple[str, ...]]:
        live = await self.nodes()
        found = (self._holders.get((space, block_hash), ()) for block_hash in hashes)
        return [tuple(sorted(live[node] for node in holders if node in live)) for holders in found]

    async def nodes(self) -> dict[Incarnation, str]:
        now_s = self._clock.now_s()
        return {node: address for node, (address, until_s) in self._nodes.items() if until_s > now_s}

    async def epochs(self) -> KnownEpochs:
        return KnownEpochs(self._latest, dict(self._epochs), self._born)

    async def change_epoch(self, space: BlockSpace, old: Epoch, new: Epoch) -> bool:
        if self._epochs.get(space, FIRST) != old:
            return False
        self._epochs[space] = self._latest = new
        return True

    async def close(self) -> None:
        pass

    def _drop(self, name: BlockName, node: Incarnation) -> None:
        holders = self._holders.get(name)
        if holders is not None:
            holders.discard(node)
            if not holders:
                del self._holders[name]
