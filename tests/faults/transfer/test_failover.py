"""Transfers over a way that fails: retried on the next, detected by digest, ended by the deadline; one outcome each."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from kvferry.errors import (
    AuthenticationError,
    ConfigError,
    IntegrityError,
    PeerGone,
    TransferTimeout,
    TransportClosed,
    TransportError,
    WireError,
)
from kvferry.testing.engines import EngineThread
from kvferry.testing.faults import FaultyLink
from kvferry.testing.leaks import no_leaks
from kvferry.testing.owner import OwnerProcess, random_bytes
from kvferry.transfer import Peer, TransferEngine, TransferSettings
from kvferry.transport.base import BlockList, Link

BLOCK = 64 << 10
BLOCKS = 1600
WAIT_S = 60.0
AT_ONCE_S = 20.0
"""Bounds what takes milliseconds, on a machine that may give a process no CPU for seconds."""


@pytest.fixture
def owner() -> Iterator[OwnerProcess]:
    owner = OwnerProcess(("shm", "tcp"), verify_digest=True)
    yield owner
    owner.close()


@pytest.fixture
def proxy(owner: OwnerProcess) -> Iterator[FaultyLink]:
    proxy = FaultyLink(owner.address)
    yield proxy
    proxy.close()


def whole(reader: EngineThread, peer: Peer, region_id: int) -> BlockList:
    target = reader.engine.allocate(BLOCKS * BLOCK)
    order = np.random.default_rng(1).permutation(BLOCKS).astype(np.int64) * BLOCK
    return BlockList(peer.regions[region_id], target, order, order, BLOCK)


def read(reader: EngineThread, peer: Peer, blocks: BlockList, deadline_s: float = WAIT_S) -> Any:
    return reader.run(reader.engine.read(peer, blocks, deadline_s=deadline_s))


def is_right(blocks: BlockList) -> bool:
    return np.array_equal(blocks.target.buffer, random_bytes(BLOCKS * BLOCK, 7))  # type: ignore[union-attr]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110  (what is waited for happens in another engine)
            await asyncio.sleep(0.001)


class BreaksAfterHalf(Link):
    """Copies the first half of each batch through another link, then fails as a broken path does."""

    scheme = "shm"

    def __init__(self, link: Link) -> None:
        self._link, self.regions, self.calls = link, link.regions, 0

    def read(self, blocks: list[BlockList], **kwargs: Any) -> None:
        self.calls += 1
        half = [
            b._replace(
                source_offsets=b.source_offsets[: len(b.source_offsets) // 2],
                target_offsets=b.target_offsets[: len(b.target_offsets) // 2],
            )
            for b in blocks
        ]
        self._link.read(half, **kwargs)
        raise TransportError("the path broke in the middle")

    def write(self, blocks: list[BlockList], **kwargs: Any) -> None:
        raise TransportError("the path broke")

    def load_word(self, region: Any, offset: int, *, deadline_s: float) -> int:
        raise TransportError("the path broke")

    def close(self) -> None:
        self._link.close()


def test_a_transport_that_fails_in_mid_batch_is_replaced_by_the_next(owner: OwnerProcess) -> None:
    region_id = owner.call("region", BLOCKS * BLOCK, seed=7)
    with EngineThread(("shm", "tcp"), settings=TransferSettings(suspend_s=3600.0)) as reader:
        peer = reader.connect(owner.address)
        near = next(way for way in peer.ways if way.scheme == "shm")
        assert near.link is not None
        broken = near.link = BreaksAfterHalf(near.link)
        blocks = whole(reader, peer, region_id)
        done = read(reader, peer, blocks)
        assert (done.transport, done.retries, broken.calls) == ("tcp", 1, 1)
        assert is_right(blocks)
        (story,) = [choice for choice in reader.engine.explain(peer) if choice.scheme == "shm"]
        assert not story.usable and "broke in the middle" in story.why
        # The broken one is left alone for a while, then tried again.
        assert read(reader, peer, blocks).retries == 0 and broken.calls == 1
        near.suspended_until_s = 0.0
        read(reader, peer, blocks)
        assert broken.calls == 2


def test_the_farther_transport_waits_until_it_is_needed(owner: OwnerProcess) -> None:
    with EngineThread(("shm", "tcp")) as reader:
        peer = reader.connect(owner.address)
        near, far = reader.engine.explain(peer)
        assert (near.scheme, near.usable, far.scheme, far.usable) == ("shm", True, "tcp", False)
        assert near.latency_us and near.gbps and "standby" in far.why


def test_without_a_common_transport_each_reason_is_named(owner: OwnerProcess) -> None:
    with EngineThread(("inproc",)) as reader, pytest.raises(PeerGone, match="inproc: the peer does not offer it"):
        reader.connect(owner.address)


def test_a_byte_changed_on_the_way_is_found_by_the_digest(owner: OwnerProcess, proxy: FaultyLink) -> None:
    region_id = owner.call("region", BLOCKS * BLOCK, seed=7)
    with EngineThread(("tcp",), settings=TransferSettings(verify_digest=True, probe=False)) as reader:
        peer = reader.connect(proxy.address)
        blocks = whole(reader, peer, region_id)
        proxy.corrupt_after(3 * BLOCK)
        with pytest.raises(IntegrityError):
            read(reader, peer, blocks)
        read(reader, peer, blocks)
        assert is_right(blocks)


def test_cut_in_the_middle_the_pending_read_fails_at_once(owner: OwnerProcess, proxy: FaultyLink) -> None:
    region_id = owner.call("region", BLOCKS * BLOCK, seed=7)
    with EngineThread(("tcp",)) as reader:
        peer = reader.connect(proxy.address)
        blocks = whole(reader, peer, region_id)
        proxy.cut_after(20 * BLOCK)
        began_s = time.monotonic()
        with pytest.raises(PeerGone):
            read(reader, peer, blocks)
        assert time.monotonic() - began_s < AT_ONCE_S
        again = reader.connect(proxy.address)
        fresh = whole(reader, again, region_id)
        read(reader, again, fresh)
        assert is_right(fresh)


def test_a_stalled_way_ends_at_the_deadline_and_recovers(owner: OwnerProcess, proxy: FaultyLink) -> None:
    region_id = owner.call("region", BLOCKS * BLOCK, seed=7)
    with EngineThread(("tcp",)) as reader:
        peer = reader.connect(proxy.address)
        blocks = whole(reader, peer, region_id)
        proxy.stall()
        began_s = time.monotonic()
        with pytest.raises(TransferTimeout):
            read(reader, peer, blocks, deadline_s=0.3)
        assert time.monotonic() - began_s < AT_ONCE_S
        proxy.resume()
        read(reader, peer, blocks)
        assert is_right(blocks)


def test_a_link_that_is_closed_while_streams_are_handed_out_is_a_lost_peer(owner: OwnerProcess) -> None:
    region_id = owner.call("region", BLOCKS * BLOCK, seed=7)
    with EngineThread(("tcp",)) as reader:
        peer = reader.connect(owner.address)
        blocks = whole(reader, peer, region_id)
        link: Any = peer.ways[0].link
        for streams, rate in ((1, 1.0), (2, 9.0), (4, 1.0)):
            link._count.learn(streams, rate)
        link._pool.shutdown()
        # Threads can't be had: one stream does it.
        read(reader, peer, blocks)
        assert is_right(blocks)
        link.close()
        with pytest.raises(PeerGone):
            read(reader, peer, blocks)


def test_a_slow_way_is_only_slow(owner: OwnerProcess, proxy: FaultyLink) -> None:
    region_id = owner.call("region", BLOCKS * BLOCK, seed=7)
    proxy.delay_s = 0.0002
    with EngineThread(("tcp",)) as reader:
        peer = reader.connect(proxy.address)
        blocks = whole(reader, peer, region_id)
        read(reader, peer, blocks)
        assert is_right(blocks)


def test_a_wrong_secret_is_refused_on_both_sides(owner: OwnerProcess) -> None:
    with EngineThread(("tcp",), secret="another") as reader, pytest.raises(AuthenticationError):
        reader.connect(owner.address)
    assert owner.call("peers") == 0


def test_another_service_on_the_port_is_named() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    code = "import socket,sys\ns=socket.create_connection(('127.0.0.1',int(sys.argv[1])))\n"
    try:
        with EngineThread(("tcp",)) as reader:
            pending = reader.spawn(reader.engine.connect(f"tcp://127.0.0.1:{port}", deadline_s=WAIT_S))
            accepted, _ = listener.accept()
            accepted.sendall(b"HTTP/1.1 400 Bad Request\r\nServer: another one entirely\r\n\r\n")
            with pytest.raises(WireError, match="belongs to another service"):
                pending.result(WAIT_S)
            accepted.close()
            # And the other way round: a stranger that says nothing useful is refused and counted.
            host = reader.engine.address.removeprefix("tcp://").split(":")
            subprocess.run(
                [sys.executable, "-c", code + "s.send(b'GET / HTTP/1.1\\r\\n'*9); s.recv(99)", host[1]], check=True
            )
            until_s = time.monotonic() + WAIT_S
            while reader.engine.refusals.counts["wire_error"] < 2 and time.monotonic() < until_s:
                time.sleep(0.01)
            assert reader.engine.refusals.counts["wire_error"] == 2
    finally:
        listener.close()


def test_nobody_listens_or_answers() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    with EngineThread(("tcp",)) as reader:
        with pytest.raises(TransferTimeout):
            reader.run(reader.engine.connect(f"tcp://127.0.0.1:{port}", deadline_s=0.2))
        listener.close()
        with pytest.raises(PeerGone):
            reader.run(reader.engine.connect(f"tcp://127.0.0.1:{port}", deadline_s=WAIT_S))


def test_a_taken_port_names_its_holder() -> None:
    with EngineThread(("tcp",)) as reader, pytest.raises(ConfigError, match=r"pytest|python"):
        EngineThread(("tcp",), listen=reader.engine.address)


def test_closing_the_engine_fails_what_is_pending(owner: OwnerProcess, proxy: FaultyLink) -> None:
    region_id = owner.call("region", BLOCKS * BLOCK, seed=7)

    async def main() -> None:
        engine = TransferEngine(transports=("tcp",), secret=b"conformance")
        lost: list[str] = []
        engine.on_peer_lost = lambda peer, error: lost.append(error.cause)
        await engine.start()
        peer = await engine.connect(proxy.address, deadline_s=WAIT_S)
        # None of them can be over before the engine is closed.
        proxy.stall()
        target = engine.allocate(BLOCKS * BLOCK)
        order = np.arange(BLOCKS, dtype=np.int64) * BLOCK
        blocks = BlockList(peer.regions[region_id], target, order, order, BLOCK)
        pending = [asyncio.ensure_future(engine.read(peer, blocks, deadline_s=WAIT_S)) for _ in range(6)]
        await asyncio.sleep(0.005)
        await engine.close()
        ends = await asyncio.gather(*pending, return_exceptions=True)
        assert all(isinstance(end, TransportClosed) for end in ends), ends
        with pytest.raises(TransportClosed):
            await engine.read(peer, blocks, deadline_s=1.0)
        assert lost == ["transport_closed"]

    asyncio.run(main())


def test_messages_go_both_ways_in_order_and_loss_is_told(owner: OwnerProcess) -> None:
    async def main() -> None:
        near, far = (TransferEngine(transports=("tcp",), secret=b"s", hello=name) for name in (b"near", b"far"))
        got: list[bytes] = []
        lost: list[tuple[bytes, str]] = []
        arrived = asyncio.Event()

        def answer(peer: Peer, payload: bytes) -> None:
            peer.send(b"re:" + payload)

        def collect(peer: Peer, payload: bytes) -> None:
            got.append(payload)
            if len(got) == 100:
                arrived.set()

        far.on_message, near.on_message = answer, collect
        far.on_peer_lost = lambda peer, error: lost.append((peer.hello, error.cause))
        await near.start()
        await far.start()
        peer = await near.connect(far.address, deadline_s=WAIT_S)
        assert peer.hello == b"far" and peer.outbound and peer.address == far.address
        (accepted,) = far.peers
        assert accepted.hello == b"near" and not accepted.outbound and accepted.address == near.address
        for number in range(100):
            peer.send(str(number).encode() * 1000)
        await asyncio.wait_for(arrived.wait(), WAIT_S)
        assert got == [b"re:" + str(n).encode() * 1000 for n in range(100)]
        # Regions that come and go are known to the peer, in order with the messages.
        region = near.allocate(4096)
        peer.send(b"now")
        await until(lambda: got[-1] == b"re:now")
        assert region.region_id in accepted.regions
        peer.close()
        await until(lambda: bool(lost))
        assert lost == [(b"near", "peer_gone")]
        await near.close()
        await far.close()

    asyncio.run(main())


def test_hundreds_of_connections_leave_nothing(owner: OwnerProcess) -> None:
    with no_leaks():
        _connect_often(owner, 300)
    until_s = time.monotonic() + WAIT_S
    while owner.call("peers") and time.monotonic() < until_s:
        time.sleep(0.01)
    assert owner.call("peers") == 0


def _connect_often(owner: OwnerProcess, times: int) -> None:
    with EngineThread(("shm", "tcp"), settings=TransferSettings(probe=False)) as reader:
        for _ in range(times):
            reader.call(reader.connect(owner.address).close)
