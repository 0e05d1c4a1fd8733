"""Blocks in parts: their digests are those of the whole block, wherever its parts lie."""

from __future__ import annotations

import numpy as np
import xxhash

from kvferry.pool.parts import BlockPart, block_digests, part_runs

PARTS = (BlockPart(1, 64, 128, 48), BlockPart(2, 0, 32, 32), BlockPart(1, 112, 128, 16))


def test_a_block_s_digest_is_that_of_its_parts_in_a_row() -> None:
    memory = {region: np.random.default_rng(region).integers(0, 256, 1024, dtype=np.uint8) for region in (1, 2)}
    places = np.array([3, 0, 5], dtype=np.int64)
    pool = np.zeros(3 * 96, dtype=np.uint8)
    for run in part_runs(PARTS, places, np.arange(3, dtype=np.int64) * 96):
        for here, there in zip(run.offsets.tolist(), run.pool_offsets.tolist(), strict=True):
            pool[there : there + run.nbytes] = memory[run.region][here : here + run.nbytes]
    expected = [xxhash.xxh3_64_intdigest(pool[at : at + 96].data) for at in (0, 96, 192)]
    assert block_digests(PARTS, places, {region: array.ctypes.data for region, array in memory.items()}) == expected
    whole = (BlockPart(7, 0, 96, 96),)
    assert block_digests(whole, np.arange(3, dtype=np.int64), {7: pool.ctypes.data}) == expected
