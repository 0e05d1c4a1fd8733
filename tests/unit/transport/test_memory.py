"""Shared buffers, words, vectors and copies: everything below the links, in one process."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvferry.errors import (
    ConfigError,
    HandoffAborted,
    PoolExhausted,
    RegistrationError,
    TransferTimeout,
    TransportError,
)
from kvferry.transfer.regions import RegionTable
from kvferry.transport import copying
from kvferry.transport.base import BlockList, Region, RemoteRegion, StopToken
from kvferry.transport.copying import (
    DEAD,
    OTHER_WORD,
    STANDS,
    UNREGISTERED,
    Limits,
    batches,
    copy_blocks,
    copy_checked,
    copy_list,
    slices,
)
from kvferry.transport.memory import SharedBuffer, WordTable, find_backing, size_is_sealed
from kvferry.transport.registry import TransportContext, TransportSettings, create_transport, register_transport
from kvferry.transport.tcp import split_address
from kvferry.transport.vectors import VectorCursor, digest_of, merge_adjacent, vectors_of
from kvferry.types import new_incarnation

WITH_AND_WITHOUT_C = [pytest.param(True, id="c"), pytest.param(False, id="python")]


@pytest.fixture(params=WITH_AND_WITHOUT_C)
def either_copy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test with the C module and without it."""
    if request.param and copying._copy is None:
        pytest.skip("built without a C compiler")
    if not request.param:
        monkeypatch.setattr(copying, "_copy", None)


def region_of(array: Any) -> Region:
    return Region(1, array.ctypes.data, array.nbytes, "00", buffer=array)


def test_a_shared_buffer_is_zeroed_sealed_and_gone_with_its_last_view() -> None:
    buffer = SharedBuffer(10_000, name="kvferry-test-gone")
    view = buffer.array[5:]
    assert not buffer.array.any() and buffer.array.nbytes == 10_000
    assert size_is_sealed(buffer.fd)
    with pytest.raises(OSError):
        os.ftruncate(buffer.fd, 10)
    del buffer
    view[:] = 7
    assert "kvferry-test-gone" in Path("/proc/self/maps").read_text()
    del view
    gc.collect()
    assert "kvferry-test-gone" not in Path("/proc/self/maps").read_text()


def test_views_of_a_shared_buffer_find_their_backing() -> None:
    buffer = SharedBuffer(8192)
    view = buffer.array[100:200]
    found = find_backing(view.ctypes.data, view.nbytes)
    assert found is not None and found[0] is buffer and found[1] == 100
    private = np.zeros(10, dtype=np.uint8)
    assert find_backing(private.ctypes.data, 10) is None
    buffer.close()
    assert find_backing(view.ctypes.data, view.nbytes) is None


def test_the_region_table_keeps_backing_and_refuses_what_it_must() -> None:
    table = RegionTable()
    region = table.allocate(100, writable=False, name="t")
    again = table.add(region.buffer[10:20], writable=False)
    assert again.backing == (region.backing[0], 10) if region.backing else False
    frozen = np.zeros(8, dtype=np.uint8)
    frozen.flags.writeable = False
    read_only = table.add(frozen, writable=False)
    table.require(read_only, target=False)
    with pytest.raises(RegistrationError, match="read-only"):
        table.require(read_only, target=True)
    for bad in (np.zeros((4, 4))[:, :2], np.zeros(0), np.array([object()]), b"bytes"):
        with pytest.raises(RegistrationError):
            table.add(bad, writable=False)
    table.remove(region)
    with pytest.raises(RegistrationError, match="any more"):
        table.require(region, target=False)
    with pytest.raises(RegistrationError):
        table.remove(region)
    table.clear()


def test_words_are_stored_zeroed_and_given_back(either_copy: None) -> None:
    array = np.zeros(4, dtype=np.int64)
    table = WordTable(region_of(array), offset=8, capacity=2)
    first, second = table.allocate(11), table.allocate(-12)
    assert {first, second} == {8, 16} and sorted(array.tolist()) == [-12, 0, 0, 11]
    with pytest.raises(PoolExhausted):
        table.allocate(13)
    table.zero(first)
    assert table.load(first) == 0
    table.store(first, 14)
    assert table.load(first) == 14
    table.free(first)
    assert table.allocate(15) == first
    for wrong in (0, 9, 24):
        with pytest.raises(RegistrationError):
            table.load(wrong)
    with pytest.raises(ValueError, match="revoked"):
        table.allocate(0)
    table.free(second)
    with pytest.raises(RegistrationError, match="once"):
        table.free(second)


@pytest.mark.parametrize("nbytes", [1, 63, 4096, 8192 + 7, 20_000])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("skew", [0, 1, 33])
def test_blocks_are_copied_exactly(either_copy: None, nbytes: int, streaming: bool, skew: int) -> None:
    rng = np.random.default_rng(nbytes)
    source = rng.integers(0, 255, 12 * nbytes + 64, dtype=np.uint8)
    target = np.zeros_like(source)
    wanted = target.copy()
    from_, to = rng.permutation(12) * nbytes + skew, rng.permutation(12)[:12] * nbytes
    copy_blocks(target.ctypes.data, source.ctypes.data, to, from_, nbytes, streaming)
    for s, t in zip(from_, to, strict=True):
        wanted[t : t + nbytes] = source[s : s + nbytes]
    assert np.array_equal(target, wanted)


def test_a_checked_copy_tells_what_no_longer_stands(either_copy: None) -> None:
    slot, word_slot, word = words = np.array([11, 22, 2**63 - 1], dtype=np.int64)
    source, target = np.arange(200, dtype=np.uint8), np.zeros(200, dtype=np.uint8)
    at = [words.ctypes.data + 8 * index for index in range(3)]
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    pidfd = os.pidfd_open(child.pid)
    place = target.ctypes.data, source.ctypes.data + 10, 100, pidfd
    try:
        assert copy_checked(*place, at[0], int(slot)) == STANDS
        assert np.array_equal(target[:100], source[10:110]) and not target[100:].any()
        target[:] = 0
        guarded = at[0], int(slot), at[1], int(word_slot), at[2], int(word)
        assert copy_checked(*place, *guarded) == STANDS
        assert copy_checked(*place, *guarded[:5], 5) == OTHER_WORD
        target[:] = 0
        assert copy_checked(*place, at[0], 12) == copy_checked(*place, *guarded[:3], 23, *guarded[4:]) == UNREGISTERED
        assert not target.any()
        child.communicate(b"\n")
        assert copy_checked(*place, *guarded) == DEAD
    finally:
        child.kill()
        child.wait()
        os.close(pidfd)


def test_a_copy_looks_at_its_limits() -> None:
    source, target = np.ones(64, dtype=np.uint8), np.zeros(64, dtype=np.uint8)
    offsets = np.array([0, 32])
    part = BlockList(RemoteRegion(1, 64, "0"), region_of(target), offsets, offsets, 32)
    stop = StopToken()
    stop.set()
    with pytest.raises(HandoffAborted):
        copy_list(part, target.ctypes.data, source.ctypes.data, Limits(stop, 1.0, "peer"), 64)
    with pytest.raises(TransferTimeout):
        copy_list(part, target.ctypes.data, source.ctypes.data, Limits(StopToken(), -1.0, "peer"), 64)
    assert not target.any()


class InTurn(Executor):
    """Lets the helper run before the caller goes on, so that it does all the work."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(max_workers=1)

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = self.thread.submit(fn, *args, **kwargs)
        wait([future], 60)
        return future


@pytest.fixture
def helpers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Executor]]:
    """One that is quicker than its caller, one that never comes to it, one that was shut down."""
    if copying._copy is None:
        pytest.skip("built without a C compiler")
    monkeypatch.setattr(copying, "SHARED_FROM_BYTES", 4096)
    monkeypatch.setattr(copying, "SHARED_SLICE_BYTES", 1024)
    quick, busy, gone = InTurn(), ThreadPoolExecutor(max_workers=1), ThreadPoolExecutor(max_workers=1)
    gone.shutdown()
    release = threading.Event()
    busy.submit(release.wait, 30)
    yield [quick, busy, gone]
    release.set()
    quick.thread.shutdown()
    busy.shutdown()


def test_a_large_copy_is_shared_with_whoever_has_time(helpers: list[Executor]) -> None:
    source = np.random.default_rng(5).integers(0, 255, 64 * 256, dtype=np.uint8)
    order = np.random.default_rng(6).permutation(64) * 256
    for helper in helpers:
        target = np.zeros_like(source)
        part = BlockList(RemoteRegion(1, source.nbytes, "0"), region_of(target), order, order, 256)
        copy_list(part, target.ctypes.data, source.ctypes.data, Limits(StopToken(), 9.0, "peer"), 16384, helper)
        assert np.array_equal(target, source)


def test_a_stop_ends_a_shared_copy_on_both_threads(helpers: list[Executor]) -> None:
    stop = StopToken()
    stop.set()
    source, target = np.ones(8192, dtype=np.uint8), np.zeros(8192, dtype=np.uint8)
    order = np.arange(32) * 256
    part = BlockList(RemoteRegion(1, 8192, "0"), region_of(target), order, order, 256)
    for helper in helpers:
        with pytest.raises(HandoffAborted):
            copy_list(part, target.ctypes.data, source.ctypes.data, Limits(stop, 9.0, "peer"), 8192, helper)
    assert not target.any()


@pytest.mark.parametrize(("nbytes", "max_bytes", "max_blocks"), [(10, 25, 100), (10, 1000, 3), (100, 33, 9), (7, 7, 1)])
def test_slices_cover_every_byte_once(nbytes: int, max_bytes: int, max_blocks: int) -> None:
    source, target = np.arange(9) * 1000, np.arange(9)[::-1] * 500
    part = BlockList(RemoteRegion(1, 10_000, "0"), RemoteRegion(2, 10_000, "0"), source, target, nbytes)
    seen = []
    for piece in slices([part], max_bytes, max_blocks):
        assert piece.total_bytes <= max_bytes and len(piece.source_offsets) <= max_blocks
        for s, t in zip(piece.source_offsets.tolist(), piece.target_offsets.tolist(), strict=True):
            seen += [(s + i, t + i) for i in range(piece.nbytes)]
    wanted = [(s + i, t + i) for s, t in zip(source.tolist(), target.tolist(), strict=True) for i in range(nbytes)]
    assert sorted(seen) == sorted(wanted)


def test_batches_hold_the_same_lists_in_order_and_are_bounded() -> None:
    def layer(count: int, nbytes: int) -> BlockList:
        offsets = np.arange(count) * nbytes
        return BlockList(RemoteRegion(1, 10_000, "0"), RemoteRegion(2, 10_000, "0"), offsets, offsets, nbytes)

    layers = [layer(2, 10), layer(3, 10), layer(1, 60), layer(9, 10)]
    sizes = [[part.total_bytes for part in batch] for batch in batches(layers, 60)]
    assert sizes == [[20, 30], [60], [60], [30]]
    assert batches(layers, 1000) == [layers]
    assert batches([], 10) == [[]]


def test_neighbours_are_merged_in_order() -> None:
    merged = merge_adjacent(vectors_of(1000, np.array([0, 10, 30, 20, 40]), 10))
    assert merged.tolist() == [[1000, 20], [1030, 10], [1020, 10], [1040, 10]]


def test_vectors_are_sent_and_received_in_parts_straight_into_place() -> None:
    rng = np.random.default_rng(3)
    source = rng.integers(0, 255, 300_000, dtype=np.uint8)
    target = np.zeros_like(source)
    order = rng.permutation(300) * 1000
    out, into = vectors_of(source.ctypes.data, order, 1000), vectors_of(target.ctypes.data, order[::-1].copy(), 1000)
    left, right = socket.socketpair()
    try:
        left.setblocking(False)
        right.setblocking(False)
        sending, receiving = VectorCursor(out), VectorCursor(into)
        while not receiving.finished:
            for cursor, call, sock in ((sending, "sendmsg", left), (receiving, "recvmsg", right)):
                if not cursor.finished:
                    try:
                        cursor.call(call, sock.fileno(), 0, 7)
                    except BlockingIOError:
                        continue
    finally:
        left.close()
        right.close()
    assert digest_of(into) == digest_of(out)
    assert np.array_equal(target.reshape(-1, 1000)[order[::-1] // 1000], source.reshape(-1, 1000)[order // 1000])


@pytest.mark.parametrize(
    ("address", "parts"), [("tcp://h:1", ("h", 1)), ("h:1", ("h", 1)), ("tcp://[::1]:80", ("::1", 80))]
)
def test_addresses_are_split(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


@pytest.mark.parametrize("address", ["h", "tcp://:5", "tcp://h:x", ""])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(TransportError):
        split_address(address)


def test_unknown_and_missing_transports_are_told_apart() -> None:
    context = TransportContext(new_incarnation(), None, TransportSettings(), lambda _id: None)
    with pytest.raises(ConfigError, match="did you mean 'shm'"):
        create_transport("shn", context)
    register_transport("absent", "kvferry_no_such_module:Transport", reach="host")
    with pytest.raises(TransportError, match="not installed"):
        create_transport("absent", context)
    with pytest.raises(ConfigError, match="taken"):
        register_transport("shm", "another:Transport", reach="host")
