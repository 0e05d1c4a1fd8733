"""Is this batch of block copies possible? Checked once, before any byte moves, whatever the transport."""

from __future__ import annotations

import itertools

import numpy as np

from kvferry.errors import RegistrationError
from kvferry.layout import Offsets
from kvferry.transport.base import BlockList, Region, RemoteRegion

try:
    # Without the GIL; 16,384 offsets in random order take 20 us, where numpy takes 60.
    from kvferry.transport._copy import look_through as in_c  # type: ignore[import-not-found, unused-ignore]
except ImportError:  # The wheel was built without a C compiler.
    in_c = None

FEW = 32
"""Up to so many offsets, plain Python is quicker than one call of numpy for each step."""

_INT64 = np.dtype(np.int64)

Looked = tuple[int, int, bool]
"""What one look through offsets told: the lowest, the highest, and whether blocks there surely overlap nowhere. Where
that is False, only sorting them tells."""


def check_blocks(blocks: list[BlockList]) -> list[BlockList]:
    """The same lists with contiguous int64 offsets.

    Raises: RegistrationError naming the first offset that lies outside its region, or targets that overlap.
    """
    # Lists for one region after another often share their arrays: each is looked through once. The lists keep the
    # arrays alive, so that an id means one of them.
    looked: dict[tuple[int, int], Looked] = {}
    checked = [_check_list(part, looked) for part in blocks if len(part.source_offsets) or len(part.target_offsets)]
    if len(checked) == 1 and looked[id(checked[0].target_offsets), checked[0].nbytes][2]:
        return checked
    _require_apart(checked, looked)
    return checked


def _check_list(part: BlockList, looked: dict[tuple[int, int], Looked]) -> BlockList:
    source_region, target_region, source, target, nbytes = part
    of_source, of_target = looked.get((id(source), 0)), looked.get((id(target), nbytes))
    if of_source is None or of_target is None:
        source, target = _offsets(source, "source"), _offsets(target, "target")
    if source.size != target.size:
        raise RegistrationError(f"{source.size} source blocks cannot fill {target.size} target blocks")
    if nbytes < 1:
        raise RegistrationError(f"blocks of {nbytes} bytes cannot be moved; a block has at least 1")
    if of_source is None:  # Sources may overlap.
        of_source = looked[id(source), 0] = look_through(source, 0)
    _require_between(of_source, nbytes, source_region, "source")
    if of_target is None:
        of_target = looked[id(target), nbytes] = look_through(target, nbytes)
    _require_between(of_target, nbytes, target_region, "target")
    if source is part.source_offsets and target is part.target_offsets:
        return part
    return part._replace(source_offsets=source, target_offsets=target)


def _offsets(value: Offsets, side: str) -> Offsets:
    if isinstance(value, np.ndarray) and value.dtype == _INT64 and value.ndim == 1 and value.flags.c_contiguous:
        return value
    array = np.asarray(value)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise RegistrationError(f"{side} offsets are {array.dtype} {array.shape}; expected int64 [num_blocks]")
    return np.ascontiguousarray(array, dtype=np.int64)


def require_inside(offsets: Offsets, nbytes: int, region: Region | RemoteRegion, side: str) -> None:
    """Raises: RegistrationError if a block of `nbytes` at one of the offsets does not lie wholly in the region."""
    _require_between(look_through(offsets, 0), nbytes, region, side)


def _require_between(looked: Looked, nbytes: int, region: Region | RemoteRegion, side: str) -> None:
    low, high, _ = looked
    if low < 0 or high > region.nbytes - nbytes:
        wrong = low if low < 0 else high
        raise RegistrationError(
            f"{side} offset {wrong} and {nbytes} bytes lie outside region {region.region_id} of {region.nbytes} bytes"
        )


def _require_apart(blocks: list[BlockList], looked: dict[tuple[int, int], Looked]) -> None:
    by_region: dict[int, list[BlockList]] = {}
    for part in blocks:
        by_region.setdefault(part.target.region_id, []).append(part)
    for region_id, parts in by_region.items():
        nbytes = parts[0].nbytes
        if len(parts) == 1:
            if looked[id(parts[0].target_offsets), nbytes][2]:
                continue
            starts = np.sort(parts[0].target_offsets)
            gaps = np.diff(starts) < nbytes
        else:
            every = np.concatenate([part.target_offsets for part in parts])
            if all(part.nbytes == nbytes for part in parts) and look_through(every, nbytes)[2]:
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


def look_through(offsets: Offsets, nbytes: int) -> Looked:
    """int64 [num_blocks], num_blocks > 0; blocks of `nbytes`, or 0 where nobody asks whether they are apart."""
    found: Looked | None = None if in_c is None else in_c(offsets, nbytes)
    return look_without_c(offsets, nbytes) if found is None else found


def look_without_c(offsets: Offsets, nbytes: int) -> Looked:
    """As `look_through`, also for offsets that C does not take: those at odd addresses."""
    if offsets.size <= FEW:
        ordered = sorted(offsets.tolist())
        return ordered[0], ordered[-1], nbytes > 0 and all(b - a >= nbytes for a, b in itertools.pairwise(ordered))
    low, high = int(np.minimum.reduce(offsets)), int(np.maximum.reduce(offsets))
    return low, high, nbytes > 0 and _apart_on_grid(offsets, low, high, nbytes)


def _apart_on_grid(starts: Offsets, low: int, high: int, nbytes: int) -> bool:
    """Blocks of a paged cache lie on a grid: then they overlap only if two have the same place on it."""
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
