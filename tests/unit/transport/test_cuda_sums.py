"""Checksums by the copy kernels' launches, over the pretended GPU: which run, which half, which list they belong to."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import numpy as np
import pytest
from test_cuda import Pair

from kvferry.transport.base import StopToken
from kvferry.transport.checksum import sums_of_blocks
from pretended_gpu import FakeGpu, pretended_gpu


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    with pretended_gpu(monkeypatch) as fake:
        fake.late = True
        yield fake


def offsets(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_each_list_gets_the_sums_of_its_own_blocks(gpu: FakeGpu) -> None:
    pair = Pair()
    lists = [
        pair.blocks([640, 0, 128], [0, 64, 128], 64),
        pair.blocks([1024, 2048], [1024, 1536], 512),  # of another size: a launch of its own, between two that join
        pair.blocks([4096], [4096], 64),
    ]
    sums = pair.link.read_summed(lists, guard=None, stop=StopToken(), deadline_s=5.0)
    for part, seen in zip(lists, sums, strict=True):
        assert seen.tolist() == sums_of_blocks(pair.owner.memory, part.source_offsets, part.nbytes).tolist()
        assert seen.tolist() == sums_of_blocks(pair.reader.memory, part.target_offsets, part.nbytes).tolist()
    assert len(gpu.launches) == 2
    pair.close()


def test_sums_of_a_copy_in_many_launches_come_in_order(gpu: FakeGpu) -> None:
    pair = Pair(launch_bytes=256)
    part = pair.blocks([64 * i for i in range(101)], [64 * i for i in reversed(range(101))], 64)
    (seen,) = pair.link.read_summed([part], guard=None, stop=StopToken(), deadline_s=5.0)
    assert len(gpu.launches) > 20
    assert seen.tolist() == sums_of_blocks(pair.owner.memory, part.source_offsets, 64).tolist()
    pair.close()


def test_a_block_that_no_launch_may_move_whole_has_no_sum_but_arrives(gpu: FakeGpu) -> None:
    pair = Pair(launch_bytes=256)
    assert pair.link.read_summed([pair.blocks([0], [0], 512)], guard=None, stop=StopToken(), deadline_s=5.0) is None
    assert np.array_equal(pair.reader.memory[:512], pair.owner.memory[:512])
    pair.close()


def test_the_owner_sums_its_blocks_and_nothing_is_written(gpu: FakeGpu) -> None:
    pair = Pair(launch_bytes=256)
    before = pair.owner.memory.copy()
    places = offsets(*(96 * i for i in range(40)))
    seen = pair.owner.transport.sums(pair.owner.region, places, 96, deadline_s=5.0)
    assert seen.tolist() == sums_of_blocks(before, places, 96).tolist()
    assert np.array_equal(pair.owner.memory, before)
    # A lane that summed copies plainly afterwards.
    pair.read(pair.blocks([640], [0], 64))
    assert np.array_equal(pair.reader.memory[:64], pair.owner.memory[640:704])
    pair.close()


def test_joined_runs_are_parted_as_they_were_joined(gpu: FakeGpu) -> None:
    room = importlib.import_module("kvferry.transport.cuda_merge")
    run = importlib.import_module("kvferry.transport.cuda_copy").Run
    runs = [
        run(offsets(*range(n)), 0, offsets(*range(n)), 0, nbytes, path)
        for n, nbytes, path in [(2, 8, "peer"), (1, 16, "peer"), (3, 8, "peer"), (1, 8, "host")]
    ]
    joined = room.merged(runs)
    out = [np.zeros(len(r.source_offsets), dtype=np.int64) for r in runs]
    room.parted(runs, [np.arange(len(r.source_offsets)) + 10 * i for i, r in enumerate(joined)], out)
    assert [o.tolist() for o in out] == [[0, 1], [10], [2, 3, 4], [20]]
