"""Several nodes as one pool, as an engine sees it.

Without a directory every node is asked what it has, which is for a small number of nodes. With one, this host's node is
asked, and the directory for the others. A get is served by the node with the longest prefix, this host's among equals,
so that what is near is not fetched over the network. A node that can't be asked counts as empty, and so does what the
directory says when it can't be asked, or is wrong.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from kvferry.errors import ConfigError, TransportError
from kvferry.observe import get_log
from kvferry.pool.client import GetResult, PoolClient, PutResult
from kvferry.pool.directory import Directory
from kvferry.pool.keys import Tier
from kvferry.pool.parts import BlockPart, Places
from kvferry.transport.base import Region

_log = get_log(__name__)


class PoolNodes:
    """A pool of several nodes as one engine sees it. Memory is registered with one of the clients, `home`."""

    def __init__(
        self,
        clients: Sequence[PoolClient],
        *,
        directory: Directory | None = None,
        connect: Callable[[str], PoolClient] | None = None,
    ) -> None:
        """
        Args:
            clients: one for each node, of one space, on one loop; the first is this host's. With a directory that one
                is enough.
            directory: tells which nodes hold what; its owner closes it.
            connect: makes a client, not started, for a node that the directory names; needed with one.
        Raises: ConfigError for no client, or clients of several spaces.
        """
        if not clients or len({client.space for client in clients}) != 1:
            raise ConfigError("a pool needs one client for each node, all of one model and namespace")
        self.home = clients[0]
        self._clients = list(clients)
        self._by_address = {client.address: client for client in clients}
        self._regions: dict[int, dict[PoolClient, Region]] = {}
        self._directory, self._connect = directory, connect
        self._growing = asyncio.Lock()

    async def start(self) -> None:
        """Be ready; nodes are looked for at the first call."""
        for client in self._clients:
            await client.start()

    async def close(self) -> None:
        """Part from all nodes. Idempotent."""
        for client in self._clients:
            await client.close()

    @property
    def failures(self) -> Counter[str]:
        """Calls that failed, by cause, over all nodes. May be read from any thread."""
        total: Counter[str] = Counter()
        for client in tuple(self._clients):
            total.update(dict(client.failures))
        return total

    def allocate(self, nbytes: int) -> Region:
        """Shared memory for blocks, known to all nodes' connections; `region.buffer` is uint8 [nbytes]."""
        return self._share(self.home.allocate(nbytes))

    def register(self, buffer: Any) -> Region:
        """Register memory for blocks (numpy or torch CPU, contiguous) with all nodes' connections."""
        return self._share(self.home.register(buffer))

    def _share(self, region: Region) -> Region:
        others = {client: client.register(region.buffer) for client in self._clients[1:]}
        self._regions[region.region_id] = {self.home: region, **others}
        return region

    async def exists(self, hashes: Sequence[bytes]) -> list[Tier | None]:
        """For each block the fastest tier in which any node holds it."""
        answers = list((await self._ask_all(hashes)).values())
        return answers[0] if len(answers) == 1 else [_fastest(tiers) for tiers in zip(*answers, strict=True)]

    async def longest_prefix(self, hashes: Sequence[bytes]) -> int:
        """How many of these blocks, from the first on, `get` would find now: one node must have them all."""
        return max(map(_prefix, (await self._ask_all(hashes)).values()))

    async def prefetch(self, hashes: Sequence[bytes]) -> int:
        """Let this host's node bring blocks from its disk, as `PoolClient.prefetch` does."""
        return await self.home.prefetch(hashes)

    async def get(self, hashes: Sequence[bytes], parts: Sequence[BlockPart], places: Places) -> GetResult:
        """Copy the longest prefix that a node has; arguments and result as those of `PoolClient.get`.

        Args:
            parts: in regions that `allocate` or `register` of this object gave.
        """
        if self._directory is None and len(self._clients) == 1:
            return await self.home.get(hashes, parts, places)
        answers = await self._ask_all(hashes)
        # Stable, and this host's node is the first: it comes before others that have as much.
        ranked = sorted(answers, key=lambda client: -_prefix(answers[client]))
        result = GetResult([False] * len(hashes))
        for client in ranked:
            if _prefix(answers[client]) <= result.num_prefix:
                break
            # The one before had less than was said of it, or is gone. Its blocks may be overwritten from here on.
            result = await client.get(hashes, self._parts_of(client, parts), places)
        return result

    async def put(
        self,
        hashes: Sequence[bytes],
        parts: Sequence[BlockPart],
        places: Places,
        *,
        first: int = 0,
        length: int = 0,
    ) -> PutResult:
        """Copy blocks into this host's node; arguments and result as those of `PoolClient.put`."""
        return await self.home.put(hashes, parts, places, first=first, length=length)

    async def remove(self, hashes: Sequence[bytes]) -> int:
        """Forget these blocks on every node; returns how many copies there were.

        Raises: TransportError, PoolError where a node, or the directory, can't be told. Some copies may be left then,
            until that node hears from the directory.
        """
        if self._directory is not None:
            # This host's node tells all others of its directory.
            return await self.home.remove(hashes)
        return sum(await asyncio.gather(*(client.remove(hashes) for client in self._clients)))

    def _parts_of(self, client: PoolClient, parts: Sequence[BlockPart]) -> list[BlockPart]:
        """The same memory as another node's connection names it."""
        return [msgspec.structs.replace(p, region=self._regions[p.region][client].region_id) for p in parts]

    async def _ask_all(self, hashes: Sequence[bytes]) -> dict[PoolClient, list[Tier | None]]:
        if self._directory is None:
            answers = await asyncio.gather(*(client.exists(hashes) for client in self._clients))
            return dict(zip(self._clients, answers, strict=True))
        here = await self.home.exists(hashes)
        if _prefix(here) == len(hashes):
            return {self.home: here}
        try:
            holders = await self._directory.lookup(self.home.space, hashes)
        except TransportError as error:
            _log.warning("the directory can't be asked; only this host's node is", cause=error.cause, error=str(error))
            return {self.home: here}
        found: dict[PoolClient, list[Tier | None]] = {self.home: here}
        for address in sorted(set().union(*holders)):
            client = await self._client_of(address)
            if client is not self.home:
                # A node says itself in which tier a block is, when it is asked for it.
                found[client] = [Tier.HOST if address in nodes else None for nodes in holders]
        return found

    async def _client_of(self, address: str) -> PoolClient:
        async with self._growing:
            client = self._by_address.get(address)
            if client is None:
                assert self._connect is not None, "a pool with a directory needs `connect`"
                client = self._connect(address)
                await client.start()
                for regions in self._regions.values():
                    regions[client] = client.register(regions[self.home].buffer)
                self._clients.append(client)
                self._by_address[address] = client
            return client


def _prefix(tiers: list[Tier | None]) -> int:
    return next((i for i, tier in enumerate(tiers) if tier is None), len(tiers))


def _fastest(tiers: tuple[Tier | None, ...]) -> Tier | None:
    return Tier.HOST if Tier.HOST in tiers else Tier.DISK if Tier.DISK in tiers else None
