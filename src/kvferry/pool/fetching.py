"""A get's bytes on their way out of a node's arena; what comes over a network is held against the node's digests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence

import numpy as np

from kvferry.errors import IntegrityError, TransportError
from kvferry.layout import Offsets
from kvferry.pool.messages import Leased
from kvferry.pool.parts import BlockPart, block_digests, part_runs
from kvferry.transfer import Peer, TransferEngine
from kvferry.transport.base import BlockList, Guard, Region

SAME_MEMORY = ("inproc", "shm")


async def fetch_blocks(
    engine: TransferEngine,
    peer: Peer,
    lease: Leased,
    *,
    parts: Sequence[BlockPart],
    places: Offsets,
    regions: Mapping[int, Region],
    until_s: float,
) -> str:
    """Copy all blocks of a lease to their places here; returns the transport that did.

    Args:
        places: int64 [blocks of the lease], where each goes, as `parts` count.
        regions: those of the parts, by id.
        until_s: on the monotonic clock.
    Raises: as `TransferEngine.read`; IntegrityError where a block that arrived is not the one that the node holds.
    After failure or cancellation: the places hold unspecified bytes; no further byte will land.
    """
    arena = peer.regions.get(lease.arena)
    if arena is None:
        raise TransportError("the node does not offer its arena (any more)", peer=peer.name)
    blocks = [
        BlockList(arena, regions[run.region], run.pool_offsets, run.offsets, run.nbytes)
        for run in part_runs(parts, places, np.asarray(lease.offsets, dtype=np.int64))
    ]
    guard = Guard(lease.arena, lease.word_offset, lease.word)
    done = await engine.read(peer, blocks, guard=guard, deadline_s=max(0.001, until_s - time.monotonic()))
    if done.transport not in SAME_MEMORY:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, _verify, parts, places, regions, lease.digests)
    return done.transport or ""


def _verify(parts: Sequence[BlockPart], places: Offsets, regions: Mapping[int, Region], digests: list[int]) -> None:
    seen = block_digests(parts, places, {part.region: regions[part.region].address for part in parts})
    wrong = next((place for place, a, b in zip(places.tolist(), seen, digests, strict=True) if a != b), None)
    if wrong is not None:
        raise IntegrityError(f"the block that arrived at place {wrong} is not the one that the node holds")
