import itertools

import torch

from kvferry.connector.transformers.memory import KVGeometry, KVMemory

GEOMETRY = KVGeometry(num_layers=3, num_kv_heads=2, head_size=4, dtype="float32", block_size=16)


def make() -> KVMemory:
    return KVMemory(GEOMETRY, 5, torch.zeros(GEOMETRY.arena_bytes(5), dtype=torch.uint8))


def test_the_layout_says_where_each_vector_lies() -> None:
    memory = make()
    layout = memory.layout(region=7)
    assert layout.block_bytes == 2 * 16 * 2 * 4 * 4 and layout.num_blocks == 5
    grid = layout.grid
    assert grid is not None and grid.vector_bytes == 16
    block_table = [3, 1]
    for mark, (layer, part, token, head) in enumerate(itertools.product(range(3), range(2), range(20), range(2)), 1):
        slots = memory.slots(block_table, token, token + 1)
        memory.rows[layer][int(slots[part][0]), head] = float(mark)
        at = layout.layers[layer]
        assert at.region == 7
        offset = (
            at.base
            + block_table[token // 16] * at.block_stride
            + grid.part_offsets[part]
            + head * grid.head_stride
            + token % 16 * grid.token_stride
        )
        found = memory.arena[offset : offset + grid.vector_bytes].view(torch.float32)
        assert found.tolist() == [float(mark)] * 4


def test_blocks_of_a_layer_do_not_overlap_and_fill_the_arena() -> None:
    layout = make().layout(region=0)
    starts = sorted(at.base + b * at.block_stride for at in layout.layers for b in range(5))
    assert starts == list(range(0, GEOMETRY.arena_bytes(5), layout.block_bytes))
