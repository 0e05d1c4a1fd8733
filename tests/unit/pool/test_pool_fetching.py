"""A get's bytes over a network: steps at once, each checked, and nothing under way any more when it is over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xxhash

from kvferry.errors import IntegrityError, TransferTimeout
from kvferry.pool import fetching
from kvferry.pool.fetching import fetch_blocks
from kvferry.pool.messages import Leased
from kvferry.pool.parts import whole
from kvferry.transport.base import BlockList, Region
from kvferry.transport.memory import SharedBuffer

BLOCK, NUM_BLOCKS = 4096, 8
Read = Callable[[list[BlockList]], Awaitable[None]]


class Network:
    """A node's arena behind a transport that does what a test says with each step."""

    def __init__(self, read: Read, scheme: str = "tcp") -> None:
        self._read, self._scheme = read, scheme
        self.steps: list[int] = []
        self.under_way = self.most_under_way = 0

    def explain(self, peer: Any) -> list[Any]:
        return [SimpleNamespace(scheme="shm", usable=self._scheme == "shm"), SimpleNamespace(scheme="tcp", usable=True)]

    async def read(self, peer: Any, blocks: list[BlockList], *, guard: Any, deadline_s: float) -> Any:
        self.steps.append(len(blocks[0].source_offsets))
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await self._read(blocks)
        finally:
            self.under_way -= 1
        return SimpleNamespace(transport=self._scheme)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "STEP_BYTES", 2 * BLOCK)
    monkeypatch.setattr(fetching, "LEAST_STEP_BYTES", BLOCK)


class Here:
    """This side's memory, and the arena's bytes."""

    def __init__(self) -> None:
        self._memory = SharedBuffer(NUM_BLOCKS * BLOCK)
        self.region = Region(3, self._memory.address, self._memory.nbytes, "0" * 32, buffer=self._memory.array)
        self.arena = np.random.default_rng(1).integers(0, 256, NUM_BLOCKS * BLOCK, dtype=np.uint8)
        self.places = np.arange(NUM_BLOCKS, dtype=np.int64)[::-1] * BLOCK
        offsets = np.arange(NUM_BLOCKS, dtype=np.int64) * BLOCK
        digests = [xxhash.xxh3_64_intdigest(self.arena[at : at + BLOCK].tobytes()) for at in offsets.tolist()]
        self.lease = Leased(1, [True] * NUM_BLOCKS, 9, offsets.tolist(), digests, 0, 5, 0)

    async def fetch(self, network: Network) -> str:
        peer: Any = SimpleNamespace(name="node", regions={9: SimpleNamespace(region_id=9)})
        engine: Any = network
        parts, regions = whole(self.region, BLOCK), {3: self.region}
        until_s = time.monotonic() + 60
        return await fetch_blocks(
            engine, peer, self.lease, parts=parts, places=self.places, regions=regions, until_s=until_s
        )

    async def copy(self, blocks: list[BlockList]) -> None:
        for run in blocks:
            for source, target in zip(run.source_offsets.tolist(), run.target_offsets.tolist(), strict=True):
                self.region.buffer[target : target + run.nbytes] = self.arena[source : source + run.nbytes]


async def test_two_steps_are_under_way_at_once_and_every_block_comes() -> None:
    here, both = Here(), asyncio.Barrier(2)

    async def read(blocks: list[BlockList]) -> None:
        await both.wait()
        await here.copy(blocks)

    network = Network(read)
    assert await here.fetch(network) == "tcp"
    assert network.steps == [2, 2, 2, 2]
    assert network.most_under_way == 2
    assert np.array_equal(here.region.buffer.reshape(NUM_BLOCKS, BLOCK)[::-1].reshape(-1), here.arena)


async def test_the_same_host_s_memory_is_copied_in_one_step() -> None:
    here = Here()
    network = Network(here.copy, scheme="shm")
    assert await here.fetch(network) == "shm"
    assert network.steps == [NUM_BLOCKS]


@pytest.mark.parametrize("block", range(NUM_BLOCKS))
async def test_one_wrong_block_in_any_step_is_found(block: int) -> None:
    here = Here()

    async def read(blocks: list[BlockList]) -> None:
        await here.copy(blocks)
        if here.places[block] in blocks[0].target_offsets:
            here.region.buffer[here.places[block] + 17] ^= 1

    with pytest.raises(IntegrityError, match=f"place {here.places[block]} "):
        await here.fetch(Network(read))


async def test_a_step_that_fails_ends_the_other_one_before_the_get_ends() -> None:
    here, other_began, ended = Here(), asyncio.Event(), list[str]()

    async def read(blocks: list[BlockList]) -> None:
        if blocks[0].source_offsets[0] == 0:
            await other_began.wait()
            raise TransferTimeout("late")
        other_began.set()
        try:
            await asyncio.Event().wait()
        finally:
            # A link takes a moment to stop.
            await asyncio.sleep(0)
            ended.append("other")

    network = Network(read)
    with pytest.raises(TransferTimeout, match="late"):
        await here.fetch(network)
    assert ended == ["other"]
    assert network.under_way == 0
    assert network.steps == [2, 2]


async def test_a_get_that_is_given_up_has_no_step_under_way_any_more() -> None:
    here, began = Here(), asyncio.Barrier(3)

    async def read(blocks: list[BlockList]) -> None:
        await began.wait()
        await asyncio.Event().wait()

    network = Network(read)
    get = asyncio.create_task(here.fetch(network))
    await began.wait()
    get.cancel()
    with pytest.raises(asyncio.CancelledError):
        await get
    assert network.under_way == 0
