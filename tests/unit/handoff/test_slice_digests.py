"""Digests between unequal tensor-parallel ranks: of the heads that both have, equal however each lays them out."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from kvferry.handoff.digests import block_digests, first_difference, heads_to_check, joined_sums
from kvferry.layout import HeadGrid, KVLayout, LayerLayout, Offsets, block_offsets, head_vectors
from kvferry.transport.checksum import sums_of_blocks

LAYERS, HEADS, TOKENS, VECTOR, BLOCKS = 3, 4, 4, 6, 7
PART_CELLS = [(part, head, token) for part in range(2) for head in range(HEADS) for token in range(TOKENS)]
Take = Callable[[np.ndarray, KVLayout, range, range | None], bytes]


def make(order: str, rank: int, size: int) -> tuple[KVLayout, np.ndarray]:
    """A rank's layout, and its memory with the same contents as every other rank's: a vector's bytes tell its place."""
    heads = HEADS // size
    part = heads * TOKENS * VECTOR
    strides = (TOKENS * VECTOR, VECTOR) if order == "HND" else (VECTOR, heads * VECTOR)
    layers = tuple(LayerLayout(0, 5 + i * BLOCKS * 2 * part, 2 * part) for i in range(LAYERS))
    layout = KVLayout(
        BLOCKS, TOKENS, 2 * part, heads, layers, HeadGrid((0, part), *strides, VECTOR), tp_rank=rank, tp_size=size
    )
    memory = np.zeros(5 + LAYERS * BLOCKS * 2 * part, dtype=np.uint8)
    for layer in range(LAYERS):
        for block in range(BLOCKS):
            for place in PART_CELLS:
                if place[1] // heads == rank:
                    rng = np.random.default_rng([layer, block, *place])
                    vector(layout, memory, layer, block, place)[:] = rng.integers(0, 256, VECTOR, dtype=np.uint8)
    return layout, memory


def vector(layout: KVLayout, memory: np.ndarray, layer: int, block: int, place: tuple[int, int, int]) -> np.ndarray:
    grid, (part, head, token) = layout.grid, place
    assert grid is not None
    at = int(block_offsets(layout, layer, [block])[0]) + grid.part_offsets[part]
    at += (head - layout.tp_rank * layout.num_kv_heads) * grid.head_stride + token * grid.token_stride
    return memory[at : at + VECTOR]


def xxh3(memory: np.ndarray, layout: KVLayout, layers: range, heads: range | None) -> bytes:
    return block_digests({0: memory}, layout, layers, [5, 2], heads)


def sums(memory: np.ndarray, layout: KVLayout, layers: range, heads: range | None) -> bytes:
    assert heads is not None and layout.grid is not None
    blocks: Offsets = np.concatenate([block_offsets(layout, layer, [5, 2]) for layer in layers])
    pieces = head_vectors(layout, layout.grid, heads)
    found = sums_of_blocks(memory, (blocks[:, None] + pieces).ravel(), VECTOR)
    return joined_sums(found, layers, len(pieces))


@pytest.mark.parametrize("take", [xxh3, sums])
@pytest.mark.parametrize("orders", [("NHD", "HND"), ("HND", "HND"), ("NHD", "NHD")])
@pytest.mark.parametrize("ranks", [((0, 1), (1, 2)), ((1, 2), (0, 1)), ((1, 2), (2, 4)), ((3, 4), (1, 2))])
def test_both_sides_have_the_same_and_every_shared_byte_counts(
    take: Take, orders: tuple[str, str], ranks: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    (source, at_source), (target, at_target) = (make(o, *r) for o, r in zip(orders, ranks, strict=True))
    heads = heads_to_check(source, *ranks[1])
    assert heads is not None and len(heads) == HEADS // max(size for _, size in ranks)
    layers = range(1, LAYERS)
    before = take(at_source, source, layers, heads)
    assert take(at_target, target, layers, heads) == before
    own = range(target.tp_rank * target.num_kv_heads, (target.tp_rank + 1) * target.num_kv_heads)
    for layer in range(LAYERS):
        for block in (5, 2, 3):
            for place in (p for p in PART_CELLS if p[1] in own):
                vector(target, at_target, layer, block, place)[VECTOR - 1] ^= 64
                counts = layer in layers and block in (5, 2) and place[1] in heads
                changed = first_difference(before, take(at_target, target, layers, heads))
                assert changed == ((5, 2).index(block) if counts else None), (layer, block, place)
                vector(target, at_target, layer, block, place)[VECTOR - 1] ^= 64


@pytest.mark.parametrize("take", [xxh3, sums])
def test_vectors_that_changed_places_are_found(take: Take) -> None:
    layout, memory = make("HND", 0, 1)
    before = take(memory, layout, range(LAYERS), range(2, 4))
    one, other = (vector(layout, memory, 1, 5, place) for place in ((0, 2, 1), (0, 3, 1)))
    one[:], other[:] = other.copy(), one.copy()
    assert first_difference(before, take(memory, layout, range(LAYERS), range(2, 4))) == 0


def test_whole_blocks_where_slices_are_equal_or_heads_cannot_be_told_apart() -> None:
    layout, _ = make("HND", 1, 2)
    assert heads_to_check(layout, 1, 2) is None
    assert heads_to_check(msgspec.structs.replace(layout, grid=None), 0, 1) is None
    replicated = msgspec.structs.replace(layout, num_kv_heads=1, tp_rank=0, tp_size=1)
    assert heads_to_check(replicated, 1, 2) is None, "latent attention: each rank has all of it"
    assert heads_to_check(layout, 0, 1) == range(2, 4)
