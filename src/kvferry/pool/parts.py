"""Blocks in parts: where the bytes of a block lie at an engine, as one piece a layer, in one region or in several.

In the pool a block is one run of bytes, the concatenation of its parts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
import xxhash
from msgspec import Meta

from kvferry.errors import RegistrationError
from kvferry.layout import KVLayout, Offsets
from kvferry.transport.base import Region, RemoteRegion

Size = Annotated[int, Meta(ge=0, le=1 << 50)]
"""Bytes, offsets and counts that a peer may name: what is larger is no message."""

Places = Offsets | Sequence[int]


class BlockPart(msgspec.Struct, frozen=True, array_like=True):
    """One part of each block: for the block at place p, `nbytes` from `base + p * stride` of `region` (its id)."""

    region: Size
    base: Size
    stride: Size
    nbytes: Size


class PartRun(NamedTuple):
    """Equal pieces of blocks: `nbytes` at each of `offsets` in `region` are those at each of `pool_offsets`."""

    region: int
    nbytes: int
    offsets: Offsets
    pool_offsets: Offsets


class Piece(NamedTuple):
    """Some blocks of a list, number `first` up to `stop`: int64 places [stop - first], as `parts` count."""

    first: int
    stop: int
    parts: Sequence[BlockPart]
    places: Offsets


def whole(region: Region, nbytes: int) -> tuple[BlockPart, ...]:
    """Blocks of one part, whose places are their byte offsets in the region."""
    return (BlockPart(region.region_id, 0, 1, nbytes),)


def parts_of(layout: KVLayout, region_ids: Mapping[int, int]) -> tuple[BlockPart, ...]:
    """Blocks of one part a layer, whose places are block ids.

    Args:
        region_ids: ids of the registered regions by the layout's own.
    """
    return tuple(
        BlockPart(region_ids[layer.region], layer.base, layer.block_stride, layout.block_bytes)
        for layer in layout.layers
    )


def block_bytes(parts: Sequence[BlockPart]) -> int:
    """The size of a block with these parts."""
    return sum(part.nbytes for part in parts)


def require_inside(
    parts: Sequence[BlockPart], places: Offsets, regions: Mapping[int, Region] | Mapping[int, RemoteRegion]
) -> None:
    """Raises: RegistrationError unless there are parts, and each part of each block lies wholly in its region."""
    if not parts or any(part.nbytes < 1 for part in parts):
        raise RegistrationError(f"blocks of {len(parts)} parts; a block has at least one, of at least one byte")
    low, high = (int(places.min()), int(places.max())) if len(places) else (0, 0)
    for part in parts:
        region = regions.get(part.region)
        if region is None:
            raise RegistrationError(f"there is no region {part.region}; register the memory first")
        # In Python's integers: what overflows int64 must not come out as an offset that fits.
        stop = part.base + high * part.stride + part.nbytes
        if low < 0 or (len(places) and stop > region.nbytes):
            raise RegistrationError(
                f"blocks at places {low} to {high}, with a part of {part.nbytes} bytes from {part.base} in steps of "
                f"{part.stride}, leave a region of {region.nbytes} bytes"
            )


def part_runs(parts: Sequence[BlockPart], places: Offsets, pool_offsets: Offsets) -> list[PartRun]:
    """Which bytes at an engine are which in the pool.

    Args:
        places: int64 [num_blocks], the blocks' places at the engine.
        pool_offsets: int64 [num_blocks], where each block starts in the pool's region.
    Returns:
        A run for each region and size of part, so that one call of a transport moves many parts.
    """
    merged: dict[tuple[int, int], tuple[list[Offsets], list[Offsets]]] = {}
    within = 0
    for part in parts:
        here, there = merged.setdefault((part.region, part.nbytes), ([], []))
        here.append(places * part.stride + part.base)
        there.append(pool_offsets + within)
        within += part.nbytes
    return [
        PartRun(region, nbytes, np.concatenate(here), np.concatenate(there))
        for (region, nbytes), (here, there) in merged.items()
    ]


def block_digests(parts: Sequence[BlockPart], places: Offsets, addresses: Mapping[int, int]) -> list[int]:
    """xxh3-64 of each block, over its parts in order.

    Args:
        places: int64 [num_blocks], the blocks' places as `parts` count.
        addresses: where each region begins in this process; the caller keeps the memory.
    """
    if len(parts) == 1:
        (part,) = parts
        memory = ctypes.c_char * part.nbytes
        starts = (places * part.stride + (part.base + addresses[part.region])).tolist()
        return [xxhash.xxh3_64_intdigest(memory.from_address(at)) for at in starts]
    pieces = [(ctypes.c_char * p.nbytes, addresses[p.region] + p.base, p.stride) for p in parts]
    digests: list[int] = []
    for place in places.tolist():
        state = xxhash.xxh3_64()
        for memory, first, stride in pieces:
            state.update(memory.from_address(first + place * stride))
        digests.append(state.intdigest())
    return digests
