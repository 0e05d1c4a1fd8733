"""Where blocks lie, and that a planned copy moves exactly the right bytes, also between unequal ranks."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from kvferry.errors import CompatibilityError
from kvferry.layout import (
    Fingerprint,
    HeadGrid,
    KVLayout,
    LayerLayout,
    block_offsets,
    overlapping_ranks,
    plan_copy,
)

LAYERS, HEADS, TOKENS, VECTOR, BLOCKS = 3, 8, 4, 6, 10
FINGERPRINT = Fingerprint(model="m", dtype="float32", block_size=16, num_layers=4, num_kv_heads=8, head_size=64)


def make_layout(order: str, rank: int = 0, size: int = 1, one_region: bool = True) -> KVLayout:
    """K and V of `HEADS / size` heads a block, in NHD or HND order, all layers in one region or one region a layer."""
    heads = HEADS // size
    part = heads * TOKENS * VECTOR
    strides = (TOKENS * VECTOR, VECTOR) if order == "HND" else (VECTOR, heads * VECTOR)
    layer_bytes = BLOCKS * 2 * part
    return KVLayout(
        num_blocks=BLOCKS,
        block_size=TOKENS,
        block_bytes=2 * part,
        num_kv_heads=heads,
        layers=tuple(
            LayerLayout(region=0 if one_region else i, base=i * layer_bytes if one_region else 0, block_stride=2 * part)
            for i in range(LAYERS)
        ),
        grid=HeadGrid((0, part), *strides, VECTOR),
        tp_rank=rank,
        tp_size=size,
    )


def memory(layout: KVLayout) -> dict[int, np.ndarray]:
    regions: dict[int, int] = {}
    for layer in layout.layers:
        regions[layer.region] = max(regions.get(layer.region, 0), layer.base + layout.num_blocks * layer.block_stride)
    return {r: np.zeros(n, dtype=np.uint8) for r, n in regions.items()}


def cell(layout: KVLayout, data: dict[int, np.ndarray], layer: int, block: int, part: int, head: int, token: int):
    """The bytes of one head vector, by the definition of HeadGrid and nothing else; `head` counts over all ranks."""
    where, grid = layout.layers[layer], layout.grid
    assert grid is not None
    local = head - layout.tp_rank * layout.num_kv_heads
    at = where.base + block * where.block_stride
    at += grid.part_offsets[part] + local * grid.head_stride + token * grid.token_stride
    return data[where.region][at : at + grid.vector_bytes]


def own_heads(layout: KVLayout) -> range:
    return range(layout.tp_rank * layout.num_kv_heads, (layout.tp_rank + 1) * layout.num_kv_heads)


@pytest.mark.parametrize("one_region", [True, False])
@pytest.mark.parametrize("orders", [("NHD", "NHD"), ("NHD", "HND"), ("HND", "HND"), ("HND", "NHD")])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (2, 1), (4, 2), (2, 8), (8, 1)])
def test_a_planned_copy_brings_every_head_vector_home(
    sizes: tuple[int, int], orders: tuple[str, str], one_region: bool
) -> None:
    rng = np.random.default_rng(0)
    sources = [make_layout(orders[0], r, sizes[0], one_region) for r in range(sizes[0])]
    data = [{k: rng.integers(0, 256, v.size, dtype=np.uint8) for k, v in memory(s).items()} for s in sources]
    source_ids, target_ids, layers = [3, 7, 1], [9, 0, 4], range(1, 3)
    for rank in range(sizes[1]):
        target = make_layout(orders[1], rank, sizes[1], not one_region)
        into = memory(target)
        for peer in overlapping_ranks(rank, sizes[1], sizes[0]):
            for copy in plan_copy(sources[peer], target, layers, source_ids, target_ids):
                for s, t in zip(copy.source_offsets, copy.target_offsets, strict=True):
                    run = data[peer][copy.source_region][s : s + copy.nbytes]
                    assert not into[copy.target_region][t : t + copy.nbytes].any()
                    into[copy.target_region][t : t + copy.nbytes] = run
        for layer in range(LAYERS):
            for s, t in zip(source_ids, target_ids, strict=True):
                for head in own_heads(target):
                    peer = next(i for i, x in enumerate(sources) if head in own_heads(x))
                    for part in range(2):
                        for token in range(TOKENS):
                            got = cell(target, into, layer, t, part, head, token)
                            want = cell(sources[peer], data[peer], layer, s, part, head, token)
                            assert (got == (want if layer in layers else 0)).all()
        untouched = set(range(BLOCKS)) - set(target_ids)
        for layer in layers:
            for block in untouched:
                assert not any(
                    cell(target, into, layer, block, p, h, n).any()
                    for p in range(2)
                    for h in own_heads(target)
                    for n in range(TOKENS)
                )


def test_equal_layouts_copy_whole_blocks_in_one_list() -> None:
    layout = make_layout("NHD")
    (copy,) = plan_copy(layout, layout, range(LAYERS), [1, 2], [3, 4])
    assert copy.nbytes == layout.block_bytes
    assert len(copy.source_offsets) == LAYERS * 2
    assert list(block_offsets(layout, 1, [2])) == [layout.layers[1].base + 2 * layout.block_bytes]


def test_a_head_slice_in_hnd_order_is_one_run_a_part() -> None:
    copies = plan_copy(make_layout("HND", 0, 1), make_layout("HND", 1, 2), range(1), [0], [0])
    assert [(len(c.source_offsets), c.nbytes) for c in copies] == [(2, 4 * TOKENS * VECTOR)]


def test_packed_blocks_only_fit_their_like() -> None:
    packed = KVLayout(BLOCKS, TOKENS, 64, HEADS, make_layout("NHD").layers, opaque="cpu-attn")
    (copy,) = plan_copy(packed, packed, range(1), [0], [1])
    assert copy.nbytes == 64
    halves = make_layout("HND", 0, 2), make_layout("HND", 0, 1)
    assert plan_copy(
        msgspec.structs.replace(halves[0], opaque="x"),
        msgspec.structs.replace(halves[1], opaque="x"),
        range(1),
        [0],
        [1],
    )
    with pytest.raises(CompatibilityError, match=r"packed as x .* and as rows"):
        plan_copy(msgspec.structs.replace(halves[0], opaque="x"), halves[1], range(1), [0], [1])
    with pytest.raises(CompatibilityError, match=r"packed as cpu-attn .* and as rows"):
        plan_copy(packed, make_layout("NHD"), range(1), [0], [1])


@pytest.mark.parametrize("ids", [[-1], [BLOCKS]])
def test_block_ids_outside_the_cache_are_refused(ids: list[int]) -> None:
    layout = make_layout("NHD")
    with pytest.raises(CompatibilityError, match=r"has blocks 0 to 9"):
        plan_copy(layout, layout, range(1), ids, [0])
    with pytest.raises(CompatibilityError, match="1 source blocks cannot fill 2"):
        plan_copy(layout, layout, range(1), [0], [0, 1])


def test_ranks_that_do_not_map_are_refused() -> None:
    assert [list(overlapping_ranks(r, 2, 4)) for r in range(2)] == [[0, 1], [2, 3]]
    assert [list(overlapping_ranks(r, 4, 2)) for r in range(4)] == [[0], [0], [1], [1]]
    with pytest.raises(CompatibilityError, match=r"2 .* and 3"):
        overlapping_ranks(0, 3, 2)


def test_fingerprints_that_differ_name_both_values() -> None:
    FINGERPRINT.require_equal(FINGERPRINT)
    other = Fingerprint(model="m", dtype="bfloat16", block_size=32, num_layers=4, num_kv_heads=8, head_size=64)
    with pytest.raises(
        CompatibilityError, match="dtype: here 'float32', there 'bfloat16'; block_size: here 16, there 32"
    ):
        FINGERPRINT.require_equal(other)
    assert FINGERPRINT.digest() != other.digest()
