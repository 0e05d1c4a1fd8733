"""Validation of block lists: what fits passes unchanged, what does not is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.errors import RegistrationError
from kvferry.transport.base import BlockList, Region, RemoteRegion
from kvferry.transport.blocks import check_blocks


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
