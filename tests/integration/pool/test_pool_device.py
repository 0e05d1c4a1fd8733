"""KV blocks in GPU memory and the pool, with real nodes and a pretended GPU that does its work as late as it may.

Whatever a kernel touches must be GPU memory or pinned: the pretended GPU says what was not (`faults`).
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from kvferry.errors import ConfigError, RegistrationError, TransportError
from kvferry.layout import Fingerprint, KVLayout, LayerLayout
from kvferry.pool import BlockSpace, Pending, PoolAttachment, PoolNode, PoolSettings
from kvferry.testing.faults import FaultyLink
from pretended_gpu import DeviceTensor, FakeGpu, pretended_gpu

LAYER_BYTES, NUM_LAYERS, NUM_BLOCKS = 4096, 3, 48
BLOCK = LAYER_BYTES * NUM_LAYERS
STAGING_BYTES = 8 * BLOCK
"""Four pieces of two blocks."""

FINGERPRINT = Fingerprint("model", "float32", 16, NUM_LAYERS, 2, 8)
WAIT_S = 60.0


def layout(*layers: tuple[int, int, int]) -> KVLayout:
    """Layers as (region, base, stride)."""
    return KVLayout(NUM_BLOCKS, 16, LAYER_BYTES, 2, tuple(LayerLayout(*layer) for layer in layers))


APART = layout(*[(0, layer * NUM_BLOCKS * LAYER_BYTES, LAYER_BYTES) for layer in range(NUM_LAYERS)])
MIXED = layout((0, 112, 2 * LAYER_BYTES), (1, 0, LAYER_BYTES), (0, 112 + LAYER_BYTES, 2 * LAYER_BYTES))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    with pretended_gpu(monkeypatch) as fake:
        fake.late = fake.strict = True
        fake.pending = 2
        yield fake
        assert fake.faults == []
        assert fake.spans == {}, "something is still pinned"


class Rank:
    """One rank's KV memory on the GPU, or in host memory without one, and its attachment."""

    def __init__(self, address: str, gpu: FakeGpu | None, made: KVLayout = APART, **settings: Any) -> None:
        sizes = {0: 112 + NUM_LAYERS * NUM_BLOCKS * LAYER_BYTES, 1: NUM_BLOCKS * LAYER_BYTES}
        self.layout = made
        self.memory = {region: np.zeros(nbytes, dtype=np.uint8) for region, nbytes in sizes.items()}
        buffers: dict[int, Any] = dict(self.memory)
        if gpu is not None:
            buffers = {region: DeviceTensor(gpu, array) for region, array in self.memory.items()}
        space = BlockSpace.of(FINGERPRINT, made, "tenant-a")
        self.pool = PoolAttachment(
            [address], space, made, buffers, **{"staging_bytes": STAGING_BYTES, "deadline_s": WAIT_S, **settings}
        )

    def part(self, block_id: int, layer: LayerLayout) -> np.ndarray:
        at = layer.base + block_id * layer.block_stride
        return self.memory[layer.region][at : at + LAYER_BYTES]

    def block(self, block_id: int) -> np.ndarray:
        return np.concatenate([self.part(block_id, layer) for layer in self.layout.layers])

    def fill(self, block_id: int, number: int) -> None:
        for layer, piece in zip(self.layout.layers, content(number).reshape(NUM_LAYERS, -1), strict=True):
            self.part(block_id, layer)[:] = piece

    def save(self, numbers: range, block_ids: list[int]) -> Pending[Any]:
        for number, block_id in zip(numbers, block_ids, strict=True):
            self.fill(block_id, number)
        return self.pool.save(names(numbers), block_ids, length=len(numbers))

    @property
    def device(self) -> Any:
        return self.pool._device

    async def uses_arena(self, gpu: FakeGpu, numbers: range, block_ids: list[int]) -> bool:
        """Load until the node's memory is pinned."""

        async def pinned() -> bool:
            await result(self.pool.load(names(numbers), block_ids))
            return any(read_only for _, read_only in gpu.spans.values()) and any(self.device._arenas._pinned.values())

        return await eventually(pinned)


def content(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, BLOCK, dtype=np.uint8)


def names(numbers: range) -> list[bytes]:
    return [number.to_bytes(32, "big") for number in numbers]


async def result(pending: Pending[Any]) -> Any:
    return await asyncio.to_thread(pending.result, WAIT_S)


async def eventually(check: Any) -> bool:
    until_s = time.monotonic() + WAIT_S
    while not await check():
        if time.monotonic() > until_s:
            return False
        await asyncio.sleep(0.01)
    return True


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
        for rank in made:
            if rank.device is not None:
                assert rank.device.staging.num_free == rank.device.staging.num_pieces
    finally:
        for rank in made:
            await asyncio.to_thread(rank.pool.close)


@pytest.mark.parametrize("transports", [("shm", "tcp"), ("tcp",)])
@pytest.mark.parametrize(("source", "target"), [(APART, MIXED), (MIXED, APART)])
async def test_blocks_go_from_gpu_to_gpu_through_the_pool(
    gpu: FakeGpu, source: KVLayout, target: KVLayout, transports: tuple[str, ...]
) -> None:
    ids = [7, 3, 5, 0, 11, 2, 20]
    async with a_node() as node:
        here = Rank(node.address, gpu, source, transports=transports)
        there = Rank(node.address, gpu, target, transports=transports)
        async with ranks(here, there):
            saved = await result(here.save(range(7), ids))
            assert (saved.stored, saved.nbytes, saved.cause) == (7, 7 * BLOCK, None)
            for memory in there.memory.values():
                memory[:] = 77
            loaded = await result(there.pool.load(names(range(9)), list(range(30, 39))))
            assert (loaded.num_blocks, loaded.cause, loaded.transport) == (7, None, transports[0])
            for number in range(7):
                assert (there.block(30 + number) == content(number)).all()
            for block_id in set(range(NUM_BLOCKS)) - set(range(30, 37)):
                assert (there.block(block_id) == 77).all(), "a byte beside the blocks was touched"
            assert not here.pool.stats().failures and not there.pool.stats().failures


async def test_a_gpu_and_a_host_that_share_a_layout_share_blocks(gpu: FakeGpu) -> None:
    async with a_node() as node:
        on_gpu, on_host = Rank(node.address, gpu), Rank(node.address, None)
        async with ranks(on_gpu, on_host):
            assert (await result(on_host.save(range(3), [1, 2, 3]))).stored == 3
            assert (await result(on_gpu.save(range(5), [4, 5, 6, 7, 8]))).duplicates == 3
            assert (await result(on_gpu.pool.load(names(range(5)), [20, 21, 22, 23, 24]))).num_blocks == 5
            assert (await result(on_host.pool.load(names(range(5)), [20, 21, 22, 23, 24]))).num_blocks == 5
            for number in range(5):
                assert (on_gpu.block(20 + number) == content(number)).all()
                assert (on_host.block(20 + number) == content(number)).all()


async def test_what_this_hosts_node_has_is_copied_out_of_its_memory_by_the_gpu(gpu: FakeGpu) -> None:
    async with a_node() as node:
        here = Rank(node.address, gpu)
        async with ranks(here):
            await result(here.save(range(6), list(range(6))))
            assert await here.uses_arena(gpu, range(6), list(range(10, 16)))
            here.memory[0][10 * LAYER_BYTES :] = 0
            gpu.launches.clear()
            reads = count_reads(here)
            loaded = await result(here.pool.load(names(range(6)), list(range(20, 26))))
            assert (loaded.num_blocks, loaded.transport) == (6, "shm")
            assert all((here.block(20 + n) == content(n)).all() for n in range(6))
            assert gpu.launches == [6 * BLOCK], "one launch for all layers of all blocks"
            assert reads == [], "the host copies nothing"


async def test_what_waits_to_be_put_is_bounded_by_the_staging_memory(gpu: FakeGpu) -> None:
    async with a_node() as node:
        here = Rank(node.address, gpu)
        async with ranks(here):
            await result(here.save(range(100, 101), [47]))
            gpu.launches.clear()
            gate: Future[None] = Future()
            nodes, put = here.pool._nodes, here.pool._nodes.put
            puts: list[int] = []

            async def held_put(hashes: Any, parts: Any, places: Any, **more: Any) -> Any:
                puts.append(len(hashes))
                await asyncio.wrap_future(gate)
                return await put(hashes, parts, places, **more)

            nodes.put = held_put  # type: ignore[method-assign]
            save = here.save(range(20), list(range(20)))

            async def one_ahead() -> bool:
                return puts == [2] and sum(gpu.launches) == 4 * BLOCK

            assert await eventually(one_ahead)
            # A load finds room beside a save that is stuck.
            assert (await result(here.pool.load(names(range(100, 101)), [40]))).num_blocks == 1
            assert (here.block(40) == content(100)).all()
            assert sum(n for n in gpu.launches if n != BLOCK) == 4 * BLOCK, "no more than two pieces are copied ahead"
            gate.set_result(None)
            assert (await result(save)).stored == 20
            assert puts == [2] * 10


async def test_a_save_reads_nothing_any_more_once_it_is_cancelled(gpu: FakeGpu) -> None:
    async with a_node() as node:
        here = Rank(node.address, gpu)
        async with ranks(here):
            gpu.pending = 1 << 30
            save = here.save(range(6), list(range(6)))

            async def copying() -> bool:
                return bool(gpu.launches)

            assert await eventually(copying)
            save.cancel()
            await result(here.pool.lookup(names(range(1))))
            assert not save.done(), "the GPU still reads its blocks"
            gpu.pending = 0
            gpu.queries_left.clear()
            saved = await result(save)
            assert (saved.stored, saved.cause) == (0, "cancelled")
            here.memory[0][:] = 5
            assert len(gpu.launches) == 1
            assert (await result(here.pool.lookup(names(range(6))))) == 0


@pytest.mark.parametrize("direct", [False, True])
async def test_a_load_writes_nothing_any_more_once_it_is_cancelled(gpu: FakeGpu, direct: bool) -> None:
    async with a_node() as node:
        here = Rank(node.address, gpu)
        async with ranks(here):
            await result(here.save(range(6), list(range(6))))
            if direct:
                assert await here.uses_arena(gpu, range(1), [40])
            else:
                here.device._arenas.find = lambda *_: None
            gpu.launches.clear()
            gpu.pending = 1 << 30
            load = here.pool.load(names(range(6)), list(range(20, 26)))

            async def copying() -> bool:
                return bool(gpu.launches)

            assert await eventually(copying)
            load.cancel()
            await result(here.pool.lookup(names(range(1))))
            assert not load.done(), "the GPU still writes into its blocks"
            gpu.pending = 0
            gpu.queries_left.clear()
            loaded = await result(load)
            assert (loaded.num_blocks, loaded.cause) == (0, "cancelled")
            for block_id in range(20, 26):
                here.memory[0][block_id * LAYER_BYTES :][:LAYER_BYTES] = 9
            assert len(gpu.launches) == 1

            async def no_leases() -> bool:
                return node.stat().leases == 0

            assert await eventually(no_leases)


@pytest.mark.parametrize("direct", [False, True])
async def test_a_lease_that_ends_while_the_gpu_copies_makes_a_miss(gpu: FakeGpu, direct: bool) -> None:
    async with a_node() as node:
        here = Rank(node.address, gpu)
        async with ranks(here):
            await result(here.save(range(6), list(range(6))))
            if direct:
                assert await here.uses_arena(gpu, range(1), [40])
            else:
                here.device._arenas.find = lambda *_: None
            words = node._arena.words

            def end_leases() -> None:
                for lease in list(node._leases._leases.values()):
                    words.zero(lease.word_offset)

            gpu.on_launch = end_leases
            loaded = await result(here.pool.load(names(range(6)), list(range(20, 26))))
            gpu.on_launch = None
            assert (loaded.num_blocks, loaded.cause) == (0, "lease_expired")
            assert here.pool.stats().failures == {"lease_expired": 1}


async def test_a_gpu_that_fails_makes_misses_with_their_cause(gpu: FakeGpu) -> None:
    async with a_node() as node:
        here = Rank(node.address, gpu)
        async with ranks(here):
            await result(here.save(range(2), [0, 1]))

            def fail() -> None:
                raise TransportError("work on the GPU failed: pretended")

            gpu.on_launch = fail
            assert (await result(here.save(range(10, 14), [4, 5, 6, 7]))).cause == "transport_error"
            assert (await result(here.pool.load(names(range(2)), [8, 9]))).cause == "transport_error"
            gpu.on_launch = None
            assert (await result(here.save(range(10, 14), [4, 5, 6, 7]))).stored == 4
            assert (await result(here.pool.load(names(range(2)), [8, 9]))).num_blocks == 2


async def test_bytes_that_were_corrupted_on_the_wire_are_a_miss(gpu: FakeGpu) -> None:
    async with a_node() as node:
        link = FaultyLink(node.address)
        here, far = Rank(node.address, gpu), Rank(link.address, gpu, transports=("tcp",))
        try:
            async with ranks(here, far):
                await result(here.save(range(8), list(range(8))))
                assert await result(far.pool.lookup(names(range(8)))) == 8
                link.corrupt_after(3 * BLOCK)
                loaded = await result(far.pool.load(names(range(8)), list(range(8))))
                assert loaded.num_blocks == 0
                assert loaded.cause in ("integrity_error", "transport_error", "peer_gone")

                async def loads() -> bool:
                    return bool((await result(far.pool.load(names(range(8)), list(range(8))))).num_blocks == 8)

                assert await eventually(loads)
                assert all((far.block(i) == content(i)).all() for i in range(8))
        finally:
            await asyncio.to_thread(link.close)


async def test_the_memory_of_a_node_that_is_gone_is_let_go_of_at_once(gpu: FakeGpu) -> None:
    async with a_node() as first:
        here = Rank(first.address, gpu)
        async with ranks(here):
            await result(here.save(range(2), [0, 1]))
            assert await here.uses_arena(gpu, range(2), [4, 5])
            await first.close()

            async def let_go() -> bool:
                return not any(read_only for _, read_only in gpu.spans.values())

            assert await eventually(let_go)
            assert (await result(here.pool.load(names(range(2)), [4, 5]))).num_blocks == 0


async def test_a_gpu_that_does_not_take_the_nodes_memory_costs_one_copy_more(
    gpu: FakeGpu, caplog: pytest.LogCaptureFixture
) -> None:
    runtime: Any = sys.modules["kvferry.transport.cuda_runtime"]
    pin = runtime.pin

    def refuse(address: int, nbytes: int, *, read_only: bool = False) -> bool:
        if read_only:
            raise RegistrationError("cannot be pinned: not supported")
        return bool(pin(address, nbytes))

    runtime.pin = refuse
    async with a_node() as node:
        here = Rank(node.address, gpu)
        async with ranks(here):
            await result(here.save(range(3), [0, 1, 2]))
            for _ in range(3):
                assert (await result(here.pool.load(names(range(3)), [20, 21, 22]))).num_blocks == 3
            assert all((here.block(20 + n) == content(n)).all() for n in range(3))
    said = [record.getMessage() for record in caplog.records if "cannot be pinned" in record.getMessage()]
    assert len(said) == 1


@pytest.mark.parametrize("call", ["pin", "allocate"])
def test_a_gpu_that_cannot_copy_is_an_error_at_the_start_and_nothing_stays_pinned(
    gpu: FakeGpu, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RegistrationError("pretended: no")

    monkeypatch.setattr(sys.modules["kvferry.transport.cuda_runtime"], call, refuse)
    with pytest.raises(RegistrationError, match="pretended"):
        Rank("tcp://127.0.0.1:9", gpu)


def test_memory_of_two_kinds_or_without_the_packages_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeGpu()
    space = BlockSpace.of(FINGERPRINT, MIXED, "tenant-a")
    nbytes = 112 + NUM_LAYERS * NUM_BLOCKS * LAYER_BYTES
    with pytest.raises(ConfigError, match="cpu, cuda:1"):
        buffers = {0: DeviceTensor(fake, np.zeros(nbytes, np.uint8)), 1: np.zeros(nbytes, np.uint8)}
        PoolAttachment(["tcp://127.0.0.1:9"], space, MIXED, buffers)
    monkeypatch.delitem(sys.modules, "kvferry.pool.device", raising=False)
    monkeypatch.setitem(sys.modules, "kvferry.transport.cuda_runtime", None)
    with pytest.raises(ConfigError, match="cuda-bindings and triton"):
        Rank("tcp://127.0.0.1:9", fake)


def count_reads(rank: Rank) -> list[int]:
    """Reads of bytes by the rank's transfer engine from now on."""
    engine, seen = rank.pool._nodes.home._engine, []
    read = engine.read

    async def counted(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return await read(*args, **kwargs)

    engine.read = counted  # type: ignore[method-assign]
    return seen
