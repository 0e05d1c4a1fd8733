"""The cuda transport over a pretended GPU: its memory is host memory, its kernels are memmove. No triton, no CUDA."""

from __future__ import annotations

import ctypes
import importlib
import secrets
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from kvferry.errors import (
    HandoffAborted,
    KVError,
    LeaseExpired,
    PeerGone,
    RegistrationError,
    TransferTimeout,
    TransportError,
)
from kvferry.transport.base import BlockList, Guard, Region, RemoteRegion, StopToken
from kvferry.transport.copying import Limits
from kvferry.transport.registry import TransportContext, TransportSettings
from kvferry.types import new_incarnation
from pretended_gpu import FakeGpu, pretended_gpu


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    with pretended_gpu(monkeypatch) as fake:
        yield fake


class Side:
    """One engine's transport with one region of random bytes, and a page of words behind them."""

    def __init__(self, seed: int, *, data_bytes: int = 1 << 16, **settings: Any) -> None:
        room = importlib.import_module("kvferry.transport.cuda")
        self.incarnation = new_incarnation()
        context = TransportContext(self.incarnation, None, TransportSettings(), lambda _: None)
        self.transport = room.CudaTransport(context, room.CudaSettings(**settings))
        random = np.random.default_rng(seed)
        self.memory = random.integers(0, 256, data_bytes + 4096 + 64, dtype=np.uint8)[: data_bytes + 4096]
        self.words = self.memory[data_bytes:].view(np.int64)
        self.region = Region(
            region_id=seed,
            address=self.memory.ctypes.data,
            nbytes=self.memory.nbytes,
            token=secrets.token_hex(16),
            kind="cuda",
            buffer=self.memory,
        )

    def remote(self) -> RemoteRegion:
        handle = self.transport.export(self.region)
        assert handle is not None
        return RemoteRegion(
            self.region.region_id, self.region.nbytes, self.region.token, "cuda", handles={"cuda": handle}
        )

    def part(self, region_id: int, first: int, nbytes: int, *, allocation: RemoteRegion | None = None) -> RemoteRegion:
        """More of the memory as a region; in an allocation of its own, or `first` bytes into another region's."""
        region = Region(
            region_id=region_id,
            address=self.memory.ctypes.data + first,
            nbytes=nbytes,
            token=secrets.token_hex(16),
            kind="cuda",
        )
        handle = self.transport.export(region)
        assert handle is not None
        if allocation is not None:
            base = allocation.handles["cuda"]
            handle |= {"handle": base["handle"], "offset": base["offset"] + first}
        return RemoteRegion(region_id, nbytes, region.token, "cuda", handles={"cuda": handle})


class Pair:
    def __init__(self, **settings: Any) -> None:
        self.owner, self.reader = Side(1), Side(2, **settings)
        self.source = self.owner.remote()
        offer = dict(self.owner.transport.offer()) | {"pid": 0}  # as another process: through IPC handles
        # The offer travels as msgpack.
        offer = msgspec.msgpack.decode(msgspec.msgpack.encode(offer))
        self.link = self.reader.transport.connect(
            offer, peer="owner", incarnation=self.owner.incarnation, deadline_s=1.0
        )
        self.link.regions = {1: self.source}

    def blocks(self, source: list[int], target: list[int], nbytes: int) -> BlockList:
        return BlockList(
            self.source, self.reader.region, np.array(source, dtype=np.int64), np.array(target, dtype=np.int64), nbytes
        )

    def read(self, *blocks: BlockList, guard: Guard | None = None, deadline_s: float = 5.0) -> None:
        self.link.read(list(blocks), guard=guard, stop=StopToken(), deadline_s=deadline_s)

    def close(self) -> None:
        self.link.close()
        self.owner.transport.close()
        self.reader.transport.close()


@pytest.fixture
def pair(gpu: FakeGpu) -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


def test_blocks_land_and_nothing_else_changes(pair: Pair, gpu: FakeGpu) -> None:
    wanted = pair.reader.memory.copy()
    wanted[100:164], wanted[0:64] = pair.owner.memory[640:704], pair.owner.memory[7:71]
    pair.read(pair.blocks([640, 7], [100, 0], 64))
    assert np.array_equal(pair.reader.memory, wanted)


def test_the_lists_of_all_layers_go_in_one_launch(pair: Pair, gpu: FakeGpu) -> None:
    pair.read(*(pair.blocks([64 * i], [128 * i], 64) for i in range(10)))
    assert gpu.launches == [640]
    assert all(
        np.array_equal(pair.reader.memory[128 * i : 128 * i + 64], pair.owner.memory[64 * i : 64 * i + 64])
        for i in range(10)
    )


def test_a_launch_is_bounded_in_bytes_and_long_tables_are_uploaded(gpu: FakeGpu) -> None:
    pair = Pair(launch_bytes=4096, direct_blocks=8)
    offsets = list(range(0, 8192, 64))
    pair.read(pair.blocks(offsets, offsets, 64), pair.blocks([0], [16384], 10000))
    assert gpu.launches == [4096, 4096, 4096, 4096, 1808]
    assert gpu.uploads == [1024, 1024]
    assert np.array_equal(pair.reader.memory[:8192], pair.owner.memory[:8192])
    assert np.array_equal(pair.reader.memory[16384:26384], pair.owner.memory[:10000])
    pair.close()


@pytest.mark.parametrize(("nbytes", "short_first"), [(4 << 10, True), (256 << 10, False)])
def test_a_long_table_begins_with_a_short_launch(gpu: FakeGpu, nbytes: int, short_first: bool) -> None:
    total = 24 << 20
    side = Side(1, data_bytes=total)
    memory = np.zeros(total, dtype=np.uint8)
    host = Region(region_id=7, address=memory.ctypes.data, nbytes=total, token="", kind="host", buffer=memory)
    order = np.random.default_rng(5).permutation(total // nbytes) * nbytes
    blocks = BlockList(side.region, host, order, np.sort(order), nbytes)
    side.transport.copy([blocks], stop=StopToken(), deadline_s=5.0)
    wanted = side.memory[:total].reshape(-1, nbytes)[order // nbytes].ravel()
    assert np.array_equal(memory, wanted)
    if short_first:
        # 50 us at 55 GB/s, then each one longer, so that the GPU never waits for the next table.
        assert gpu.launches[0] < 3 << 20 and len(gpu.launches) <= 4
        assert gpu.launches[1] >= 4 * gpu.launches[0] and sum(gpu.launches) == total
    else:
        assert gpu.launches == [total]
    side.transport.close()


def test_the_wait_sleeps_until_a_copy_can_be_complete_and_not_longer(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = 24 << 20
    side = Side(1, data_bytes=total, launch_bytes=total)
    memory = np.zeros(total, dtype=np.uint8)
    host = Region(region_id=7, address=memory.ctypes.data, nbytes=total, token="", kind="host", buffer=memory)
    copier = importlib.import_module("kvferry.transport.cuda_copy")
    now, slept = [0.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(copier, "time", type("Clock", (), {"perf_counter": lambda: now[0], "sleep": sleep}))
    zeros = np.zeros(1, dtype=np.int64)
    gpu.pending = 1
    for _ in range(2):
        side.transport.copy([BlockList(side.region, host, zeros, zeros, total)], stop=StopToken(), deadline_s=5.0)
    takes_s = total / copier.RATES["host"]
    assert len(slept) == 2 and all(takes_s / 2 < seconds < takes_s for seconds in slept)
    side.transport.close()


def test_a_start_that_fails_behind_its_launch_is_waited_for_and_its_lane_stays_good(gpu: FakeGpu) -> None:
    pair = Pair()
    gpu.late, gpu.pending = True, 3

    def fail() -> None:
        raise TransportError("cuEventRecord failed: CUDA error 1")

    gpu.on_launch = fail
    with pytest.raises(TransportError, match="cuEventRecord"):
        pair.read(pair.blocks([0], [0], 64))
    # What was launched has run, so that nothing lands any more.
    assert np.array_equal(pair.reader.memory[:64], pair.owner.memory[:64])
    gpu.on_launch = None
    pair.read(pair.blocks([64], [64], 64))
    assert np.array_equal(pair.reader.memory[:128], pair.owner.memory[:128])
    pair.close()


def test_where_not_even_an_event_can_be_set_nothing_is_used_again(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair()
    copier = importlib.import_module("kvferry.transport.cuda_copy")

    def fail(*_: object) -> None:
        raise TransportError("cudaEventRecord failed: CUDA error 700")

    monkeypatch.setattr(copier.cuda, "record", fail)
    with pytest.raises(TransportError, match="700"):
        pair.read(pair.blocks([0], [0], 64))
    monkeypatch.undo()
    with pytest.raises(TransportError, match="restart this process"):
        pair.read(pair.blocks([0], [0], 64))


@pytest.mark.parametrize("in_c", [False, True])
def test_the_word_is_loaded_behind_the_launches_of_both_streams(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, in_c: bool
) -> None:
    pair = Pair(launch_bytes=4096)
    pair.owner.words[3] = 77
    copier = importlib.import_module("kvferry.transport.cuda_copy")
    recorded: dict[int, int] = {}
    waited: list[tuple[int, int]] = []
    loaded_on: list[int] = []

    class OffTheGil:
        def start(self, *_: object) -> bool:
            return False

        def wait(self, event: int, seconds: float) -> bool:
            return gpu.is_done(event)

        def load_word(self, word: int, to: int, slot: Any) -> bool:
            waited.append((slot.stream, slot.behind))
            loaded_on.append(slot.stream)
            ctypes.memmove(to, word, 8)
            return True

    of_reader = pair.reader.transport.copier(pair.reader.region.device)
    if in_c:
        of_reader._direct = OffTheGil()
    record, load_word = copier.cuda.record, of_reader._launcher.load_word
    gpu.pending = 5
    monkeypatch.setattr(
        copier.cuda, "record", lambda event, stream: (recorded.update({event: stream}), record(event, stream))
    )
    monkeypatch.setattr(copier.cuda, "wait_for", lambda stream, event: waited.append((stream, event)))
    monkeypatch.setattr(
        of_reader._launcher,
        "load_word",
        lambda word, slot, *, stream: (loaded_on.append(stream), load_word(word, slot, stream=stream)),
        raising=False,
    )
    offsets = list(range(0, 8192, 64))
    pair.read(pair.blocks(offsets, offsets, 64), guard=Guard(1, (1 << 16) + 24, 77))
    assert len(gpu.launches) == 2 and len(loaded_on) == 1
    others = {stream for stream in recorded.values() if stream != loaded_on[0]}
    assert len(others) == 1, "two launches, two streams"
    assert {recorded[event] for stream, event in waited if stream == loaded_on[0] and event} >= others
    pair.close()


@pytest.mark.parametrize(("awake_s", "sleeps"), [(4e-3, 0), (1e-3, 1)])
def test_a_core_stays_awake_through_a_short_copy_where_that_takes_no_gil(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, awake_s: float, sleeps: int
) -> None:
    total = 24 << 20
    side = Side(1, data_bytes=total, launch_bytes=total, awake_s=awake_s)
    memory = np.zeros(total, dtype=np.uint8)
    host = Region(region_id=7, address=memory.ctypes.data, nbytes=total, token="", kind="host", buffer=memory)
    copier = importlib.import_module("kvferry.transport.cuda_copy")
    monkeypatch.setitem(copier.RATES, "host", total / 3e-3)
    now, slept = [0.0], []

    class OffTheGil:
        """Starts nothing itself; the event comes after 3 ms."""

        def start(self, *_: object) -> bool:
            return False

        def wait(self, event: int, seconds: float) -> bool:
            now[0] = min(now[0] + seconds, max(now[0], 3e-3))
            return now[0] >= 3e-3

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    side.transport.copier(side.region.device)._direct = OffTheGil()
    monkeypatch.setattr(copier, "time", type("Clock", (), {"perf_counter": lambda: now[0], "sleep": sleep}))
    zeros = np.zeros(1, dtype=np.int64)
    side.transport.copy([BlockList(side.region, host, zeros, zeros, total)], stop=StopToken(), deadline_s=5.0)
    assert len(slept) == sleeps and now[0] == 3e-3
    side.transport.close()


@pytest.mark.parametrize("ordered", [False, True])
def test_launches_that_share_the_link_are_not_waited_for_as_if_each_had_it_alone(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, ordered: bool
) -> None:
    total = 24 << 20
    side = Side(1, data_bytes=total, launch_bytes=total // 2)
    memory = np.zeros(total, dtype=np.uint8)
    host = Region(region_id=7, address=memory.ctypes.data, nbytes=total, token="", kind="host", buffer=memory)
    copier = importlib.import_module("kvferry.transport.cuda_copy")
    takes_s = 2e-3
    monkeypatch.setitem(copier.RATES, "host", total / takes_s)
    monkeypatch.setattr(copier, "LONG_LAUNCH_S", 0.5e-3 if ordered else 1.5e-3)
    now, asked = [0.0], []

    def sleep(seconds: float) -> None:
        now[0] += seconds

    def is_done(event: int) -> bool:
        now[0] += 1e-6
        if event not in asked:
            asked.append(event)
        first = event == asked[0]
        return now[0] >= takes_s * ((0.5 if ordered else 0.8) if first else 1)

    monkeypatch.setattr(copier, "time", type("Clock", (), {"perf_counter": lambda: now[0], "sleep": sleep}))
    monkeypatch.setattr(copier.cuda, "is_done", is_done)
    offsets = np.array([0, total // 2])
    side.transport.copy([BlockList(side.region, host, offsets, offsets, total // 2)], stop=StopToken(), deadline_s=5.0)
    assert len(gpu.launches) == 2
    assert takes_s <= now[0] < takes_s + 200e-6
    side.transport.close()


def test_a_guard_whose_word_stands_lets_the_read_pass(pair: Pair) -> None:
    pair.owner.words[3] = 1234567
    pair.read(pair.blocks([0], [0], 64), guard=Guard(1, (1 << 16) + 24, 1234567))
    assert pair.link.load_word(pair.source, (1 << 16) + 24, deadline_s=1.0) == 1234567


def test_a_guard_whose_word_changed_ends_the_read(pair: Pair, gpu: FakeGpu) -> None:
    pair.owner.words[3] = 5

    def revoke() -> None:
        pair.owner.words[3] = 0

    gpu.on_launch = revoke
    with pytest.raises(LeaseExpired):
        pair.read(pair.blocks([0], [0], 64), guard=Guard(1, (1 << 16) + 24, 5))


@pytest.mark.parametrize("guard", [Guard(9, 0, 1), Guard(1, 4, 1), Guard(1, 1 << 20, 1)])
def test_a_guard_that_cannot_be_read_moves_nothing(pair: Pair, gpu: FakeGpu, guard: Guard) -> None:
    with pytest.raises(RegistrationError):
        pair.read(pair.blocks([0], [0], 64), guard=guard)
    assert gpu.launches == []


@pytest.mark.parametrize(
    ("source", "target", "nbytes"),
    [([-1], [0], 64), ([0], [(1 << 16) + 4096 - 63], 64), ([1 << 20], [0], 1), ([0, 64], [0], 64)],
)
def test_offsets_that_do_not_fit_move_nothing(
    pair: Pair, gpu: FakeGpu, source: list[int], target: list[int], nbytes: int
) -> None:
    blocks = pair.blocks(source, target, nbytes)._replace(source=pair.reader.region)
    with pytest.raises(RegistrationError):
        pair.reader.transport.copy([blocks], stop=StopToken(), deadline_s=1.0)
    assert gpu.launches == []


def test_a_wrong_token_and_an_unregistered_region_are_refused(pair: Pair, gpu: FakeGpu) -> None:
    lied = msgspec.structs.replace(pair.source, token="0" * 32)
    with pytest.raises(RegistrationError, match="token"):
        pair.read(pair.blocks([0], [0], 64)._replace(source=lied))
    pair.owner.transport.withdraw(pair.owner.region)
    with pytest.raises(RegistrationError, match="unregistered"):
        pair.read(pair.blocks([0], [0], 64))
    assert gpu.launches == []


def test_a_region_unregistered_while_it_is_read_fails_the_read(pair: Pair, gpu: FakeGpu) -> None:
    gpu.on_launch = lambda: pair.owner.transport.withdraw(pair.owner.region)
    with pytest.raises(RegistrationError):
        pair.read(pair.blocks([0], [0], 64))


@pytest.mark.parametrize("cause", ["stop", "deadline"])
def test_an_end_between_launches_waits_for_what_runs(gpu: FakeGpu, cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(launch_bytes=64, spin_s=0.0, sleep_s=0.0)
    gpu.pending = 3
    stop = StopToken()
    copying = importlib.import_module("kvferry.transport.copying")
    now = [0.0]
    monkeypatch.setattr(copying.time, "monotonic", lambda: now[0])

    def end() -> None:
        stop.set() if cause == "stop" else now.__setitem__(0, 100.0)

    gpu.on_launch = end
    wanted: type[KVError] = HandoffAborted if cause == "stop" else TransferTimeout
    with pytest.raises(wanted):
        pair.link.read([pair.blocks([0, 64, 128], [0, 64, 128], 64)], guard=None, stop=stop, deadline_s=5.0)
    assert gpu.launches == [64]
    assert not any(gpu.queries_left.values()), "the launched copy was not waited for (T4)"
    pair.close()


def test_a_gpu_that_hangs_is_an_error_and_its_memory_is_not_unmapped(gpu: FakeGpu) -> None:
    pair = Pair(stuck_after_s=0.0, spin_s=0.0)
    gpu.pending = 1 << 30
    with pytest.raises(TransportError, match="did not finish"):
        pair.read(pair.blocks([0], [0], 64))
    with pytest.raises(TransportError, match="never finished"):
        pair.read(pair.blocks([0], [0], 64))
    pair.link.close()
    assert gpu.closed == []
    pair.close()


def test_a_lane_that_could_not_be_made_is_made_later(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    room = importlib.import_module("kvferry.transport.cuda_copy")
    copier = room.BlockCopier(0, room.CudaSettings(lanes=1))

    def out_of_memory(nbytes: int) -> int:
        raise TransportError("cudaMalloc failed: cudaErrorMemoryAllocation")

    with monkeypatch.context() as patch, pytest.raises(TransportError, match="cudaMalloc"):
        patch.setattr(room.cuda, "allocate", out_of_memory)
        copier.copy([], Limits(StopToken(), 5.0, "peer"))
    copier.copy([], Limits(StopToken(), 0.5, "peer"))
    copier.close()


def test_a_handle_is_opened_once_and_closed_with_the_link(pair: Pair, gpu: FakeGpu) -> None:
    for _ in range(5):
        pair.read(pair.blocks([0], [0], 64))
    assert len(gpu.opened) == 1
    pair.link.close()
    pair.link.close()
    assert gpu.closed == gpu.opened
    with pytest.raises(PeerGone):
        pair.read(pair.blocks([0], [0], 64))


def test_a_region_that_was_taken_back_is_closed_unless_another_lies_in_its_allocation(pair: Pair, gpu: FakeGpu) -> None:
    neighbour = pair.owner.part(5, 1024, 2048, allocation=pair.source)
    blocks = pair.blocks([0], [0], 64)
    pair.read(blocks)
    pair.read(blocks._replace(source=neighbour))
    assert len(gpu.opened) == 1
    pair.link.forget(pair.source)
    assert gpu.closed == []
    pair.read(blocks._replace(source=neighbour))
    pair.link.forget(neighbour)
    assert gpu.closed == gpu.opened
    pair.link.forget(neighbour)
    # Nothing keeps the peer from registering the same memory anew.
    pair.read(blocks)
    assert len(gpu.opened) == 2
    pair.link.close()
    assert gpu.closed == gpu.opened


def test_forget_waits_for_copies_under_way(pair: Pair, gpu: FakeGpu) -> None:
    other = pair.owner.part(5, 4096, 4096)
    forgetting = threading.Thread(target=pair.link.forget, args=(pair.source,))
    still_open = []

    def during() -> None:
        gpu.on_launch = None
        forgetting.start()
        pair.read(pair.blocks([0], [4096], 64)._replace(source=other))
        forgetting.join(0.02)
        still_open.append(forgetting.is_alive() and gpu.closed == [])

    gpu.on_launch = during
    pair.read(pair.blocks([0], [0], 64))
    forgetting.join(5.0)
    assert still_open == [True]
    assert gpu.closed == gpu.opened[:1]


def test_a_peer_that_closed_is_gone_and_its_handles_are_closed(pair: Pair, gpu: FakeGpu) -> None:
    pair.read(pair.blocks([0], [0], 64))
    gpu.on_launch = pair.owner.transport.close
    with pytest.raises(PeerGone):
        pair.read(pair.blocks([0], [0], 64))
    assert gpu.closed == gpu.opened


def test_close_waits_for_a_copy_under_way(pair: Pair, gpu: FakeGpu) -> None:
    closer = threading.Thread(target=pair.link.close)
    still_open: list[bool] = []

    def launched() -> None:
        closer.start()
        closer.join(0.05)
        still_open.append(closer.is_alive() and gpu.closed == [])

    gpu.on_launch = launched
    with pytest.raises(TransportError):  # the copy learns that its link was closed
        pair.read(pair.blocks([0], [0], 64))
    closer.join(5)
    assert still_open == [True]
    assert gpu.closed == gpu.opened


def test_the_same_process_is_read_without_handles(gpu: FakeGpu) -> None:
    owner, reader = Side(1), Side(2)
    source = owner.remote()
    link = reader.transport.connect(
        owner.transport.offer(), peer="owner", incarnation=owner.incarnation, deadline_s=1.0
    )
    zeros = np.zeros(1, dtype=np.int64)
    link.read([BlockList(source, reader.region, zeros, zeros, 64)], guard=None, stop=StopToken(), deadline_s=1.0)
    assert np.array_equal(reader.memory[:64], owner.memory[:64])
    assert gpu.opened == []
    link.close()
    owner.transport.close()
    reader.transport.close()


def test_another_incarnation_is_refused(gpu: FakeGpu) -> None:
    owner, reader = Side(1), Side(2)
    with pytest.raises(TransportError):
        reader.transport.connect(owner.transport.offer(), peer="owner", incarnation=new_incarnation(), deadline_s=1.0)
    owner.transport.close()
    reader.transport.close()


def test_device_blocks_go_to_pinned_host_memory_and_back(gpu: FakeGpu) -> None:
    side = Side(1)
    memory = np.zeros(8192, dtype=np.uint8)
    host = Region(region_id=7, address=memory.ctypes.data, nbytes=8192, token="", kind="host", buffer=memory)
    there, here = np.array([0, 128], dtype=np.int64), np.array([4096, 0], dtype=np.int64)
    before = side.memory.copy()
    for _ in range(2):
        side.transport.copy([BlockList(side.region, host, there, here, 128)], stop=StopToken(), deadline_s=1.0)
    side.memory[:] = 0
    side.transport.copy([BlockList(host, side.region, here, there, 128)], stop=StopToken(), deadline_s=1.0)
    assert np.array_equal(side.memory[:256], before[:256])
    assert not side.memory[256:].any()
    assert gpu.pinned == [host.address]
    side.transport.withdraw(host)
    assert gpu.unpinned == [host.address]
    with pytest.raises(TransportError, match="two host regions"):
        side.transport.copy([BlockList(host, host, here, there, 128)], stop=StopToken(), deadline_s=1.0)
    side.transport.close()


def test_host_regions_are_left_to_other_transports(gpu: FakeGpu) -> None:
    side = Side(1)
    memory = np.zeros(64, dtype=np.uint8)
    assert side.transport.export(Region(5, memory.ctypes.data, 64, "", "host", buffer=memory)) is None
    side.transport.close()
