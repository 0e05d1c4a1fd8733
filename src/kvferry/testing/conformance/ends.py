"""T4, T6 and T7: reads end when they are cancelled, late, or their peer is gone, and nothing lands afterwards."""

from __future__ import annotations

import concurrent.futures
import time
from typing import Any

import numpy as np
import pytest

from kvferry.errors import PeerGone, RegistrationError, TransferTimeout, TransportError
from kvferry.testing.conformance.case import BLOCK, OwnerAndReader, offsets, shuffled, wait_until
from kvferry.testing.engines import EngineThread
from kvferry.testing.faults import NetworkNamespace
from kvferry.testing.leaks import no_leaks
from kvferry.testing.owner import random_bytes
from kvferry.transport.base import BlockList

WAIT_S = 60.0
GONE_WITHIN_S = 20.0
"""Far below `WAIT_S`, so that it is not their deadline that ends the reads; idle machines need less than a second."""


class Ends(OwnerAndReader):
    """Cancelled and late reads; peers that are killed, stopped, cut off, restarted, or that just come and go."""

    @pytest.mark.parametrize("after_ms", [0, 1, 5, 20])
    def test_nothing_lands_after_a_cancelled_read(self, reader: EngineThread, owner: Any, after_ms: int) -> None:
        case = self.join(reader, owner, num_blocks=self.many_blocks)
        whole = case.blocks(shuffled(self.many_blocks, 1), shuffled(self.many_blocks, 2))
        reader.cancel_after(reader.engine.read(case.peer, whole, deadline_s=WAIT_S), after_ms / 1000)
        case.target.buffer[:] = 0x11
        time.sleep(0.05)
        assert (case.target.buffer == 0x11).all()
        # The link is as good as new afterwards.
        case.read(case.blocks([0], [0]))
        assert np.array_equal(case.target.buffer[:BLOCK], case.expected[:BLOCK])

    def test_nothing_lands_after_a_cancelled_write(self, reader: EngineThread, owner: Any) -> None:
        case = self.join(reader, owner, num_blocks=self.many_blocks, writable=True)
        case.target.buffer[:] = 0x22
        order = shuffled(self.many_blocks, 1)
        whole = BlockList(case.target, case.source, order, order, BLOCK)
        reader.cancel_after(reader.engine.write(case.peer, whole, deadline_s=WAIT_S), 0.005)
        before = owner.call("digest", case.source.region_id)
        time.sleep(0.05)
        assert owner.call("digest", case.source.region_id) == before

    def test_a_deadline_ends_a_read(self, reader: EngineThread, owner: Any) -> None:
        case = self.join(reader, owner, num_blocks=self.many_blocks)
        began_s = time.monotonic()
        with pytest.raises(TransferTimeout):
            case.read(case.blocks(shuffled(self.many_blocks, 1), shuffled(self.many_blocks, 2)), deadline_s=0.0005)
        assert time.monotonic() - began_s < GONE_WITHIN_S
        case.target.buffer[:] = 0x33
        time.sleep(0.05)
        assert (case.target.buffer == 0x33).all()

    def test_a_killed_peer_fails_pending_work_at_once(self, reader: EngineThread, doomed: Any) -> None:
        case = self.join(reader, doomed, num_blocks=self.many_blocks)
        batch = case.blocks(shuffled(self.many_blocks, 1), shuffled(self.many_blocks, 2))

        async def keep_reading() -> None:
            while True:
                await reader.engine.read(case.peer, batch, deadline_s=WAIT_S)

        pending = [reader.spawn(keep_reading()) for _ in range(4)]
        time.sleep(0.05)
        doomed.kill()
        began_s = time.monotonic()
        for future in pending:
            with pytest.raises(TransportError):
                future.result(WAIT_S)
        assert time.monotonic() - began_s < GONE_WITHIN_S
        with pytest.raises(PeerGone):
            case.read(case.blocks([0], [0]))
        wait_until(lambda: case.peer.lost is not None)
        case.target.buffer[:] = 0x44
        time.sleep(0.05)
        assert (case.target.buffer == 0x44).all()

    def test_a_stopped_peer_holds_nobody_beyond_the_deadline(self, reader: EngineThread, doomed: Any) -> None:
        case = self.join(reader, doomed)
        case.read(case.blocks([0], [0]))
        doomed.stop()
        began_s = time.monotonic()
        if self.one_sided:
            case.read(case.blocks([BLOCK], [BLOCK]), deadline_s=WAIT_S)
            assert np.array_equal(case.target.buffer[BLOCK : 2 * BLOCK], case.expected[BLOCK : 2 * BLOCK])
        else:
            with pytest.raises(TransferTimeout):
                case.read(case.blocks([BLOCK], [BLOCK]), deadline_s=0.5)
        assert time.monotonic() - began_s < GONE_WITHIN_S
        doomed.resume()
        case.read(case.blocks([2 * BLOCK], [2 * BLOCK]))
        assert np.array_equal(case.target.buffer[2 * BLOCK : 3 * BLOCK], case.expected[2 * BLOCK : 3 * BLOCK])

    def test_a_stopped_peer_does_not_hinder_reads_from_others(
        self, reader: EngineThread, doomed: Any, owner: Any
    ) -> None:
        stuck, free = self.join(reader, doomed), self.join(reader, owner)
        doomed.stop()
        pending = [
            reader.spawn(reader.engine.read(stuck.peer, stuck.blocks([0], [i * BLOCK]), deadline_s=WAIT_S))
            for i in range(32)
        ]
        free.read(free.blocks([BLOCK], [0]), deadline_s=WAIT_S / 2)
        assert np.array_equal(free.target.buffer[:BLOCK], free.expected[BLOCK : 2 * BLOCK])
        doomed.resume()
        concurrent.futures.wait(pending, WAIT_S)
        assert all(future.done() for future in pending)

    def test_a_cut_network_ends_in_an_error(self, reader: EngineThread) -> None:
        if not self.over_network:
            pytest.skip("stays on one host")
        if (why_not := NetworkNamespace.why_not()) is not None:
            pytest.skip(why_not)
        network = NetworkNamespace()
        try:
            owner = self.make_owner(listen=f"tcp://{network.host}:0", prefix=network.prefix)
            try:
                case = self.join(reader, owner)
                case.read(case.blocks([0], [0]))
                network.cut()
                began_s = time.monotonic()
                with pytest.raises((TransferTimeout, PeerGone)):
                    case.read(case.blocks([BLOCK], [BLOCK]), deadline_s=1.0)
                assert time.monotonic() - began_s < GONE_WITHIN_S
                case.target.buffer[:] = 0x55
                network.mend()
                time.sleep(0.3)
                assert (case.target.buffer == 0x55).all()
            finally:
                owner.close()
        finally:
            network.close()

    def test_a_restarted_peer_is_another_one(self, reader: EngineThread, doomed: Any) -> None:
        case = self.join(reader, doomed)
        case.read(case.blocks([0], [0]))
        doomed.kill()
        again = self.make_owner(listen=doomed.address)
        try:
            region_id = again.call("region", 64 * BLOCK, seed=9, shared=self.shared)
            with pytest.raises(PeerGone):
                case.read(case.blocks([0], [0]))
            peer = reader.connect(again.address)
            assert peer.incarnation != case.peer.incarnation
            with pytest.raises(RegistrationError):
                reader.run(reader.engine.read(peer, case.blocks([0], [0]), deadline_s=WAIT_S))
            fresh = case.blocks([0], [0])._replace(source=peer.regions[region_id])
            reader.run(reader.engine.read(peer, fresh, deadline_s=WAIT_S))
            assert np.array_equal(case.target.buffer[:BLOCK], random_bytes(BLOCK, 9))
        finally:
            again.close()

    def test_connections_that_come_and_go_leave_nothing(self, owner: Any) -> None:
        region_id = owner.call("region", BLOCK, seed=7, shared=self.shared)
        with no_leaks():
            # A function of its own, so that its variables are gone when the check is made.
            _come_and_go(self.transports, owner.address, region_id, times=self.num_connects)
        wait_until(lambda: owner.call("peers") == 0)


def _come_and_go(transports: tuple[str, ...], address: str, region_id: int, *, times: int) -> None:
    with EngineThread(transports) as reader:
        target = reader.engine.allocate(BLOCK)
        for _ in range(times):
            peer = reader.connect(address)
            whole = BlockList(peer.regions[region_id], target, offsets([0]), offsets([0]), BLOCK)
            reader.run(reader.engine.read(peer, whole, deadline_s=WAIT_S))
            reader.call(peer.close)
