"""T1 and T5: what was read or written is in place, all of it, and nothing else is touched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvferry.testing.conformance.case import BLOCK, UNTOUCHED, Case, OwnerAndReader, offsets, shuffled, wait_until
from kvferry.testing.engines import EngineThread
from kvferry.testing.owner import random_bytes
from kvferry.transport.base import BlockList


class Placement(OwnerAndReader):
    """Completion means that all bytes are in place; nothing but the given target offsets is touched."""

    @pytest.mark.parametrize("nbytes", [1, 7, 4096, BLOCK, BLOCK + 13, 300_001])
    def test_reads_blocks_of_any_size_into_place(self, case: Case, nbytes: int) -> None:
        num_blocks = case.target.nbytes // nbytes if nbytes >= 4096 else 2000
        source, target = shuffled(num_blocks, 1, nbytes), shuffled(num_blocks, 2, nbytes)
        done = case.read(case.blocks(source, target, nbytes))
        wanted = np.full(case.target.nbytes, UNTOUCHED, dtype=np.uint8)
        for s, t in zip(source.tolist(), target.tolist(), strict=True):
            wanted[t : t + nbytes] = case.expected[s : s + nbytes]
        assert np.array_equal(case.target.buffer, wanted)
        assert done.nbytes == num_blocks * nbytes
        assert done.transport in self.transports
        assert done.retries == 0
        assert 0 < done.duration_s < 20

    def test_reads_several_regions_in_one_call(self, case: Case) -> None:
        more = case.owner.call("region", 8 * BLOCK, seed=8, shared=self.shared)
        wait_until(lambda: more in case.peer.regions)
        second = case.reader.engine.allocate(8 * BLOCK)
        done = case.read(
            [
                case.blocks([0, BLOCK], [BLOCK, 0]),
                BlockList(case.peer.regions[more], second, offsets([3 * BLOCK]), offsets([5 * BLOCK]), BLOCK),
            ]
        )
        assert done.nbytes == 3 * BLOCK
        assert np.array_equal(case.target.buffer[:BLOCK], case.expected[BLOCK : 2 * BLOCK])
        assert np.array_equal(case.target.buffer[BLOCK : 2 * BLOCK], case.expected[:BLOCK])
        assert np.array_equal(second.buffer[5 * BLOCK : 6 * BLOCK], random_bytes(8 * BLOCK, 8)[3 * BLOCK : 4 * BLOCK])

    def test_reads_a_batch_of_many_slices(self, reader: EngineThread, owner: Any) -> None:
        case = self.join(reader, owner, num_blocks=self.many_blocks)
        case.read(case.blocks(shuffled(self.many_blocks, 3), shuffled(self.many_blocks, 4)))
        rows = case.target.buffer.reshape(-1, BLOCK)[shuffled(self.many_blocks, 4) // BLOCK]
        assert np.array_equal(rows, case.expected.reshape(-1, BLOCK)[shuffled(self.many_blocks, 3) // BLOCK])

    def test_many_reads_at_once_each_get_their_own(self, case: Case) -> None:
        futures = [
            case.reader.spawn(
                case.reader.engine.read(case.peer, case.blocks([i * BLOCK], [(63 - i) * BLOCK]), deadline_s=60.0)
            )
            for i in range(64)
        ]
        for future in futures:
            future.result(30)
        assert np.array_equal(case.target.buffer.reshape(-1, BLOCK), case.expected.reshape(-1, BLOCK)[::-1])

    def test_the_synchronous_call_reads_too(self, case: Case) -> None:
        done = case.reader.engine.read_sync(case.peer, case.blocks([5 * BLOCK], [0]), deadline_s=30.0)
        assert done.nbytes == BLOCK
        assert np.array_equal(case.target.buffer[:BLOCK], case.expected[5 * BLOCK : 6 * BLOCK])

    def test_writes_into_memory_that_was_lent(self, reader: EngineThread, owner: Any) -> None:
        case = self.join(reader, owner, writable=True)
        case.target.buffer[:] = random_bytes(case.target.nbytes, 9)
        order = shuffled(64, 5)
        done = case.write(BlockList(case.target, case.source, order, order, BLOCK))
        assert done.nbytes == case.target.nbytes
        case.target.buffer[:] = 0
        case.read(case.blocks(order, order))
        assert np.array_equal(case.target.buffer, random_bytes(case.target.nbytes, 9))

    def test_reads_touch_only_their_targets(self, case: Case) -> None:
        before = case.owner.call("digest", case.source.region_id)
        case.read(case.blocks([1, 100_003], [BLOCK + 1, 3 * BLOCK + 5], 777))
        touched = np.zeros(case.target.nbytes, dtype=bool)
        touched[BLOCK + 1 : BLOCK + 778] = touched[3 * BLOCK + 5 : 3 * BLOCK + 782] = True
        assert (case.target.buffer[~touched] == UNTOUCHED).all()
        assert case.owner.call("digest", case.source.region_id) == before
