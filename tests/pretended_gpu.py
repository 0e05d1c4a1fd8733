"""A GPU for tests without one: its memory is host memory, its kernels are memmove. No triton, no CUDA."""

from __future__ import annotations

import ctypes
import importlib
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from kvferry.transport.checksum import SUM, sums_of_blocks

PACKAGES = {
    "kvferry.transport": (
        "cuda",
        "cuda_merge",
        "cuda_copy",
        "cuda_direct",
        "cuda_lanes",
        "cuda_runtime",
        "cuda_kernels",
    ),
    "kvferry.pool": ("device", "pinning"),
}


class Tile(NamedTuple):
    rows: int
    cols: int
    warps: int


class DeviceTensor:
    """An array, uint8 [nbytes], as one that lies in the pretended GPU's memory, as torch would show it."""

    def __init__(self, gpu: FakeGpu, array: npt.NDArray[np.uint8]) -> None:
        self.array = array
        self.device = SimpleNamespace(type="cuda", index=1)
        self.shape = array.shape
        gpu.tensors[self.data_ptr()] = array.size

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def is_contiguous(self) -> bool:
        return True

    def numel(self) -> int:
        return self.array.size

    def element_size(self) -> int:
        return 1


class FakeGpu:
    """What was asked of the GPU.

    `pending` is how many queries an event stays unfinished for. With `late`, what was launched is done only as an event
    behind it is seen to be; with `strict`, all that kernels touch must be a `DeviceTensor` or pinned: `faults` has what
    was not.
    """

    def __init__(self) -> None:
        self.launches: list[int] = []
        self.uploads: list[int] = []
        self.opened: list[int] = []
        self.closed: list[int] = []
        self.pinned: list[int] = []
        self.unpinned: list[int] = []
        self.pending = 0
        self.queries_left: dict[int, int] = {}
        self.unfinished_at_raise = 0
        self.on_launch: Any = None
        self.late = self.strict = False
        self.faults: list[str] = []
        self.tensors: dict[int, int] = {}
        self.spans: dict[int, tuple[int, bool]] = {}
        self._enqueued: dict[int, list[Callable[[], None]]] = defaultdict(list)
        self._behind: dict[int, tuple[int, int]] = {}
        self._lock = threading.RLock()
        self._next = 1000
        self._kept: list[Any] = []

    def number(self) -> int:
        self._next += 1
        return self._next

    def memory(self, nbytes: int) -> int:
        block = np.zeros(nbytes + 64, dtype=np.uint8)
        self._kept.append(block)
        return block.ctypes.data + -block.ctypes.data % 64

    def record(self, event: int, stream: int) -> None:
        self.queries_left[event] = self.pending
        self._behind[event] = stream, len(self._enqueued[stream])

    def is_done(self, event: int) -> bool:
        with self._lock:
            left = self.queries_left.get(event, 0)
            self.queries_left[event] = max(0, left - 1)
            if left == 0 and event in self._behind:
                stream, count = self._behind.pop(event)
                for work in self._enqueued[stream][:count]:
                    work()
                self._enqueued[stream][:count] = [_nothing] * min(count, len(self._enqueued[stream]))
            return left == 0

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        if self.late:
            self._enqueued[stream].append(work)
        else:
            work()

    def copy(self, table: int, n: int, nbytes: int) -> None:
        at = np.frombuffer((ctypes.c_int64 * (2 * n)).from_address(table), dtype=np.int64)
        for source, target in zip(at[:n].tolist(), at[n:].tolist(), strict=True):
            if self.strict:
                self.require(source, nbytes, writing=False)
                self.require(target, nbytes, writing=True)
            ctypes.memmove(target, source, nbytes)

    def sum(self, table: int, n: int, nbytes: int, sums: int) -> None:
        """Adds to what is there, as the kernel does."""
        for row, source in enumerate(np.frombuffer((ctypes.c_int64 * n).from_address(table), dtype=np.int64).tolist()):
            block = np.frombuffer((ctypes.c_uint8 * nbytes).from_address(source), dtype=np.uint8)
            to = ctypes.c_int64.from_address(sums + 8 * row)
            to.value += int(sums_of_blocks(block, np.zeros(1, dtype=np.int64), nbytes)[0])

    def require(self, address: int, nbytes: int, *, writing: bool) -> None:
        for start, size in list(self.tensors.items()):
            if start <= address and address + nbytes <= start + size:
                return
        for start, (size, read_only) in list(self.spans.items()):
            if start <= address and address + nbytes <= start + size and not (read_only and writing):
                return
        self.faults.append(f"{'write to' if writing else 'read of'} {nbytes} bytes at {address:#x}")

    def runtime(self) -> ModuleType:
        module: Any = ModuleType("kvferry.transport.cuda_runtime")
        gpu = self

        class IpcHandle(NamedTuple):
            handle: bytes
            offset: int

        class PinnedArray:
            def __init__(self, count: int) -> None:
                self.address = gpu.memory(count * 8)
                self.values = np.frombuffer((ctypes.c_int64 * count).from_address(self.address), dtype=np.int64)

            def close(self) -> None:
                pass

        def enter(device: int) -> int:
            return device

        def leave(before: int, device: int) -> None:
            pass

        def wait_for(stream: int, event: int) -> None:
            pass

        @contextmanager
        def use(device: int) -> Iterator[None]:
            yield

        def ipc_handle(address: int, nbytes: int, device: int) -> IpcHandle:
            return IpcHandle((address - 64).to_bytes(8, "little"), 64)

        def open_ipc_handle(handle: bytes) -> int:
            gpu.opened.append(int.from_bytes(handle, "little"))
            return gpu.opened[-1]

        def pin(address: int, nbytes: int, *, read_only: bool = False) -> bool:
            gpu.pinned.append(address)
            gpu.spans[address] = nbytes, read_only
            return True

        def unpin(address: int) -> None:
            gpu.unpinned.append(address)
            del gpu.spans[address]

        def upload(target: int, source: int, nbytes: int, stream: int) -> None:
            gpu.uploads.append(nbytes)
            gpu.enqueue(stream, lambda: ctypes.memmove(target, source, nbytes) and None)

        def zero(address: int, nbytes: int, stream: int) -> None:
            gpu.enqueue(stream, lambda: ctypes.memset(address, 0, nbytes) and None)

        def download(target: int, source: int, nbytes: int, stream: int) -> None:
            gpu.enqueue(stream, lambda: ctypes.memmove(target, source, nbytes) and None)

        module.DRIVER = "none on a pretended GPU"
        module.IpcHandle, module.PinnedArray, module.use = IpcHandle, PinnedArray, use
        module.ipc_handle, module.open_ipc_handle, module.pin, module.upload = ipc_handle, open_ipc_handle, pin, upload
        module.zero, module.download = zero, download
        module.device_uuids = lambda: ["aa" * 16, "bb" * 16]
        module.close_ipc_handle = gpu.closed.append
        module.unpin = unpin
        module.enable_peer_access = lambda device: None
        module.allocate, module.free = gpu.memory, lambda address: None
        module.new_stream = module.new_event = gpu.number
        module.destroy_stream = module.destroy_event = lambda handle: None
        module.enter, module.leave, module.wait_for = enter, leave, wait_for
        module.record, module.is_done = gpu.record, gpu.is_done
        return module

    def kernels(self) -> ModuleType:
        module: Any = ModuleType("kvferry.transport.cuda_kernels")
        gpu = self

        class Launcher:
            def warm(self, nbytes: int, total_bytes: int, *modes: int) -> None:
                pass

            def copy(
                self, table: int, n: int, nbytes: int, *, stream: int, mode: int = 0, sums: int = 0, **_: Any
            ) -> None:
                if mode != SUM:
                    gpu.enqueue(stream, lambda: gpu.copy(table, n, nbytes))
                if mode:
                    gpu.enqueue(stream, lambda: gpu.sum(table, n, nbytes, sums))
                gpu.launches.append(n * nbytes)
                if gpu.on_launch is not None:
                    gpu.on_launch()

            def load_word(self, word: int, slot: int, *, stream: int) -> None:
                gpu.enqueue(stream, lambda: ctypes.memmove(slot, word, 8) and None)

        module.Launcher, module.Tile, module.LARGE_LAUNCH_BYTES = Launcher, Tile, 8 << 20
        module.tile_for = lambda nbytes, total_bytes: Tile(1, 4096, 8)
        module.num_tiles = lambda n, nbytes, tile, unit_bytes: n
        module.is_aligned = lambda table: not int(np.bitwise_or.reduce(table)) & 15
        return module


def _nothing() -> None:
    pass


@contextmanager
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """What imports the CUDA modules meanwhile gets the pretended ones."""
    fake = FakeGpu()
    _forget(monkeypatch)
    monkeypatch.setitem(sys.modules, "kvferry.transport.cuda_runtime", fake.runtime())
    monkeypatch.setitem(sys.modules, "kvferry.transport.cuda_kernels", fake.kernels())
    package = importlib.import_module("kvferry.transport")
    for name in ("cuda_runtime", "cuda_kernels"):
        monkeypatch.setattr(package, name, sys.modules[f"kvferry.transport.{name}"], raising=False)
    yield fake
    for package_name, names in PACKAGES.items():
        for name in names:
            if name in ("cuda_runtime", "cuda_kernels"):
                continue
            sys.modules.pop(f"{package_name}.{name}", None)
            package = importlib.import_module(package_name)
            if hasattr(package, name):
                delattr(package, name)


def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    for package, names in PACKAGES.items():
        for name in names:
            monkeypatch.delitem(sys.modules, f"{package}.{name}", raising=False)
