"""Validation of block lists: what fits passes unchanged, what does not is named."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.errors import RegistrationError
from kvferry.transport import blocks as room
from kvferry.transport.base import BlockList, Region, RemoteRegion
from kvferry.transport.blocks import check_blocks, look_through, look_without_c


def blocks(source: Any, target: Any, nbytes: int, *, source_bytes: int = 1000, target_bytes: int = 1000) -> BlockList:
    return BlockList(
        RemoteRegion(1, source_bytes, "00"),
        Region(2, 0, target_bytes, "00"),
        np.asarray(source, dtype=np.int64),
        np.asarray(target, dtype=np.int64),
        nbytes,
    )


def test_a_list_that_fits_is_not_copied() -> None:
    given_list = blocks([0, 900], [100, 0], 100)
    (checked,) = check_blocks([given_list])
    assert checked.source_offsets is given_list.source_offsets


def test_other_integers_are_converted() -> None:
    (checked,) = check_blocks([blocks([0], [0], 1)._replace(source_offsets=np.arange(3, dtype=np.int32)[1:2])])
    assert checked.source_offsets.dtype == np.int64


def test_empty_lists_vanish() -> None:
    assert check_blocks([blocks([], [], 5)]) == []


@pytest.mark.parametrize(
    ("source", "target", "nbytes", "says"),
    [
        ([-1], [0], 10, "source offset -1"),
        ([991], [0], 10, "source offset 991"),
        ([0], [991], 10, "target offset 991"),
        ([0, 5], [0, 9], 10, "overlap at offset 0"),
        ([0, 5], [7, 7], 10, "overlap at offset 7"),
        ([0], [0, 20], 10, "1 source blocks cannot fill 2"),
        ([0], [0], 0, "at least 1"),
        ([0], [0], 1001, "outside region"),
    ],
)
def test_what_does_not_fit_is_named(source: Any, target: Any, nbytes: int, says: str) -> None:
    with pytest.raises(RegistrationError, match=says):
        check_blocks([blocks(source, target, nbytes)])


@pytest.mark.parametrize(
    ("nbytes", "room", "says"), [(10, 85, "target offset 90"), (10, 1000, None), (95, 1000, "overlap at offset 0")]
)
def test_lists_that_share_offsets_are_each_held_to_their_own_region(nbytes: int, room: int, says: str | None) -> None:
    first = blocks([0, 90], [0, 90], nbytes)
    smaller = first._replace(target=Region(3, 0, room, "00"))
    if says is None:
        assert check_blocks([first, smaller]) == [first, smaller]
        return
    with pytest.raises(RegistrationError, match=says):
        check_blocks([first, smaller])


def test_floats_and_tables_are_no_offsets() -> None:
    with pytest.raises(RegistrationError, match="float64"):
        check_blocks([blocks([0], [0], 1)._replace(source_offsets=np.zeros(1))])  # type: ignore[arg-type]
    with pytest.raises(RegistrationError, match="expected int64"):
        check_blocks([blocks([0], [0], 1)._replace(source_offsets=np.zeros((1, 1), dtype=np.int64))])


def test_targets_of_two_lists_in_one_region_may_not_overlap() -> None:
    with pytest.raises(RegistrationError, match="overlap at offset 40"):
        check_blocks([blocks([0], [40], 10), blocks([0, 0], [0, 49], 20)])
    other = blocks([0], [40], 10)._replace(target=Region(3, 0, 1000, "00"))
    assert len(check_blocks([other, blocks([0, 0], [0, 49], 20)])) == 2


@settings(deadline=None)
@given(st.lists(st.integers(-50, 250), min_size=1, max_size=6), st.integers(1, 60))
def test_accepts_exactly_what_lies_inside_and_apart(target: list[int], nbytes: int) -> None:
    fits = all(0 <= t <= 200 - nbytes for t in target) and all(
        abs(a - b) >= nbytes for i, a in enumerate(target) for b in target[:i]
    )
    wanted = blocks([0] * len(target), target, nbytes, target_bytes=200)
    if fits:
        assert len(check_blocks([wanted])) == 1
    else:
        with pytest.raises(RegistrationError):
            check_blocks([wanted])


@pytest.mark.parametrize("nbytes", [64, 48])
@pytest.mark.parametrize("twice", [False, True])
def test_many_blocks_on_a_grid(nbytes: int, twice: bool) -> None:
    target = (np.random.default_rng(3).permutation(200) * nbytes + 16)[:150]
    if twice:
        target[149] = target[0]
    wanted = blocks(np.zeros(150), target, nbytes, target_bytes=16 + 200 * nbytes)
    if twice:
        with pytest.raises(RegistrationError, match=f"overlap at offset {target[0]} "):
            check_blocks([wanted])
    else:
        assert check_blocks([wanted]) == [wanted]


def test_many_blocks_beside_the_grid_or_far_apart() -> None:
    target = np.arange(100) * 64
    beside = target.copy()
    beside[40] += 1
    with pytest.raises(RegistrationError, match="overlap at offset 2561 "):
        check_blocks([blocks(np.zeros(100), beside, 64, target_bytes=1 << 30)])
    assert check_blocks([blocks(np.zeros(100), beside * 2, 64, target_bytes=1 << 30)])
    assert check_blocks([blocks(np.zeros(100), target * 1000, 64, target_bytes=1 << 30)])


def test_layers_in_one_region_are_apart_together() -> None:
    layers = [blocks(np.zeros(50), np.arange(50) * 640 + 64 * layer, 64, target_bytes=1 << 20) for layer in range(10)]
    assert len(check_blocks(layers)) == 10
    layers[9] = layers[9]._replace(target_offsets=layers[9].target_offsets - 64)
    with pytest.raises(RegistrationError, match="overlap at offset 512 "):
        check_blocks(layers)


EXTREMES = [-(1 << 63), -(1 << 63) + 1, -1, 0, 1, (1 << 62), (1 << 63) - 2, (1 << 63) - 1]
SIZES = [1, 2, 3, 48, 64, 4096, 3 << 20, 1 << 40, 1 << 62, (1 << 63) - 1]


def laid_out(seed: int) -> tuple[Any, int]:
    """Offsets as they come, and as they should not: int64 [1 to 5000], and a block size."""
    random = np.random.default_rng(seed)
    count = int(random.choice([1, 2, 9, 33, 64, 65, 66, 200, 5000]))
    nbytes = int(random.choice(SIZES))
    spread = int(random.choice([1, 2, 15, 16, 17, 1000]))
    most = min(count * spread, ((1 << 63) - 1) // nbytes)
    places = random.choice(most, count, replace=False) if most >= count else random.integers(0, most, count)
    order = random.integers(0, 3)
    places = np.sort(places)[::-1] if order == 0 else np.sort(places) if order == 1 else places
    offsets = places.astype(np.int64) * nbytes
    room_left = (1 << 63) - 1 - int(offsets.max())
    offsets = offsets + int(random.choice([0, min(16, room_left), room_left]))
    for change in random.choice(["none", "none", "twice", "beside", "extreme", "negative"], 2):
        at = int(random.integers(count))
        if change == "twice":
            offsets[at] = offsets[int(random.integers(count))]
        elif change == "beside":
            offsets[at] -= int(random.integers(1, min(nbytes, 5) + 1)) if offsets[at] > 5 else 0
        elif change == "extreme":
            offsets[at] = int(random.choice(EXTREMES))
        elif change == "negative":
            offsets = offsets - int(random.integers(1, 1 << 40))
    return np.ascontiguousarray(offsets), nbytes


def are_apart(offsets: Any, nbytes: int) -> bool:
    ordered = sorted(offsets.tolist())
    return all(b - a >= nbytes for a, b in itertools.pairwise(ordered))


@pytest.mark.skipif(room.in_c is None, reason="built without a C compiler")
@settings(deadline=None)
@given(st.integers(0, 1 << 32))
def test_a_look_in_c_sees_what_one_in_python_sees(seed: int) -> None:
    offsets, nbytes = laid_out(seed)
    low, high, apart = look_through(offsets, nbytes)
    assert (low, high) == (offsets.min(), offsets.max())
    assert look_through(offsets, 0) == (low, high, False)
    if low < 0:
        assert not apart
        return
    *_, told = look_without_c(offsets, nbytes)
    # What numpy is sure of C is sure of too; neither ever says of blocks that overlap that they are apart.
    assert told <= apart <= are_apart(offsets, nbytes)


@pytest.mark.skipif(room.in_c is None, reason="built without a C compiler")
@settings(deadline=None)
@given(st.integers(0, 1 << 32))
def test_with_and_without_c_the_same_lists_pass_and_the_same_errors_are_raised(seed: int) -> None:
    offsets, nbytes = laid_out(seed)
    other, size = laid_out(seed + 1)
    region_bytes = int(np.random.default_rng(seed).choice([int(offsets.max()) + nbytes, 1 << 20, 1 << 62]))
    parts = [blocks(offsets, offsets, nbytes, source_bytes=1 << 64, target_bytes=region_bytes)]
    if seed % 2:
        parts.append(blocks(other, other, size, source_bytes=1 << 64, target_bytes=region_bytes))

    def told() -> str | None:
        try:
            check_blocks(parts)
        except RegistrationError as error:
            return str(error)
        return None

    with_c = told()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "in_c", None)
        assert told() == with_c
    if len(parts) == 1:
        fits = offsets.min() >= 0 and int(offsets.max()) + nbytes <= region_bytes and are_apart(offsets, nbytes)
        assert (with_c is None) == fits


@pytest.mark.skipif(room.in_c is None, reason="built without a C compiler")
@pytest.mark.parametrize("nbytes", [64, 48])
def test_random_places_on_a_grid_are_told_apart_without_sorting(nbytes: int) -> None:
    offsets = np.random.default_rng(7).permutation(20_000) * nbytes + 5
    assert look_through(offsets, nbytes) == (5, 5 + 19_999 * nbytes, True)
    offsets[[100, 19_000]] = offsets[200]
    assert look_through(offsets, nbytes)[2] is False


def test_offsets_at_an_odd_address_and_read_only_ones_are_looked_through() -> None:
    packed = b"-" + np.array([64, 0, 128], dtype=np.int64).tobytes()
    odd = np.frombuffer(memoryview(packed)[1:], dtype=np.int64)
    assert len(check_blocks([blocks([0, 0, 0], [0, 64, 128], 64)._replace(target_offsets=odd)])) == 1
    with pytest.raises(RegistrationError, match="overlap at offset 0 "):
        check_blocks([blocks([0, 0, 0], [0, 64, 128], 65)._replace(target_offsets=odd)])


@pytest.mark.skipif(room.in_c is None, reason="built without a C compiler")
@pytest.mark.parametrize(
    "given_offsets",
    [
        np.zeros(0, dtype=np.int64),
        np.zeros(3),
        np.zeros(3, dtype=np.uint64),
        np.zeros(3, dtype=">i8"),
        np.zeros((2, 2), dtype=np.int64),
        np.zeros(6, dtype=np.int64)[::2],
        [0, 1],
        b"12345678",
    ],
)
def test_c_takes_nothing_but_whole_int64_arrays(given_offsets: Any) -> None:
    assert room.in_c(given_offsets, 8) is None
