"""An engine's attachment to the pool: blocks in parts, whole or a miss, whatever happens in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvferry.errors import ConfigError, RegistrationError
from kvferry.layout import Fingerprint, KVLayout, LayerLayout
from kvferry.pool import BlockSpace, Pending, PoolAttachment, PoolNode, PoolSettings
from kvferry.testing.faults import FaultyLink

LAYER_BYTES, NUM_LAYERS, NUM_BLOCKS = 4096, 3, 16
BLOCK = LAYER_BYTES * NUM_LAYERS
FINGERPRINT = Fingerprint("model", "float32", 16, NUM_LAYERS, 2, 8)
WAIT_S = 60.0


def layout(*layers: tuple[int, int, int], **more: Any) -> KVLayout:
    """Layers as (region, base, stride)."""
    return KVLayout(NUM_BLOCKS, 16, LAYER_BYTES, 2, tuple(LayerLayout(*layer) for layer in layers), **more)


# Layer by layer in one region, as the embedded engine has it; and over two regions, one layer interleaved in another.
APART = layout(*[(0, layer * NUM_BLOCKS * LAYER_BYTES, LAYER_BYTES) for layer in range(NUM_LAYERS)])
MIXED = layout((0, 100, 2 * LAYER_BYTES), (1, 0, LAYER_BYTES), (0, 100 + LAYER_BYTES, 2 * LAYER_BYTES))


class Rank:
    """One rank's KV memory, and its attachment."""

    def __init__(self, address: str, made: KVLayout = APART, namespace: str = "tenant-a", **settings: Any) -> None:
        sizes = {0: 100 + NUM_LAYERS * NUM_BLOCKS * LAYER_BYTES, 1: NUM_BLOCKS * LAYER_BYTES}
        self.layout = made
        self.memory = {region: np.zeros(nbytes, dtype=np.uint8) for region, nbytes in sizes.items()}
        self.woken = threading.Event()
        space = BlockSpace.of(FINGERPRINT, made, namespace)
        self.pool = PoolAttachment(
            [address], space, made, self.memory, wake=self.woken.set, **{"deadline_s": WAIT_S, **settings}
        )

    def block(self, block_id: int) -> np.ndarray:
        """A copy of the block's bytes, part after part."""
        return np.concatenate([self.part(block_id, layer) for layer in self.layout.layers])

    def part(self, block_id: int, layer: LayerLayout) -> np.ndarray:
        at = layer.base + block_id * layer.block_stride
        return self.memory[layer.region][at : at + LAYER_BYTES]

    def fill(self, block_id: int, number: int) -> None:
        for layer, piece in zip(self.layout.layers, content(number).reshape(NUM_LAYERS, -1), strict=True):
            self.part(block_id, layer)[:] = piece

    def save(self, numbers: range, block_ids: list[int]) -> Pending[Any]:
        for number, block_id in zip(numbers, block_ids, strict=True):
            self.fill(block_id, number)
        return self.pool.save(names(numbers), block_ids, length=len(numbers))


def content(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, BLOCK, dtype=np.uint8)


def names(numbers: range) -> list[bytes]:
    return [number.to_bytes(32, "big") for number in numbers]


async def result(pending: Pending[Any]) -> Any:
    return await asyncio.to_thread(pending.result, WAIT_S)


@contextlib.asynccontextmanager
async def a_node(**settings: Any) -> AsyncIterator[PoolNode]:
    node = PoolNode(settings=PoolSettings(arena_bytes=64 * BLOCK, slab_bytes=BLOCK, **settings))
    await node.start()
    try:
        yield node
    finally:
        await node.close()
        node.check_integrity()


@contextlib.asynccontextmanager
async def ranks(*made: Rank) -> AsyncIterator[None]:
    try:
        yield
    finally:
        for rank in made:
            await asyncio.to_thread(rank.pool.close)


@pytest.mark.parametrize("transports", [("shm", "tcp"), ("tcp",)])
@pytest.mark.parametrize(("source", "target"), [(APART, MIXED), (MIXED, APART), (MIXED, MIXED)])
async def test_a_block_in_parts_comes_back_in_the_parts_of_whoever_loads_it(
    source: KVLayout, target: KVLayout, transports: tuple[str, ...]
) -> None:
    async with a_node() as node:
        here, there = (
            Rank(node.address, source, transports=transports),
            Rank(node.address, target, transports=transports),
        )
        async with ranks(here, there):
            saved = await result(here.save(range(4), [7, 3, 5, 0]))
            assert (saved.stored, saved.nbytes, saved.cause) == (4, 4 * BLOCK, None)
            there.memory[0][:] = there.memory[1][:] = 77
            assert await result(there.pool.lookup(names(range(5)))) == 4
            loaded = await result(there.pool.load(names(range(5)), [1, 15, 2, 8, 9]))
            assert (loaded.num_blocks, loaded.nbytes, dict(loaded.tiers)) == (
                4,
                4 * BLOCK,
                {"host": 4, "disk": 0, "remote": 0},
            )
            assert there.woken.is_set()
            for number, block_id in enumerate([1, 15, 2, 8]):
                assert (there.block(block_id) == content(number)).all()
            # T5: not a byte beside these blocks was touched.
            for block_id in set(range(NUM_BLOCKS)) - {1, 15, 2, 8}:
                assert (there.block(block_id) == 77).all()
            again = await result(here.save(range(2, 6), [1, 2, 3, 4]))
            assert (again.stored, again.duplicates) == (2, 2)
            stats = there.pool.stats()
            assert (stats.lookups, stats.loads, stats.loaded_blocks["host"], stats.missed_blocks) == (1, 1, 4, 1)
            assert (here.pool.stats().saved_blocks, here.pool.stats().saving_bytes) == (6, 0)
            assert not here.pool.stats().failures
            assert not stats.failures


async def test_blocks_of_another_layout_or_namespace_are_not_found() -> None:
    async with a_node() as node:
        here = Rank(node.address)
        other = Rank(node.address, layout(*[(0, 0, BLOCK)] * NUM_LAYERS, tp_size=2))
        tenant = Rank(node.address, namespace="tenant-b")
        async with ranks(here, other, tenant):
            await result(here.save(range(3), [0, 1, 2]))
            for rank in (other, tenant):
                assert await result(rank.pool.lookup(names(range(3)))) == 0
                assert (await result(rank.pool.load(names(range(3)), [4, 5, 6]))).num_blocks == 0
            assert await result(here.pool.lookup(names(range(3)))) == 3


@pytest.mark.parametrize("change", [{"opaque": "packed"}, {"tp_rank": 1, "tp_size": 2}, {"num_kv_heads": 1}])
def test_what_changes_a_blocks_bytes_changes_its_space(change: dict[str, Any]) -> None:
    import msgspec

    changed = msgspec.structs.replace(APART, **change)
    assert BlockSpace.of(FINGERPRINT, changed) != BlockSpace.of(FINGERPRINT, APART)
    moved = msgspec.structs.replace(APART, num_blocks=5, layers=MIXED.layers)
    assert BlockSpace.of(FINGERPRINT, moved) == BlockSpace.of(FINGERPRINT, APART)


async def test_a_load_that_is_cancelled_is_done_only_when_nothing_more_is_written() -> None:
    async with a_node() as node:
        here = Rank(node.address)
        async with ranks(here):
            await result(here.save(range(4), [0, 1, 2, 3]))
            engine = here.pool._nodes.home._engine
            transfer = engine._transfer
            reading, go_on = threading.Event(), threading.Event()

            def slow(*args: Any, **kwargs: Any) -> Any:
                made = transfer(*args, **kwargs)
                step = made.step

                def held() -> bool:
                    reading.set()
                    assert go_on.wait(WAIT_S)
                    return step()

                made.step = held  # type: ignore[method-assign]
                return made

            engine._transfer = slow  # type: ignore[method-assign]
            load = here.pool.load(names(range(4)), [8, 9, 10, 11])
            assert await asyncio.to_thread(reading.wait, WAIT_S)
            load.cancel()
            # The copy is under way: whoever asked for the end must not have these blocks back yet.
            await asyncio.to_thread(here.pool.lookup([]).result, WAIT_S)
            assert not load.done()
            go_on.set()
            loaded = await result(load)
            assert (loaded.num_blocks, loaded.cause) == (0, "cancelled")
            assert await eventually(lambda: node.stat().leases == 0)


async def test_a_queue_that_is_full_refuses_at_once_and_loads_go_first() -> None:
    async with a_node() as node:
        here = Rank(node.address, max_saving_bytes=3 * BLOCK)
        async with ranks(here):
            await result(here.save(range(100, 101), [15]))
            here.pool._loop.call_soon_threadsafe(here.pool._no_loads.clear)
            first = here.save(range(2), [0, 1])
            full = here.save(range(2, 4), [2, 3])
            assert full.done()
            assert (full.result().refused, full.result().cause) == (2, "pool_exhausted")
            fits = here.save(range(4, 5), [4])
            assert (await result(here.pool.load(names(range(100, 101)), [8]))).num_blocks == 1
            # That load was the last one, so saving goes on.
            assert (await result(first)).stored == 2
            assert (await result(fits)).stored == 1
            stats = here.pool.stats()
            assert (stats.refused_blocks, stats.saved_blocks, stats.saving_bytes) == (2, 4, 0)
            assert stats.failures == {"pool_exhausted": 1}
            assert (await result(here.save(range(10, 14), [0, 1, 2, 3]))).stored == 4


async def test_bytes_that_were_corrupted_on_the_wire_are_a_miss() -> None:
    async with a_node() as node:
        link = FaultyLink(node.address)
        here = Rank(node.address)
        far = Rank(link.address, transports=("tcp",))
        try:
            async with ranks(here, far):
                await result(here.save(range(8), list(range(8))))
                assert await result(far.pool.lookup(names(range(8)))) == 8
                link.corrupt_after(3 * BLOCK)
                loaded = await result(far.pool.load(names(range(8)), list(range(8))))
                assert loaded.num_blocks == 0
                assert loaded.cause in ("integrity_error", "transport_error", "peer_gone")
                assert sum(far.pool.stats().failures.values()) == 1

                async def loads() -> bool:
                    return bool((await result(far.pool.load(names(range(8)), list(range(8)))))[0] == 8)

                assert await eventually_async(loads)
                assert all((far.block(i) == content(i)).all() for i in range(8))
        finally:
            await asyncio.to_thread(link.close)


async def test_a_node_that_does_not_answer_costs_one_deadline_and_serves_again_later() -> None:
    async with a_node() as node:
        here = Rank(node.address)
        async with ranks(here):
            await result(here.save(range(2), [0, 1]))
            home = here.pool._nodes.home
            here.pool._deadline_s, home.deadline_s = 1.0, 0.9
            answer, node._engine.on_message = node._engine.on_message, lambda peer, payload: None
            assert (await result(here.pool.load(names(range(2)), [4, 5]))).cause == "transfer_timeout"
            # From here on the node hears, but is left alone for a while; by the machine's load a longer one.
            node._engine.on_message = answer
            here.pool._deadline_s = home.deadline_s = WAIT_S
            assert home._retry_at_s > 0.0
            home._retry_at_s += WAIT_S
            refused = await result(here.pool.load(names(range(2)), [4, 5]))
            assert (refused.num_blocks, refused.cause) == (0, "transport_error")
            home._retry_at_s -= WAIT_S

            async def loads() -> bool:
                return bool((await result(here.pool.load(names(range(2)), [4, 5]))).num_blocks == 2)

            assert await eventually_async(loads)


async def test_prefetch_brings_blocks_from_disk_before_they_are_loaded(tmp_path: Path) -> None:
    disk = {"disk_path": str(tmp_path), "disk_bytes": 64 * BLOCK}
    async with a_node(**disk) as node, ranks(here := Rank(node.address)):
        await result(here.save(range(4), [0, 1, 2, 3]))
    async with a_node(**disk) as node, ranks(here := Rank(node.address)):
        assert await result(here.pool.prefetch(names(range(5)))) == 4
        assert await eventually(lambda: node.counts["prefetched"] == 4)
        loaded = await result(here.pool.load(names(range(4)), [4, 5, 6, 7]))
        assert (loaded.num_blocks, loaded.tiers["host"], loaded.tiers["disk"]) == (4, 4, 0)
        assert all((here.block(4 + i) == content(i)).all() for i in range(4))


async def test_slabs_that_are_too_small_are_a_cause_said_once_and_no_crash(caplog: pytest.LogCaptureFixture) -> None:
    node = PoolNode(settings=PoolSettings(arena_bytes=1 << 20, slab_bytes=4096))
    await node.start()
    here = Rank(node.address)
    async with ranks(here):
        saved = await result(here.save(range(1), [0]))
        assert (saved.refused, saved.cause) == (1, "registration_error")
        assert (await result(here.save(range(1, 2), [0]))).cause == "registration_error"
        said = [record.getMessage() for record in caplog.records if record.name == "kvferry.pool.attachment"]
        assert said == ["the pool cannot serve this"]
    await node.close()


async def test_a_closed_attachment_answers_everything_with_a_miss() -> None:
    async with a_node() as node:
        here = Rank(node.address)
        async with ranks(here):
            pass
        assert here.pool.lookup(names(range(2))).result() == 0
        assert here.pool.load(names(range(2)), [0, 1]).result().cause == "transport_closed"
        assert here.pool.save(names(range(2)), [0, 1]).result().cause == "transport_closed"


def test_memory_that_does_not_fit_is_refused_at_once() -> None:
    space = BlockSpace.of(FINGERPRINT, APART)
    with pytest.raises(RegistrationError, match="leave a region"):
        PoolAttachment(["tcp://127.0.0.1:9"], space, APART, {0: np.zeros(BLOCK, dtype=np.uint8)})
    with pytest.raises(ConfigError, match="at least one node"):
        PoolAttachment([], space, APART, {})


async def eventually(check: Any) -> bool:
    async def ask() -> bool:
        return bool(check())

    return await eventually_async(ask)


async def eventually_async(check: Any) -> bool:
    until_s = time.monotonic() + WAIT_S
    while not await check():
        if time.monotonic() > until_s:
            return False
        await asyncio.sleep(0.02)
    return True
