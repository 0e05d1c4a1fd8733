"""A get's bytes on their way out of a node's arena; what comes over a network is held against the node's digests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence

import numpy as np

from kvferry.errors import IntegrityError, TransportError
from kvferry.layout import Offsets
from kvferry.pool.messages import Leased
from kvferry.pool.parts import BlockPart, block_bytes, block_digests, part_runs
from kvferry.transfer import Peer, TransferEngine
from kvferry.transport.base import BlockList, Guard, Region

SAME_MEMORY = ("inproc", "shm")
STEP_BYTES = 32 << 20
STEPS_AT_ONCE = 2
"""What comes over a network comes in two steps at once, each on a stream of its own, and the digests of one are taken
while another arrives: with one step at a time a core of two waits for the other."""

LEAST_STEP_BYTES = 16 << 20
"""Beginning a step costs as much as moving a megabyte or two."""


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
    loop = asyncio.get_running_loop()
    offsets = np.asarray(lease.offsets, dtype=np.int64)
    guard = Guard(lease.arena, lease.word_offset, lease.word)
    near = next((way.scheme for way in engine.explain(peer) if way.usable), "") in SAME_MEMORY
    step = len(offsets) if near else _step(len(offsets), block_bytes(parts))
    # Tasks may share an iterator of a range.
    left = iter(range(0, len(offsets), step))
    transports = [""]

    async def fetch_what_is_left() -> None:
        for first in left:
            here = slice(first, first + step)
            blocks = [
                BlockList(arena, regions[run.region], run.pool_offsets, run.offsets, run.nbytes)
                for run in part_runs(parts, places[here], offsets[here])
            ]
            done = await engine.read(peer, blocks, guard=guard, deadline_s=max(0.001, until_s - time.monotonic()))
            transports.append(done.transport)
            if done.transport not in SAME_MEMORY:
                await loop.run_in_executor(None, _verify, parts, places[here], regions, lease.digests[here])

    if step >= len(offsets):
        await fetch_what_is_left()
        return transports[-1]
    try:
        # Both have stopped when it is left, whatever ended one of them.
        async with asyncio.TaskGroup() as group:
            for _ in range(min(STEPS_AT_ONCE, -(-len(offsets) // step))):
                group.create_task(fetch_what_is_left())
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from failures
    return transports[-1]


def _step(num_blocks: int, nbytes: int) -> int:
    """How many of these blocks of `nbytes` one step brings."""
    even = -(-num_blocks // STEPS_AT_ONCE)
    return max(1, min(max(even, LEAST_STEP_BYTES // nbytes), STEP_BYTES // nbytes))


def _verify(parts: Sequence[BlockPart], places: Offsets, regions: Mapping[int, Region], digests: list[int]) -> None:
    seen = block_digests(parts, places, {part.region: regions[part.region].address for part in parts})
    wrong = next((place for place, a, b in zip(places.tolist(), seen, digests, strict=True) if a != b), None)
    if wrong is not None:
        raise IntegrityError(f"the block that arrived at place {wrong} is not the one that the node holds")
