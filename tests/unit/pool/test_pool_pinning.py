"""A node's memory is pinned once, step by step, and let go of when the node is gone, but never under a copy."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvferry.errors import RegistrationError, TransportClosed
from pretended_gpu import FakeGpu, pretended_gpu

STEP = 4096


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    with pretended_gpu(monkeypatch) as fake:
        monkeypatch.setattr(importlib.import_module("kvferry.pool.pinning"), "STEP_BYTES", STEP)
        yield fake


class Node:
    """A peer with one region, and the engine that maps it."""

    def __init__(self, nbytes: int = 3 * STEP + 100) -> None:
        self.view: Any = np.zeros(nbytes, dtype=np.uint8)
        self.regions = {4: SimpleNamespace(token="t")}
        self.lost: TransportClosed | None = None
        self.name = "node"
        self.mapped_times = 0

    def mapped(self, peer: Any, region_id: int) -> Any:
        self.mapped_times += 1
        return self.view


class Arenas:
    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(1)
        self.arenas = importlib.import_module("kvferry.pool.pinning").PinnedArenas(self._threads)

    def find(self, node: Node) -> Any:
        return self.arenas.find(node, node, 4)

    async def settle(self) -> None:
        """Until nothing is being pinned or unpinned."""
        while self.arenas._tasks:
            await asyncio.wait(self.arenas._tasks)

    async def close(self) -> None:
        await self.arenas.close()
        self._threads.shutdown()


async def test_it_is_there_once_all_of_it_is_pinned_and_mapped_once(gpu: FakeGpu) -> None:
    made, node = Arenas(), Node()
    first = node.view.ctypes.data
    assert made.find(node) is None
    assert made.find(node) is None
    await made.settle()
    arena = made.find(node)
    assert (arena.address, node.mapped_times) == (first, 1)
    sizes = [STEP, STEP, STEP, 100]
    assert gpu.spans == {first + i * STEP: (n, True) for i, n in enumerate(sizes)}
    await made.close()
    assert gpu.spans == {}
    assert made.find(node) is None


async def test_what_is_not_mapped_here_is_asked_for_once(gpu: FakeGpu) -> None:
    made, node = Arenas(), Node()
    node.view = None
    for _ in range(3):
        assert made.find(node) is None
        await made.settle()
    assert node.mapped_times == 1
    assert gpu.pinned == []
    await made.close()


async def test_a_node_that_is_gone_keeps_its_memory_only_as_long_as_a_copy_runs(gpu: FakeGpu) -> None:
    made, node = Arenas(), Node()
    made.find(node)
    await made.settle()
    arena = made.find(node)
    with arena, arena:
        node.lost = TransportClosed("gone")
        made.arenas.lost(node)
        await made.settle()
        assert len(gpu.spans) == 4
        assert made.find(node) is None
    await made.settle()
    assert gpu.spans == {}
    await made.close()


async def test_a_node_that_goes_while_its_memory_is_pinned_leaves_nothing(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, node = Arenas(), Node()
    cuda: Any = importlib.import_module("kvferry.pool.pinning").cuda
    pin, begun, go_on = cuda.pin, Future[None](), Future[None]()

    def slow(address: int, nbytes: int, *, read_only: bool) -> bool:
        if not begun.done():
            begun.set_result(None)
        go_on.result(30)
        return bool(pin(address, nbytes, read_only=read_only))

    monkeypatch.setattr(cuda, "pin", slow)
    made.find(node)
    await asyncio.wrap_future(begun)
    made.arenas.lost(node)
    go_on.set_result(None)
    await made.settle()
    assert len(gpu.pinned) == 1, "it stops at the next step"
    assert gpu.spans == {}
    await made.close()


async def test_a_gpu_that_refuses_in_the_middle_keeps_nothing_and_is_asked_no_more(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made, node = Arenas(), Node()
    cuda: Any = importlib.import_module("kvferry.pool.pinning").cuda
    pin = cuda.pin

    def refuse(address: int, nbytes: int, *, read_only: bool) -> bool:
        if len(gpu.pinned) == 2:
            raise RegistrationError("no more")
        return bool(pin(address, nbytes, read_only=read_only))

    monkeypatch.setattr(cuda, "pin", refuse)
    for _ in range(3):
        assert made.find(node) is None
        await made.settle()
    assert len(gpu.pinned) == 2
    assert gpu.spans == {}
    assert caplog.text.count("cannot be pinned") == 1
    await made.close()
