"""A put's bytes on their way into the arena: copied out of the client's memory, and digested while a cache holds them.

The digest is taken of the client's bytes where they are mapped here. The copy has just brought these into a cache; what
it wrote bypassed the caches, and would have to come from memory once more. The client's word is looked at after both:
until it changes, the client's bytes do not.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Executor

from kvferry.errors import LeaseExpired, RegistrationError
from kvferry.layout import Offsets
from kvferry.pool.arena import Arena
from kvferry.pool.parts import BlockPart, block_bytes, block_digests, part_runs, whole
from kvferry.transfer import Peer, TransferEngine
from kvferry.transport.base import BlockList, Guard, RemoteRegion

STEP_BYTES = 8 << 20
"""How much is copied before its digests are taken, and between two looks at the client's word: it fits a cache, and a
put that was given up ends soon."""


def pull_blocks(
    engine: TransferEngine,
    peer: Peer,
    arena: Arena,
    *,
    parts: Sequence[BlockPart],
    places: Offsets,
    slabs: list[int],
    guard: Guard,
    deadline_s: float,
    helpers: Executor,
) -> list[int]:
    """Copy blocks from the client's memory into slabs. Blocks; on a thread that is no event loop's.

    Args:
        places: int64 [num_blocks], where each block lies at the client, as `parts` count.
        guard: the client's word; what was copied counts only while it stands.
        helpers: gives one more thread, if it has one left, for what takes several steps.
    Returns: the xxh3-64 of each block.
    Raises: as `TransferEngine.read`. After failure the slabs hold unspecified bytes; no further byte will land.
    """
    until_s = time.monotonic() + deadline_s
    sources = {part.region: _region(peer, part.region) for part in parts}
    views = {region: engine.mapped(peer, region) for region in sources}
    # They are kept, with their addresses, until the last digest is taken.
    mapped = {region: int(view.ctypes.data) for region, view in views.items() if view is not None}
    near = len(mapped) == len(sources)
    in_arena = whole(arena.region, block_bytes(parts))
    step = max(1, STEP_BYTES // block_bytes(parts)) if near else len(slabs)
    digests = [0] * len(slabs)
    # Threads may share an iterator of a range.
    left = iter(range(0, len(slabs), step))

    def pull_what_is_left() -> None:
        for first in left:
            here = slice(first, first + step)
            offsets = arena.offsets(slabs[here])
            blocks = [
                BlockList(sources[run.region], arena.region, run.offsets, run.pool_offsets, run.nbytes)
                for run in part_runs(parts, places[here], offsets)
            ]
            left_s = max(0.001, until_s - time.monotonic())
            if near:
                engine.read_sync(peer, blocks, deadline_s=left_s)
                digests[here] = block_digests(parts, places[here], mapped)
                if engine.load_word_sync(peer, guard.region_id, guard.offset, deadline_s=left_s) != guard.word:
                    raise LeaseExpired("the client took its word back while its blocks were copied", peer=peer.name)
            else:
                engine.read_sync(peer, blocks, guard=guard, deadline_s=left_s)
                digests[here] = block_digests(in_arena, offsets, {arena.region.region_id: arena.region.address})

    helping = helpers.submit(pull_what_is_left) if step < len(slabs) else None
    try:
        pull_what_is_left()
    finally:
        for _ in left:
            pass  # After a failure nobody begins another step.
        # Begun, it may be in the middle of one; else it has nothing to do any more.
        if helping is not None and not helping.cancel():
            helping.result()
    return digests


def _region(peer: Peer, region_id: int) -> RemoteRegion:
    region = peer.regions.get(region_id)
    if region is None:
        raise RegistrationError(f"you took region {region_id} back while its blocks were to be copied", peer=peer.name)
    return region
