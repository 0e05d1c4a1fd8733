"""A block's digest covers exactly its bytes in the run's layers, wherever they lie."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import xxhash

from kvferry.handoff.digests import block_digests, digests_fit, first_difference, joined_sums
from kvferry.layout import KVLayout, LayerLayout


def make(num_blocks: int, stride: int, block_bytes: int = 24) -> tuple[KVLayout, dict[int, np.ndarray]]:
    layers = tuple(LayerLayout(region=0, base=8 + i * num_blocks * stride, block_stride=stride) for i in range(2))
    layout = KVLayout(num_blocks, 4, block_bytes, 2, layers)
    rng = np.random.default_rng(1)
    return layout, {0: rng.integers(0, 256, 8 + 2 * num_blocks * stride, dtype=np.uint8)}


def block(layout: KVLayout, memory: dict[int, np.ndarray], layer: int, block_id: int) -> bytes:
    at = layout.layers[layer].base + block_id * layout.layers[layer].block_stride
    return memory[0][at : at + layout.block_bytes].tobytes()


@pytest.mark.parametrize("stride", [24, 40])
def test_each_block_has_the_digest_of_its_layers_in_order(stride: int) -> None:
    layout, memory = make(7, stride)
    want = [xxhash.xxh3_64_digest(block(layout, memory, 0, b) + block(layout, memory, 1, b)) for b in (5, 0, 6)]
    assert block_digests(memory, layout, range(2), [5, 0, 6]) == b"".join(want)
    assert block_digests(memory, layout, range(1, 2), [3]) == xxhash.xxh3_64_digest(block(layout, memory, 1, 3))


def test_every_byte_of_the_run_counts_and_no_other() -> None:
    layout, memory = make(5, 40)
    before = block_digests(memory, layout, range(2), [1, 3])
    for layer in range(2):
        for block_id in range(5):
            for byte in range(40):
                at = layout.layers[layer].base + block_id * 40 + byte
                memory[0][at] ^= 1
                changed = first_difference(before, block_digests(memory, layout, range(2), [1, 3]))
                inside = block_id in (1, 3) and byte < layout.block_bytes
                assert changed == ((1, 3).index(block_id) if inside else None)
                memory[0][at] ^= 1


def test_joined_sums_tell_the_block_and_that_layers_changed_places() -> None:
    sums = np.array([[1, 2, 3], [-5, 6, 2**62]], dtype=np.int64)
    before = joined_sums(sums.ravel(), [4, 9])
    assert len(before) == 3 * 8
    for row, column in [(0, 0), (1, 0), (0, 2), (1, 2)]:
        changed = sums.copy()
        changed[row, column] ^= 1 << 50
        assert first_difference(before, joined_sums(changed.ravel(), [4, 9])) == column
    assert joined_sums(sums[::-1].ravel(), [9, 4]) == before  # another order of the same layers
    assert first_difference(before, joined_sums(sums[::-1].ravel(), [4, 9])) == 0


def test_digests_are_compared_only_where_blocks_look_alike() -> None:
    layout, _ = make(5, 40)
    assert digests_fit(layout, msgspec.structs.replace(layout, num_blocks=9))
    assert not digests_fit(layout, msgspec.structs.replace(layout, tp_size=2))
    assert not digests_fit(layout, msgspec.structs.replace(layout, opaque="packed"))
