"""The host's side of the pull kernel's checksum."""

from __future__ import annotations

import numpy as np
import pytest

from kvferry.transport.checksum import FACTOR, sums_of_blocks


def sum_of(block: np.ndarray) -> int:
    return int(sums_of_blocks(block.view(np.uint8).reshape(-1), np.zeros(1, dtype=np.int64), block.nbytes)[0])


def factor(place: int) -> int:
    product = (place + 1) * FACTOR % 2**64
    return (product ^ product >> 32) | 1


@pytest.mark.parametrize("nbytes", [1, 3, 4, 16, 999, 4096])
def test_it_is_the_sum_that_its_docstring_defines(nbytes: int) -> None:
    memory = np.random.default_rng(nbytes).integers(0, 256, 3 * nbytes + 7, dtype=np.uint8)
    offsets = np.array([2 * nbytes, 3, 0], dtype=np.int64)
    expected = []
    for start in offsets.tolist():
        block = memory[start : start + nbytes].tobytes() + bytes(-nbytes % 4)
        words = [int.from_bytes(block[i : i + 4], "little") for i in range(0, len(block), 4)]
        value = sum(word * factor(i) for i, word in enumerate(words)) % 2**64
        expected.append(value - 2**64 if value >= 2**63 else value)
    assert sums_of_blocks(memory, offsets, nbytes).tolist() == expected


def test_it_changes_with_any_bit_and_with_words_that_change_places() -> None:
    block = np.random.default_rng(1).integers(0, 256, 256, dtype=np.uint8)
    seen = {sum_of(block)}
    for bit in range(2048):
        changed = block.copy()
        changed[bit // 8] ^= 1 << bit % 8
        seen.add(sum_of(changed))
    swapped = block.view("<u4").copy()
    swapped[[3, 9]] = swapped[[9, 3]]
    seen.add(sum_of(swapped))
    assert len(seen) == 2050


def test_no_blocks_have_no_sums() -> None:
    assert sums_of_blocks(np.zeros(8, dtype=np.uint8), np.empty(0, dtype=np.int64), 8).tolist() == []
