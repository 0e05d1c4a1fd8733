"""Is this batch of block copies possible? Checked once, before any byte moves, whatever the transport."""

from __future__ import annotations

import itertools

import numpy as np

from kvferry.errors import RegistrationError
from kvferry.layout import Offsets
from kvferry.transport.base import BlockList, Region, RemoteRegion

FEW = 32
"""Up to so many offsets, plain Python is quicker than one call of numpy for each step."""


def check_blocks(blocks: list[BlockList]) -> list[BlockList]:
    """The same lists with contiguous int64 offsets.

    Raises: RegistrationError naming the first offset that lies outside its region, or targets that overlap.
    """
    bounds: dict[int, tuple[int, int]] = {}
    checked = [_check_list(part, bounds) for part in blocks if len(part.source_offsets) or len(part.target_offsets)]
    if len(checked) > 1 or (checked and len(checked[0].target_offsets) > 1):
        _require_apart(checked)
    return checked


def _check_list(part: BlockList, bounds: dict[int, tuple[int, int]]) -> BlockList:
    source, target = _offsets(part.source_offsets, "source"), _offsets(part.target_offsets, "target")
    if source.size != target.size:
        raise RegistrationError(f"{source.size} source blocks cannot fill {target.size} target blocks")
    if part.nbytes < 1:
        raise RegistrationError(f"blocks of {part.nbytes} bytes cannot be moved; a block has at least 1")
    # Lists for one region after another often share their arrays: each is looked through once. Their parts keep the
    # arrays alive, so that an id means one of them.
    for offsets, region, side in ((source, part.source, "source"), (target, part.target, "target")):
        if id(offsets) not in bounds:
            bounds[id(offsets)] = _bounds(offsets)
        _require_between(*bounds[id(offsets)], part.nbytes, region, side)
    if source is part.source_offsets and target is part.target_offsets:
        return part
    return part._replace(source_offsets=source, target_offsets=target)


def _offsets(value: Offsets, side: str) -> Offsets:
    if isinstance(value, np.ndarray) and value.dtype == np.int64 and value.ndim == 1 and value.flags.c_contiguous:
        return value
    array = np.asarray(value)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise RegistrationError(f"{side} offsets are {array.dtype} {array.shape}; expected int64 [num_blocks]")
    return np.ascontiguousarray(array, dtype=np.int64)


def require_inside(offsets: Offsets, nbytes: int, region: Region | RemoteRegion, side: str) -> None:
    """Raises: RegistrationError if a block of `nbytes` at one of the offsets does not lie wholly in the region."""
    _require_between(*_bounds(offsets), nbytes, region, side)


def _bounds(offsets: Offsets) -> tuple[int, int]:
    if offsets.size <= FEW:
        values = offsets.tolist()
        return min(values), max(values)
    return int(np.minimum.reduce(offsets)), int(np.maximum.reduce(offsets))


def _require_between(low: int, high: int, nbytes: int, region: Region | RemoteRegion, side: str) -> None:
    if low < 0 or high > region.nbytes - nbytes:
        wrong = low if low < 0 else high
        raise RegistrationError(
            f"{side} offset {wrong} and {nbytes} bytes lie outside region {region.region_id} of {region.nbytes} bytes"
        )


def _require_apart(blocks: list[BlockList]) -> None:
    by_region: dict[int, list[BlockList]] = {}
    for part in blocks:
        by_region.setdefault(part.target.region_id, []).append(part)
    apart: set[tuple[int, int]] = set()
    for region_id, parts in by_region.items():
        if len(parts) == 1:
            seen = id(parts[0].target_offsets), parts[0].nbytes
            if seen in apart:
                continue
            apart.add(seen)
            if _surely_apart(parts[0].target_offsets, parts[0].nbytes):
                continue
            starts = np.sort(parts[0].target_offsets)
            gaps = np.diff(starts) < parts[0].nbytes
        else:
            every = np.concatenate([part.target_offsets for part in parts])
            if len({part.nbytes for part in parts}) == 1 and _surely_apart(every, parts[0].nbytes):
                continue
            sizes = np.concatenate([np.full(len(part.target_offsets), part.nbytes, dtype=np.int64) for part in parts])
            order = np.argsort(every, kind="stable")
            starts = every[order]
            gaps = np.diff(starts) < sizes[order][:-1]
        if gaps.any():
            first = int(starts[int(np.flatnonzero(gaps)[0])])
            raise RegistrationError(
                f"two target blocks overlap at offset {first} of region {region_id}: what would lie there is undefined"
            )


def _surely_apart(starts: Offsets, nbytes: int) -> bool:
    """Whether blocks of one size overlap nowhere, told without sorting all of them; False where only that tells.

    Blocks of a paged cache lie on a grid: then they overlap only if two have the same place on it.
    """
    if starts.size <= FEW:
        ordered = sorted(starts.tolist())
        return all(b - a >= nbytes for a, b in itertools.pairwise(ordered))
    low, high = int(np.minimum.reduce(starts)), int(np.maximum.reduce(starts))
    num_places = (high - low) // nbytes + 1
    if num_places > 16 * starts.size:
        return False
    places = starts - low
    if nbytes & (nbytes - 1) == 0:
        on_grid = not int(np.bitwise_or.reduce(places)) & (nbytes - 1)
        places >>= nbytes.bit_length() - 1
    else:
        beside = places
        places = beside // nbytes
        on_grid = bool(np.array_equal(places * nbytes, beside))
    if not on_grid:
        return False
    taken = np.zeros(num_places, dtype=np.bool_)
    taken[places] = True
    return int(np.count_nonzero(taken)) == starts.size
