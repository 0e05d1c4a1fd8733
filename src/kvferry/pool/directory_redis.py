"""The directory in Redis, for nodes of many hosts.

`kvferry:node:INCARNATION` holds a node's address and expires with its lease; `kvferry:block:SPACE:HASH` is the set of
the incarnations that reported the block. Members of dead nodes are passed over, and removed when a lookup meets them.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import redis.asyncio
from redis.exceptions import RedisError

from kvferry.errors import ConfigError, TransportError
from kvferry.pool.directory import BlockName, Directory
from kvferry.pool.keys import BlockSpace
from kvferry.types import Incarnation

BATCH = 5000


class RedisDirectory(Directory):
    """One connection pool to one Redis server."""

    def __init__(self, url: str, *, timeout_s: float = 2.0) -> None:
        """
        Args:
            url: `redis://host:port/number`, or `rediss://` with TLS.
        Raises: ConfigError for a URL that is none.
        """
        self._url = url
        try:
            self._redis: Any = redis.asyncio.Redis.from_url(
                url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s
            )
        except ValueError as error:
            raise ConfigError(f"the directory's URL {url!r} is none: {error}; write redis://host:6379/0") from error
        self._prefixes: dict[BlockSpace, bytes] = {}

    async def renew(self, node: Incarnation, ttl_s: float) -> bool:
        with self._errors():
            return bool(await self._redis.pexpire(_node_key(node), int(1000 * ttl_s)))

    async def join(self, node: Incarnation, address: str, ttl_s: float) -> None:
        with self._errors():
            await self._redis.set(_node_key(node), address, px=int(1000 * ttl_s))

    async def report(self, node: Incarnation, added: Sequence[BlockName], removed: Sequence[BlockName]) -> None:
        member = f"{node:x}"
        with self._errors():
            for command, names in (("srem", removed), ("sadd", added)):
                for first in range(0, len(names), BATCH):
                    async with self._redis.pipeline(transaction=False) as pipeline:
                        call = getattr(pipeline, command)
                        for space, block_hash in names[first : first + BATCH]:
                            call(self._prefix(space) + block_hash, member)
                        await pipeline.execute()

    async def leave(self, node: Incarnation) -> None:
        with self._errors():
            await self._redis.delete(_node_key(node))

    async def lookup(self, space: BlockSpace, hashes: Sequence[bytes]) -> list[tuple[str, ...]]:
        if not hashes:
            return []
        prefix = self._prefix(space)
        with self._errors():
            async with self._redis.pipeline(transaction=False) as pipeline:
                for block_hash in hashes:
                    pipeline.smembers(prefix + block_hash)
                holders: list[set[bytes]] = await pipeline.execute()
            nodes = sorted(set().union(*holders))
            found = await self._redis.mget([b"kvferry:node:" + node for node in nodes]) if nodes else []
            addresses = {n: address.decode() for n, address in zip(nodes, found, strict=True) if address is not None}
            dead = [node for node in nodes if node not in addresses]
            if dead:
                await self._forget(prefix, hashes, holders, set(dead))
        return [tuple(sorted(addresses[n] for n in members if n in addresses)) for members in holders]

    async def close(self) -> None:
        with contextlib.suppress(RedisError):
            await self._redis.aclose()

    async def _forget(
        self, prefix: bytes, hashes: Sequence[bytes], holders: Sequence[set[bytes]], dead: set[bytes]
    ) -> None:
        # A node that only lost its lease reports all it has before it joins again, so nothing is lost by this.
        async with self._redis.pipeline(transaction=False) as pipeline:
            for block_hash, members in zip(hashes, holders, strict=True):
                gone = members & dead
                if gone:
                    pipeline.srem(prefix + block_hash, *gone)
            await pipeline.execute()

    def _prefix(self, space: BlockSpace) -> bytes:
        prefix = self._prefixes.get(space)
        if prefix is None:
            # Hashed, so that no namespace can be written that runs into another one's keys.
            digest = hashlib.sha256(msgspec.msgpack.encode(space)).hexdigest()[:32]
            prefix = self._prefixes[space] = f"kvferry:block:{digest}:".encode()
        return prefix

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (RedisError, OSError, TimeoutError) as error:
            raise TransportError(f"the directory {self._url} did not answer: {error}", peer=self._url) from error


def _node_key(node: Incarnation) -> str:
    return f"kvferry:node:{node:x}"
