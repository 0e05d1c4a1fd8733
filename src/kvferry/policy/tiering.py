"""Which blocks of the host tier are also written to disk, and which come back before they are asked for. Pure."""

from __future__ import annotations

from typing import NamedTuple


class DiskLoad(NamedTuple):
    """How busy the disk is: bytes that wait to be written, and the most that may."""

    queued_bytes: int
    max_queued_bytes: int


def admit_to_disk(*, nbytes: int, depth: int, reuses: int, load: DiskLoad) -> bool:
    """Whether a block is worth its write now.

    An idle disk takes everything. As its queue fills it takes only what is likelier to serve again: blocks that were
    used again, and the beginnings of prompts, as all that follows needs them. A full queue takes nothing, so that
    puts never wait for a disk.

    Args:
        depth: the block's place in its prompt, from 0.
        reuses: how often it served a request.
    """
    filled = (load.queued_bytes + nbytes) / max(1, load.max_queued_bytes)
    if filled > 1:
        return False
    return filled <= 0.5 or reuses > 0 or depth < 8


def admit_prefetch(*, wanted: int, num_slabs: int, num_loading: int, waiting_gets: int) -> int:
    """How many of `wanted` blocks, which somebody may ask for soon, are brought from disk into host memory now.

    At most a quarter of the memory is on its way at once, as what comes in makes other blocks leave. While gets wait
    for the disk themselves nothing is fetched ahead of them.
    """
    if waiting_gets:
        return 0
    return max(0, min(wanted, max(1, num_slabs // 4) - num_loading))
