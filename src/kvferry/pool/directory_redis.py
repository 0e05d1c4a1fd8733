"""The directory in Redis, for nodes of many hosts.

`kvferry:node:INCARNATION` holds a node's address and expires with its lease; `kvferry:nodes` is the set of the
incarnations that joined; `kvferry:block:SPACE:HASH` is the set of those that reported the block. Members of dead nodes
are passed over, and removed when a lookup meets them. `kvferry:epochs` holds each space's epoch, the latest of all
under no name, and the number that the directory was born with.

A lookup is one script that makes the blocks' keys itself, which is for one server and no cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as ConnectionLost
from redis.exceptions import RedisError

from kvferry.errors import ConfigError, TransportError
from kvferry.pool.directory import BlockName, Directory, KnownEpochs
from kvferry.pool.epochs import FIRST, Epoch, new_epoch
from kvferry.pool.keys import BlockSpace
from kvferry.types import Incarnation

BATCH = 5000
NODE, NODES, EPOCHS = "kvferry:node:", "kvferry:nodes", "kvferry:epochs"
BORN = b"born"
_holders = msgspec.msgpack.Decoder(list[tuple[int, ...]])

HOLDERS = """
local size, hashes = tonumber(ARGV[1]), ARGV[2]
local numbers, nodes, addresses, holders = {}, {}, {}, {}
for first = 1, #hashes, size do
  local members = redis.call('SMEMBERS', KEYS[1] .. string.sub(hashes, first, first + size - 1))
  for i, node in ipairs(members) do
    if not numbers[node] then
      nodes[#nodes + 1] = node
      addresses[#nodes] = redis.call('GET', KEYS[2] .. node)
      numbers[node] = #nodes
    end
    members[i] = numbers[node] - 1
  end
  holders[#holders + 1] = members
end
return {nodes, addresses, cmsgpack.pack(holders)}
"""
"""One command for a thousand blocks, their hashes in one argument and their holders, as places in the list of nodes, in
one string: as many arguments and arrays took redis-py five times as long, as many commands ten times."""

FORGET_DEAD = """
if redis.call('EXISTS', KEYS[1]) == 0 then
  for i = 2, #KEYS do redis.call('SREM', KEYS[i], ARGV[1]) end
end
"""
"""A node that lives again meanwhile keeps its entries: it joins before it reports."""

JOIN = """
if (redis.call('HGET', KEYS[1], '') or '0') ~= ARGV[1] then return 0 end
redis.call('SADD', KEYS[2], ARGV[2])
redis.call('SET', KEYS[3], ARGV[3], 'PX', ARGV[4])
return 1
"""

CHANGE_EPOCH = """
if (redis.call('HGET', KEYS[1], ARGV[1]) or '0') ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3], '', ARGV[3])
return 1
"""


class RedisDirectory(Directory):
    """One connection pool to one Redis server."""

    def __init__(self, url: str, *, timeout_s: float = 2.0) -> None:
        """
        Args:
            url: `redis://host:port/number`, or `rediss://` with TLS.
            timeout_s: for one command, or one batch of a report.
        Raises: ConfigError for a URL that is none.
        """
        self._url, self._timeout_s = url, timeout_s
        try:
            self._redis: Any = redis.asyncio.Redis.from_url(
                url,
                # Deadlines are `_asked`'s: redis-py's own stands on `asyncio.wait_for`, which before Python 3.12 loses
                # a cancellation that comes as the command has been sent, and with it every deadline around the call.
                socket_timeout=None,
                socket_connect_timeout=timeout_s,
                # Once more at once where a connection had been lost; redis-py's own retries would wait for long.
                retry=Retry(NoBackoff(), 1, supported_errors=(ConnectionLost,)),
            )
        except ValueError as error:
            raise ConfigError(f"the directory's URL {url!r} is none: {error}; write redis://host:6379/0") from error
        self._prefixes: dict[BlockSpace, bytes] = {}

    async def renew(self, node: Incarnation, ttl_s: float) -> bool:
        async with self._asked():
            return bool(await self._redis.pexpire(_node_key(node), int(1000 * ttl_s)))

    async def join(self, node: Incarnation, address: str, ttl_s: float, *, seen: Epoch = FIRST) -> bool:
        keys = EPOCHS, NODES, _node_key(node)
        async with self._asked():
            return bool(await self._redis.eval(JOIN, 3, *keys, seen, f"{node:x}", address, int(1000 * ttl_s)))

    async def report(self, node: Incarnation, added: Sequence[BlockName], removed: Sequence[BlockName]) -> None:
        member = f"{node:x}"
        for command, names in (("srem", removed), ("sadd", added)):
            for first in range(0, len(names), BATCH):
                async with self._asked(), self._redis.pipeline(transaction=False) as pipeline:
                    call = getattr(pipeline, command)
                    for space, block_hash in names[first : first + BATCH]:
                        call(self._prefix(space) + block_hash, member)
                    await pipeline.execute()

    async def leave(self, node: Incarnation) -> None:
        async with self._asked(), self._redis.pipeline() as pipeline:
            pipeline.delete(_node_key(node))
            pipeline.srem(NODES, f"{node:x}")
            await pipeline.execute()

    async def lookup(self, space: BlockSpace, hashes: Sequence[bytes]) -> list[tuple[str, ...]]:
        if not hashes:
            return []
        # Nobody reports a block without a hash, and the script would look for it for ever.
        found: dict[bytes, tuple[str, ...]] = {b"": ()}
        async with self._asked():
            for size in set(map(len, hashes)) - {0}:
                found |= await self._lookup(self._prefix(space), size, [h for h in hashes if len(h) == size])
        return list(map(found.__getitem__, hashes))

    async def _lookup(self, prefix: bytes, size: int, hashes: Sequence[bytes]) -> dict[bytes, tuple[str, ...]]:
        nodes, told, packed = await self._redis.eval(HOLDERS, 2, prefix, NODE, size, b"".join(hashes))
        holders = _holders.decode(packed)
        for number, node in enumerate(nodes):
            if told[number] is None:
                keys = [prefix + h for h, numbers in zip(hashes, holders, strict=True) if number in numbers]
                await self._forget(node, keys)
        addresses = {
            numbers: tuple(sorted(told[n].decode() for n in numbers if told[n] is not None)) for numbers in set(holders)
        }
        return dict(zip(hashes, map(addresses.__getitem__, holders), strict=True))

    async def nodes(self) -> dict[Incarnation, str]:
        async with self._asked():
            joined = sorted(await self._redis.smembers(NODES))
            addresses = await self._addresses(joined)
            for node in joined:
                if node not in addresses:
                    await self._forget(node, [NODES])
            return {Incarnation(int(node, 16)): address for node, address in addresses.items()}

    async def epochs(self) -> KnownEpochs:
        async with self._asked(), self._redis.pipeline() as pipeline:
            pipeline.hsetnx(EPOCHS, BORN, new_epoch())
            pipeline.hgetall(EPOCHS)
            found: dict[bytes, bytes] = (await pipeline.execute())[1]
            latest, born = Epoch(int(found.pop(b"", FIRST))), Epoch(int(found.pop(BORN)))
            spaces = {msgspec.msgpack.decode(space, type=BlockSpace): Epoch(int(e)) for space, e in found.items()}
            return KnownEpochs(latest, spaces, born)

    async def change_epoch(self, space: BlockSpace, old: Epoch, new: Epoch) -> bool:
        async with self._asked():
            return bool(await self._redis.eval(CHANGE_EPOCH, 1, EPOCHS, msgspec.msgpack.encode(space), old, new))

    async def close(self) -> None:
        with contextlib.suppress(RedisError):
            await self._redis.aclose()

    async def _addresses(self, nodes: Sequence[bytes]) -> dict[bytes, str]:
        """Those that live."""
        found = await self._redis.mget([NODE.encode() + node for node in nodes]) if nodes else []
        return {node: address.decode() for node, address in zip(nodes, found, strict=True) if address is not None}

    async def _forget(self, node: bytes, keys: Sequence[str | bytes]) -> None:
        await self._redis.eval(FORGET_DEAD, 1 + len(keys), NODE.encode() + node, *keys, node)

    def _prefix(self, space: BlockSpace) -> bytes:
        prefix = self._prefixes.get(space)
        if prefix is None:
            # Hashed, so that no namespace can be written that runs into another one's keys.
            digest = hashlib.sha256(msgspec.msgpack.encode(space)).hexdigest()[:32]
            prefix = self._prefixes[space] = f"kvferry:block:{digest}:".encode()
        return prefix

    @contextlib.asynccontextmanager
    async def _asked(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._timeout_s):
                yield
        except (ValueError, msgspec.MsgspecError) as error:
            why = f"{type(error).__name__}: {error}"
            raise TransportError(
                f"the directory {self._url} holds what kvferry did not write ({why}): look at its keys kvferry:*",
                peer=self._url,
            ) from error
        except (RedisError, OSError, TimeoutError) as error:
            why = str(error) or f"nothing came within {self._timeout_s:g} s"
            raise TransportError(f"the directory {self._url} did not answer: {why}", peer=self._url) from error


def _node_key(node: Incarnation) -> str:
    return f"{NODE}{node:x}"
