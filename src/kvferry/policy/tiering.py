"""Which blocks of the host tier are also written to disk. Pure."""

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
