"""Bad input and memory that is taken back: a typed error, and for bad input before any byte moves."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from kvferry.errors import LeaseExpired, RegistrationError, TransportError
from kvferry.testing.conformance.case import BLOCK, UNTOUCHED, Case, OwnerAndReader, offsets, shuffled, wait_until
from kvferry.testing.engines import EngineThread
from kvferry.transport.base import BlockList, Guard, RemoteRegion


class Refusals(OwnerAndReader):
    """What must be refused, and what a refused or half-done batch leaves behind."""

    @pytest.mark.parametrize(
        ("source", "target", "nbytes"),
        [
            ([-1], [0], BLOCK),
            ([0], [-BLOCK], BLOCK),
            ([64 * BLOCK], [0], 1),
            ([63 * BLOCK + 1], [0], BLOCK),
            ([0], [63 * BLOCK + 1], BLOCK),
            ([0, 1], [0], BLOCK),
            ([0, BLOCK], [0, BLOCK - 1], BLOCK),
            ([0, BLOCK], [0, 0], BLOCK),
            ([0], [0], 0),
            ([0], [0], -5),
            ([0, 2**62], [0, BLOCK], BLOCK),
            ([0], [0], 2**62),
        ],
    )
    def test_blocks_that_do_not_fit_are_refused(self, case: Case, source: Any, target: Any, nbytes: int) -> None:
        with pytest.raises(RegistrationError):
            case.read(case.blocks(source, target, nbytes))
        with pytest.raises(RegistrationError):
            case.reader.engine.read_sync(case.peer, case.blocks(source, target, nbytes), deadline_s=30.0)
        assert (case.target.buffer == UNTOUCHED).all()

    def test_a_wrong_token_is_refused(self, case: Case) -> None:
        forged = RemoteRegion(case.source.region_id, case.source.nbytes, "00" * 16, handles=dict(case.source.handles))
        with pytest.raises(RegistrationError):
            case.read(case.blocks([0], [0])._replace(source=forged))
        # Also where this side's own check is circumvented: the transport itself refuses.
        case.peer.regions[case.source.region_id] = forged
        with pytest.raises(RegistrationError):
            case.read(case.blocks([0], [0])._replace(source=forged))
        assert (case.target.buffer == UNTOUCHED).all()

    def test_memory_that_was_taken_back_is_refused(self, case: Case) -> None:
        case.read(case.blocks([0], [0]))
        case.target.buffer[:] = UNTOUCHED
        case.owner.call("unregister", case.source.region_id)
        wait_until(lambda: case.source.region_id not in case.peer.regions)
        with pytest.raises(RegistrationError):
            case.read(case.blocks([0], [0]))
        # Also before the news has arrived: the transport itself refuses.
        case.peer.regions[case.source.region_id] = case.source
        with pytest.raises(RegistrationError):
            case.read(case.blocks([0], [0]))
        assert (case.target.buffer == UNTOUCHED).all()

    def test_own_memory_that_was_taken_back_is_refused(self, case: Case) -> None:
        case.reader.engine.unregister(case.target)
        with pytest.raises(RegistrationError):
            case.read(case.blocks([0], [0]))
        assert (case.target.buffer == UNTOUCHED).all()

    def test_memory_that_was_not_lent_cannot_be_written(self, case: Case) -> None:
        before = case.owner.call("digest", case.source.region_id)
        with pytest.raises(RegistrationError):
            case.write(BlockList(case.target, case.source, offsets([0]), offsets([0]), BLOCK))
        assert case.owner.call("digest", case.source.region_id) == before

    def test_a_guard_beyond_its_region_is_refused(self, case: Case) -> None:
        for offset in (-8, 4, case.source.nbytes):
            with pytest.raises((RegistrationError, LeaseExpired)):
                case.read(case.blocks([0], [0]), guard=Guard(case.source.region_id, offset, 5))

    def test_half_a_batch_is_an_error_and_can_be_read_again(self, reader: EngineThread, owner: Any) -> None:
        """The owner takes its memory back while it is read: some blocks are in place, but nobody is told of success."""
        case = self.join(reader, owner, num_blocks=self.many_blocks)
        give_up_s, broken_off = time.monotonic() + 60.0, False
        # In one process the owner waits for its readers, so that each batch is whole.
        while not broken_off and time.monotonic() < give_up_s:
            case, broken_off = self._take_back_in_mid_read(case)
            if not self.own_process:
                break
        assert broken_off or not self.own_process, "no batch was ever broken off: the test showed nothing"
        whole = case.blocks(shuffled(self.many_blocks, 6), shuffled(self.many_blocks, 6))
        case.read(whole)
        assert np.array_equal(case.target.buffer, case.expected)

    def _take_back_in_mid_read(self, case: Case) -> tuple[Case, bool]:
        """The case with the same bytes registered anew, and whether the read failed; it did not: all must be there."""
        order = shuffled(self.many_blocks, 6)
        case.target.buffer[:] = UNTOUCHED
        engine = case.reader.engine
        pending = case.reader.spawn(engine.read(case.peer, case.blocks(order, order), deadline_s=60.0))
        wait_until(lambda: pending.done() or not (case.target.buffer[order[:64]] == UNTOUCHED).all())
        case.owner.call("unregister", case.source.region_id)
        error = pending.exception(60)
        if error is None:
            assert np.array_equal(case.target.buffer, case.expected)
        else:
            assert isinstance(error, TransportError)
        again = case.owner.call("region", case.source.nbytes, seed=7, shared=self.shared)
        wait_until(lambda: again in case.peer.regions)
        return case._replace(source=case.peer.regions[again]), error is not None
