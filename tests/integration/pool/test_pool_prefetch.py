"""What lies on disk is in memory by the time that a request loads it: fetched from when its engine got it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvferry.connector.vllm.metadata import StepPlan
from kvferry.connector.vllm.pool_scheduler import PoolSchedulerHalf
from kvferry.layout import Fingerprint, KVLayout, LayerLayout
from kvferry.pool import BlockSpace, PoolAttachment, PoolNode, PoolSettings

BLOCK, NUM_BLOCKS, BLOCK_TOKENS = 65536, 16, 16
LAYOUT = KVLayout(NUM_BLOCKS, BLOCK_TOKENS, BLOCK, 2, (LayerLayout(0, 0, BLOCK),))
SPACE = BlockSpace.of(Fingerprint("model", "float32", BLOCK_TOKENS, 1, 2, 8), LAYOUT, "tenant-a")
WAIT_S = 60.0


async def eventually(check: Callable[[], bool]) -> bool:
    until_s = time.monotonic() + WAIT_S
    while not check():
        if time.monotonic() > until_s:
            return False
        await asyncio.sleep(0.01)
    return True


async def done(pending: Any) -> Any:
    return await asyncio.to_thread(pending.result, WAIT_S)


async def test_under_vllm_a_request_that_arrives_has_its_blocks_fetched_while_it_queues(tmp_path: Path) -> None:
    settings = PoolSettings(arena_bytes=64 * BLOCK, slab_bytes=BLOCK, disk_path=str(tmp_path), disk_bytes=64 * BLOCK)
    memory = np.random.default_rng(5).integers(0, 256, NUM_BLOCKS * BLOCK, dtype=np.uint8)
    wanted, names = memory.copy(), [bytes([i]) * 32 for i in range(5)]
    node = PoolNode(settings=settings)
    await node.start()
    pool = PoolAttachment([node.address], SPACE, LAYOUT, {0: memory}, deadline_s=WAIT_S)
    assert (await done(pool.save(names, list(range(5))))).stored == 5
    await asyncio.to_thread(pool.close)
    await node.close()

    node = PoolNode(settings=settings)
    await node.start()
    pool = PoolAttachment([node.address], SPACE, LAYOUT, {0: memory}, deadline_s=WAIT_S)
    try:
        book = PoolSchedulerHalf(block_size=BLOCK_TOKENS, look_up=pool.lookup, prefetch=pool.prefetch, wait_s=WAIT_S)
        assert node.counts["disk_loaded"] == 0
        # vLLM's scheduler gets the request, which then waits for its turn.
        book.on_new_request("r", names, 5 * BLOCK_TOKENS + 1)
        assert await eventually(lambda: node.counts["prefetched"] == 5)
        assert await eventually(lambda: book.num_new_matched_tokens("r", 0, 5 * BLOCK_TOKENS + 1) is not None)
        assert book.num_new_matched_tokens("r", 0, 5 * BLOCK_TOKENS + 1) == 5 * BLOCK_TOKENS
        book.allocated("r", [8, 9, 10, 11, 12], 5 * BLOCK_TOKENS)
        plan = StepPlan()
        book.step(plan, (), ())
        (load,) = plan.pool_loads
        memory[:] = 0
        loaded = await done(pool.load(load.hashes, load.block_ids))
        assert (loaded.num_blocks, dict(loaded.tiers)) == (5, {"host": 5, "disk": 0, "remote": 0})
        assert (memory[8 * BLOCK : 13 * BLOCK] == wanted[: 5 * BLOCK]).all()
    finally:
        await asyncio.to_thread(pool.close)
        await node.close()
