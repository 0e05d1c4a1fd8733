"""The conformance suite: what every transport must guarantee (T1 to T7 of the handoff protocol), as pytest classes.

For a transport of your own, register it and subclass in a test module::

    from kvferry.testing.conformance import TransportConformance

    class TestMine(TransportConformance):
        transports = ("mine",)
        plugin = "my_package.register_mine"   # imported by the owner's process

Each test moves bytes between this process and one that owns the memory, through a TransferEngine that may use this
transport only, so that what users see is what is tested.
"""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from kvferry.errors import (
    LeaseExpired,
    PeerGone,
    RegistrationError,
    TransferTimeout,
    TransportError,
)
from kvferry.testing.engines import EngineThread, LocalOwner
from kvferry.testing.faults import NetworkNamespace
from kvferry.testing.leaks import no_leaks
from kvferry.testing.owner import OwnerProcess, random_bytes
from kvferry.transfer import Peer, TransferSettings
from kvferry.transport.base import BlockList, Guard, Region, RemoteRegion

BLOCK = 64 << 10
GONE_WITHIN_S = 1.0
_FILL = 0xEE


class Case(NamedTuple):
    """A reader connected to an owner, with one region at each side."""

    reader: EngineThread
    owner: Any
    peer: Peer
    source: RemoteRegion
    target: Region
    expected: npt.NDArray[np.uint8]

    def read(self, blocks: BlockList | list[BlockList], **kwargs: Any) -> Any:
        kwargs.setdefault("deadline_s", 20.0)
        return self.reader.run(self.reader.engine.read(self.peer, blocks, **kwargs))

    def write(self, blocks: BlockList | list[BlockList], **kwargs: Any) -> Any:
        kwargs.setdefault("deadline_s", 20.0)
        return self.reader.run(self.reader.engine.write(self.peer, blocks, **kwargs))

    def blocks(self, source: Any, target: Any, nbytes: int = BLOCK) -> BlockList:
        return BlockList(self.source, self.target, offsets(source), offsets(target), nbytes)


def offsets(values: Any) -> npt.NDArray[np.int64]:
    return np.asarray(values, dtype=np.int64)


def shuffled(num_blocks: int, seed: int, nbytes: int = BLOCK) -> npt.NDArray[np.int64]:
    """int64 [num_blocks]: the offsets of all blocks, in random order."""
    return np.random.default_rng(seed).permutation(num_blocks).astype(np.int64) * nbytes


class TransportConformance:
    """Subclass it and name the transport; see the module's docstring.

    `shared`: the owner's memory is shared memory (else plain arrays). `own_process`: the owner runs in a process of
    its own. `one_sided`: the owner's process takes no part in a read, so that a stopped one does not hinder it.
    `over_network`: reaches other hosts. `many_blocks`: of 64 KiB, so many that reading them takes a while.
    `word_stands_s`: how long a busy owner leaves a lease's word as it is; a small read must often fit into that.
    `num_connects`: how often peers come and go in the test of what they leave behind.
    """

    transports: ClassVar[tuple[str, ...]] = ()
    plugin: ClassVar[str] = ""
    shared: ClassVar[bool] = True
    own_process: ClassVar[bool] = True
    one_sided: ClassVar[bool] = True
    over_network: ClassVar[bool] = False
    many_blocks: ClassVar[int] = 1600
    word_stands_s: ClassVar[float] = 0.002
    num_connects: ClassVar[int] = 30

    # Fixtures

    @classmethod
    def make_owner(cls, **kwargs: Any) -> Any:
        if cls.own_process:
            return OwnerProcess(cls.transports, plugin=cls.plugin, **kwargs)
        return LocalOwner(cls.transports)

    @pytest.fixture(scope="class")
    @classmethod
    def owner(cls) -> Iterator[Any]:
        owner = cls.make_owner()
        yield owner
        owner.close()

    @pytest.fixture
    def doomed(self) -> Iterator[Any]:
        """An owner for this test alone, which may end badly."""
        if not self.own_process:
            pytest.skip("the owner is this process")
        owner = self.make_owner()
        yield owner
        owner.close()

    @pytest.fixture
    def reader(self) -> Iterator[EngineThread]:
        with EngineThread(self.transports, settings=self.settings()) as reader:
            yield reader

    @pytest.fixture
    def case(self, reader: EngineThread, owner: Any) -> Case:
        return self.join(reader, owner)

    def settings(self) -> TransferSettings:
        return TransferSettings()

    def join(self, reader: EngineThread, owner: Any, num_blocks: int = 64, *, writable: bool = False) -> Case:
        region_id = owner.call("region", num_blocks * BLOCK, seed=7, shared=self.shared, writable=writable)
        peer = reader.connect(owner.address)
        target = reader.engine.allocate(num_blocks * BLOCK)
        target.buffer[:] = _FILL
        return Case(reader, owner, peer, peer.regions[region_id], target, random_bytes(num_blocks * BLOCK, 7))

    # T1: completion means that all bytes are in place

    @pytest.mark.parametrize("nbytes", [1, 7, 4096, BLOCK, BLOCK + 13, 300_001])
    def test_reads_blocks_of_any_size_into_place(self, case: Case, nbytes: int) -> None:
        num_blocks = case.target.nbytes // nbytes if nbytes >= 4096 else 2000
        source, target = shuffled(num_blocks, 1, nbytes), shuffled(num_blocks, 2, nbytes)
        done = case.read(case.blocks(source, target, nbytes))
        wanted = np.full(case.target.nbytes, _FILL, dtype=np.uint8)
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
                case.reader.engine.read(case.peer, case.blocks([i * BLOCK], [(63 - i) * BLOCK]), deadline_s=20.0)
            )
            for i in range(64)
        ]
        for future in futures:
            future.result(30)
        assert np.array_equal(case.target.buffer.reshape(-1, BLOCK), case.expected.reshape(-1, BLOCK)[::-1])

    def test_the_synchronous_call_reads_too(self, case: Case) -> None:
        done = case.reader.engine.read_sync(case.peer, case.blocks([5 * BLOCK], [0]), deadline_s=10.0)
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

    # T2 and T3: the word is seen no earlier than the data, its store before later writes

    def test_a_standing_word_passes_and_another_one_is_an_expired_lease(self, case: Case) -> None:
        words = case.owner.call("region", 4096, shared=self.shared)
        case.owner.call("word", words, 8, 4711)
        wait_until(lambda: words in case.peer.regions)
        case.read(case.blocks([0], [0]), guard=Guard(words, 8, 4711))
        case.owner.call("word", words, 8, 0)
        with pytest.raises(LeaseExpired):
            case.read(case.blocks([0], [0]), guard=Guard(words, 8, 4711))
        with pytest.raises(LeaseExpired):
            case.reader.engine.read_sync(case.peer, [], guard=Guard(words, 8, 4711), deadline_s=5.0)
        loaded = case.reader.run(case.reader.engine.load_word(case.peer, words, 8, deadline_s=5.0))
        assert loaded == 0

    def test_bytes_accepted_under_a_word_were_published_under_it(self, case: Case) -> None:
        words = case.owner.call("region", 4096, shared=self.shared)
        wait_until(lambda: words in case.peer.regions)
        accepted = refused = 0
        case.owner.call("churn", case.source.region_id, words, 0, BLOCK, self.word_stands_s)
        try:
            until_s = time.monotonic() + 8.0
            everything = case.blocks(shuffled(64, 1), shuffled(64, 2))
            while time.monotonic() < until_s and (accepted < 5 or refused < 5):
                word = case.reader.engine.load_word_sync(case.peer, words, 0, deadline_s=5.0)
                if word == 0:
                    continue
                # Small reads are accepted often, large ones seldom: both must happen for the test to mean anything.
                batch = everything if refused < 5 else case.blocks([0], [0])
                try:
                    case.reader.engine.read_sync(case.peer, batch, guard=Guard(words, 0, word), deadline_s=5.0)
                except LeaseExpired:
                    refused += 1
                    continue
                accepted += 1
                seen = np.unique(case.target.buffer[: batch.total_bytes].view(np.int64))
                assert seen.tolist() == [word]
        finally:
            case.owner.call("calm")
        assert accepted, "no read was ever accepted: the test showed nothing"
        assert refused, "no read was ever refused: the test showed nothing"

    # T4: after cancellation nothing more is written

    @pytest.mark.parametrize("after_ms", [0, 1, 5, 20])
    def test_nothing_lands_after_a_cancelled_read(self, reader: EngineThread, owner: Any, after_ms: int) -> None:
        case = self.join(reader, owner, num_blocks=self.many_blocks)
        whole = case.blocks(shuffled(self.many_blocks, 1), shuffled(self.many_blocks, 2))
        reader.cancel_after(reader.engine.read(case.peer, whole, deadline_s=20.0), after_ms / 1000)
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
        reader.cancel_after(reader.engine.write(case.peer, whole, deadline_s=20.0), 0.005)
        before = owner.call("digest", case.source.region_id)
        time.sleep(0.05)
        assert owner.call("digest", case.source.region_id) == before

    def test_a_deadline_ends_a_read(self, reader: EngineThread, owner: Any) -> None:
        case = self.join(reader, owner, num_blocks=self.many_blocks)
        began_s = time.monotonic()
        with pytest.raises(TransferTimeout):
            case.read(case.blocks(shuffled(self.many_blocks, 1), shuffled(self.many_blocks, 2)), deadline_s=0.0005)
        assert time.monotonic() - began_s < 5.0
        case.target.buffer[:] = 0x33
        time.sleep(0.05)
        assert (case.target.buffer == 0x33).all()

    # T5: nothing but the given target offsets is touched, and never the source

    def test_reads_touch_only_their_targets(self, case: Case) -> None:
        before = case.owner.call("digest", case.source.region_id)
        case.read(case.blocks([1, 100_003], [BLOCK + 1, 3 * BLOCK + 5], 777))
        touched = np.zeros(case.target.nbytes, dtype=bool)
        touched[BLOCK + 1 : BLOCK + 778] = touched[3 * BLOCK + 5 : 3 * BLOCK + 782] = True
        assert (case.target.buffer[~touched] == _FILL).all()
        assert case.owner.call("digest", case.source.region_id) == before

    # Bad input: a typed error before any byte moves

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
            case.reader.engine.read_sync(case.peer, case.blocks(source, target, nbytes), deadline_s=5.0)
        assert (case.target.buffer == _FILL).all()

    def test_a_wrong_token_is_refused(self, case: Case) -> None:
        forged = RemoteRegion(case.source.region_id, case.source.nbytes, "00" * 16, handles=dict(case.source.handles))
        with pytest.raises(RegistrationError):
            case.read(case.blocks([0], [0])._replace(source=forged))
        # Also where this side's own check is circumvented: the transport itself refuses.
        case.peer.regions[case.source.region_id] = forged
        with pytest.raises(RegistrationError):
            case.read(case.blocks([0], [0])._replace(source=forged))
        assert (case.target.buffer == _FILL).all()

    def test_memory_that_was_taken_back_is_refused(self, case: Case) -> None:
        case.read(case.blocks([0], [0]))
        case.target.buffer[:] = _FILL
        case.owner.call("unregister", case.source.region_id)
        wait_until(lambda: case.source.region_id not in case.peer.regions)
        with pytest.raises(RegistrationError):
            case.read(case.blocks([0], [0]))
        # Also before the news has arrived: the transport itself refuses.
        case.peer.regions[case.source.region_id] = case.source
        with pytest.raises(RegistrationError):
            case.read(case.blocks([0], [0]))
        assert (case.target.buffer == _FILL).all()

    def test_own_memory_that_was_taken_back_is_refused(self, case: Case) -> None:
        case.reader.engine.unregister(case.target)
        with pytest.raises(RegistrationError):
            case.read(case.blocks([0], [0]))
        assert (case.target.buffer == _FILL).all()

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
        for _ in range(20):
            case, broken_off = self._take_back_in_mid_read(case)
            # In one process the owner waits for its readers, so that each batch is whole.
            if broken_off or not self.own_process:
                break
        assert broken_off or not self.own_process, "no batch was ever broken off: the test showed nothing"
        whole = case.blocks(shuffled(self.many_blocks, 6), shuffled(self.many_blocks, 6))
        case.read(whole)
        assert np.array_equal(case.target.buffer, case.expected)

    def _take_back_in_mid_read(self, case: Case) -> tuple[Case, bool]:
        """The case with the same bytes registered anew, and whether the read failed; it did not: all must be there."""
        order = shuffled(self.many_blocks, 6)
        case.target.buffer[:] = _FILL
        engine = case.reader.engine
        pending = case.reader.spawn(engine.read(case.peer, case.blocks(order, order), deadline_s=20.0))
        wait_until(lambda: pending.done() or not (case.target.buffer[order[:64]] == _FILL).all())
        case.owner.call("unregister", case.source.region_id)
        error = pending.exception(20)
        if error is None:
            assert np.array_equal(case.target.buffer, case.expected)
        else:
            assert isinstance(error, TransportError)
        again = case.owner.call("region", case.source.nbytes, seed=7, shared=self.shared)
        wait_until(lambda: again in case.peer.regions)
        return case._replace(source=case.peer.regions[again]), error is not None

    # T6: a dead peer gives an error in bounded time

    def test_a_killed_peer_fails_pending_work_within_a_second(self, reader: EngineThread, doomed: Any) -> None:
        case = self.join(reader, doomed, num_blocks=self.many_blocks)
        batch = case.blocks(shuffled(self.many_blocks, 1), shuffled(self.many_blocks, 2))

        async def keep_reading() -> None:
            while True:
                await reader.engine.read(case.peer, batch, deadline_s=20.0)

        pending = [reader.spawn(keep_reading()) for _ in range(4)]
        time.sleep(0.05)
        doomed.kill()
        began_s = time.monotonic()
        for future in pending:
            with pytest.raises(TransportError):
                future.result(10)
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
            case.read(case.blocks([BLOCK], [BLOCK]), deadline_s=0.5)
            assert np.array_equal(case.target.buffer[BLOCK : 2 * BLOCK], case.expected[BLOCK : 2 * BLOCK])
        else:
            with pytest.raises(TransferTimeout):
                case.read(case.blocks([BLOCK], [BLOCK]), deadline_s=0.5)
        assert time.monotonic() - began_s < 5.0
        doomed.resume()
        case.read(case.blocks([2 * BLOCK], [2 * BLOCK]))
        assert np.array_equal(case.target.buffer[2 * BLOCK : 3 * BLOCK], case.expected[2 * BLOCK : 3 * BLOCK])

    def test_a_stopped_peer_does_not_hinder_reads_from_others(
        self, reader: EngineThread, doomed: Any, owner: Any
    ) -> None:
        stuck, free = self.join(reader, doomed), self.join(reader, owner)
        doomed.stop()
        pending = [
            reader.spawn(reader.engine.read(stuck.peer, stuck.blocks([0], [i * BLOCK]), deadline_s=10.0))
            for i in range(32)
        ]
        free.read(free.blocks([BLOCK], [0]), deadline_s=5.0)
        assert np.array_equal(free.target.buffer[:BLOCK], free.expected[BLOCK : 2 * BLOCK])
        doomed.resume()
        concurrent.futures.wait(pending, 30)
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
                assert time.monotonic() - began_s < 5.0
                case.target.buffer[:] = 0x55
                network.mend()
                time.sleep(0.3)
                assert (case.target.buffer == 0x55).all()
            finally:
                owner.close()
        finally:
            network.close()

    # T7: a session binds both incarnations

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
                reader.run(reader.engine.read(peer, case.blocks([0], [0]), deadline_s=5.0))
            fresh = case.blocks([0], [0])._replace(source=peer.regions[region_id])
            reader.run(reader.engine.read(peer, fresh, deadline_s=5.0))
            assert np.array_equal(case.target.buffer[:BLOCK], random_bytes(BLOCK, 9))
        finally:
            again.close()

    # Connections come and go

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
            reader.run(reader.engine.read(peer, whole, deadline_s=5.0))
            reader.call(peer.close)


def wait_until(condition: Any, within_s: float = 5.0) -> None:
    """Return when the condition holds. Raises: AssertionError if it does not within `within_s`."""
    until_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until_s, "it did not happen in time"
        time.sleep(0.002)
