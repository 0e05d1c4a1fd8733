"""Copies started by `_gpu.c`, over a driver that is a small C library of the tests."""

from __future__ import annotations

import ctypes
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvferry.errors import TransportError

pytest.importorskip("triton")
direct = pytest.importorskip("kvferry.transport.cuda_direct")
if direct.in_c is None:
    pytest.skip("the C part was not built", allow_module_level=True)

from kvferry.transport.cuda_kernels import Tile  # noqa: E402

SOURCE = Path(__file__).with_name("fake_driver.c")
TILE = Tile(1, 4096, 8)
BASE_BYTES = 1 << 16


class Kernels:
    """Stands for Triton's launcher: the number of a kernel, its threads and shared memory."""

    function, word = 1, 4

    def word_handle(self, low: int) -> int:
        return self.word

    def handle(self, tile: Tile) -> tuple[int, int, int]:
        return self.function, 32 * tile.warps, 48


class Memory:
    """Source and target of random bytes, 16-byte aligned, and room for a table on both sides."""

    def __init__(self) -> None:
        self._kept = np.random.default_rng(1).integers(0, 256, 2 * BASE_BYTES + 64, dtype=np.uint8)
        at = -self._kept.ctypes.data % 64
        self.source, self.target = self._kept[at : at + BASE_BYTES], self._kept[at + BASE_BYTES : at + 2 * BASE_BYTES]
        self.table, self.on_device = np.zeros(512, dtype=np.int64), np.zeros(512, dtype=np.int64)

    def run(self, sources: list[int], targets: list[int], nbytes: int) -> Any:
        return (
            np.array(sources), self.source.ctypes.data, np.array(targets), self.target.ctypes.data, nbytes, "device"
        )  # fmt: skip

    def slot(self, *, uploaded: bool = False, behind: int = 0) -> Any:
        on_device = self.on_device.ctypes.data if uploaded else 0
        return direct.Slot(self.table.ctypes.data, on_device, 5, behind, 7)


class Run(tuple):  # type: ignore[type-arg]
    """The fields that are asked for by name."""

    nbytes = property(lambda self: self[4])


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("driver") / "libfake.so"
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(out), str(SOURCE)], check=True, timeout=60)
    return out


@pytest.fixture
def driver(library: Path) -> Iterator[Any]:
    loaded = ctypes.CDLL(str(library))
    names = ("launches", "uploads", "waits", "queries_left", "fail_with", "last_grid", "last_threads",
             "last_shared")  # fmt: skip

    class Driver:
        def __getattr__(self, name: str) -> int:
            return ctypes.c_long.in_dll(loaded, name).value

        def __setattr__(self, name: str, value: int) -> None:
            ctypes.c_long.in_dll(loaded, name).value = value

    seen = Driver()
    for name in names:
        setattr(seen, name, 0)
    yield seen
    seen.fail_with = 0


@pytest.fixture
def starter(driver: Any, library: Path) -> Any:
    made = direct.Direct.open(Kernels(), str(library))
    assert made is not None
    return made


@pytest.fixture
def memory() -> Memory:
    return Memory()


def copied(memory: Memory, sources: list[int], targets: list[int], nbytes: int) -> np.ndarray[Any, Any]:
    wanted = memory.target.copy()
    for source, target in zip(sources, targets, strict=True):
        wanted[target : target + nbytes] = memory.source[source : source + nbytes]
    return wanted


@pytest.mark.parametrize("uploaded", [False, True])
def test_a_part_of_a_run_is_copied_and_nothing_else(starter: Any, driver: Any, memory: Memory, uploaded: bool) -> None:
    sources, targets = [0, 4096, 64, 128], [512, 0, 8192, 1024]
    wanted = copied(memory, sources[1:3], targets[1:3], 256)
    slot = memory.slot(uploaded=uploaded, behind=9)
    assert starter.start(Run(memory.run(sources, targets, 256)), 1, 3, slot, TILE, 132)
    assert np.array_equal(memory.target, wanted)
    assert (driver.launches, driver.uploads, driver.waits) == (1, int(uploaded), 1)
    assert (driver.last_grid, driver.last_threads, driver.last_shared) == (2, 256, 48)


def test_bases_of_each_block(starter: Any, driver: Any, memory: Memory) -> None:
    wanted = copied(memory, [0, 4096], [512, 0], 64)
    bases = np.array([memory.source.ctypes.data, memory.source.ctypes.data + 4096])
    run = Run((np.zeros(2, dtype=np.int64), bases, np.array([512, 0]), memory.target.ctypes.data, 64, "peer"))
    assert starter.start(run, 0, 2, memory.slot(), TILE, 1)
    assert np.array_equal(memory.target, wanted) and driver.last_grid == 1


@pytest.mark.parametrize(("sources", "targets"), [([0, 8], [0, 64]), ([0, 64], [0, 4])])
def test_addresses_off_16_are_left_to_the_kernel_for_bytes(
    starter: Any, driver: Any, memory: Memory, sources: list[int], targets: list[int]
) -> None:
    assert not starter.start(Run(memory.run(sources, targets, 16)), 0, 2, memory.slot(uploaded=True), TILE, 132)
    assert (driver.launches, driver.uploads) == (0, 0)


@pytest.mark.parametrize(("function", "usable"), [(2, True), (3, False)])
def test_a_kernel_with_other_parameters_is_not_launched(
    starter: Any, driver: Any, memory: Memory, monkeypatch: pytest.MonkeyPatch, function: int, usable: bool
) -> None:
    monkeypatch.setattr(Kernels, "function", function)
    assert starter.start(Run(memory.run([0], [0], 64)), 0, 1, memory.slot(), TILE, 132) is usable
    assert driver.launches == int(usable)


def test_a_driver_that_refuses_is_a_transport_error(starter: Any, driver: Any, memory: Memory) -> None:
    driver.fail_with = 719
    run = Run(memory.run([0], [0], 64))
    with pytest.raises(TransportError, match="719"):
        starter.start(run, 0, 1, memory.slot(), TILE, 1)
    with pytest.raises(TransportError, match="719"):
        starter.wait(7, 0.0)


def test_the_wait_ends_with_the_event_or_with_its_time(starter: Any, driver: Any) -> None:
    driver.queries_left = 1000
    assert starter.wait(7, 60.0)
    assert driver.queries_left == -1
    driver.queries_left = 1 << 40
    assert not starter.wait(7, 0.001)


def test_more_blocks_than_offsets_are_refused(starter: Any, driver: Any, memory: Memory) -> None:
    with pytest.raises(ValueError, match="offsets"):
        starter.start(Run(memory.run([0], [0], 64)), 0, 2, memory.slot(), TILE, 1)
    assert driver.launches == 0


def test_without_a_driver_there_is_none() -> None:
    assert direct.Direct.open(Kernels(), "libnone.so") is None


def test_a_word_is_loaded_behind_the_other_half(starter: Any, driver: Any, memory: Memory) -> None:
    word = memory.source.ctypes.data + 8
    assert starter.load_word(word, memory.table.ctypes.data, memory.slot(behind=9))
    assert memory.table[0] == memory.source[8:16].view(np.int64)[0]
    assert (driver.launches, driver.waits, driver.last_threads) == (1, 1, 32)
    driver.fail_with = 719
    with pytest.raises(TransportError, match="719"):
        starter.load_word(word, memory.table.ctypes.data, memory.slot())


def test_a_word_kernel_with_other_parameters_is_not_launched(
    starter: Any, driver: Any, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Kernels, "word", 1)
    assert not starter.load_word(memory.source.ctypes.data, memory.table.ctypes.data, memory.slot())
    assert driver.launches == 0
