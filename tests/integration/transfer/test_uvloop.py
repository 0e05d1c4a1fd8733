"""The engine on uvloop, which instances run on: its transports and sockets differ from asyncio's in details."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import uvloop

from kvferry.transfer import Peer, TransferEngine
from kvferry.transport.base import BlockList, Guard
from kvferry.transport.memory import WordTable


@pytest.fixture(scope="module", autouse=True)
def first_uvloop() -> None:
    """Let libuv open what it keeps for the whole process before any test is measured."""
    uvloop.run(asyncio.sleep(0))


@pytest.mark.parametrize("scheme", ["shm", "tcp", "inproc"])
def test_reads_messages_and_partings_work_on_uvloop(scheme: str) -> None:
    async def main() -> None:
        owner, reader = TransferEngine(transports=(scheme,)), TransferEngine(transports=(scheme,))
        answered, parted = asyncio.Event(), asyncio.Event()

        def answer(peer: Peer, payload: bytes) -> None:
            peer.send(payload[::-1])

        owner.on_message = answer
        reader.on_message = lambda peer, payload: answered.set() if payload == b"cba" else None
        owner.on_peer_lost = lambda peer, error: parted.set()
        await owner.start()
        await reader.start()
        source, words = owner.allocate(1 << 20), owner.allocate(4096)
        source.buffer[:] = 7
        offset = WordTable(words).allocate(99)
        peer = await reader.connect(owner.address, deadline_s=60.0)
        target = reader.allocate(1 << 20)
        at = np.arange(16, dtype=np.int64) * 65536
        blocks = BlockList(peer.regions[source.region_id], target, at, at[::-1].copy(), 65536)
        await reader.read(peer, blocks, guard=Guard(words.region_id, offset, 99), deadline_s=60.0)
        assert (target.buffer == 7).all()
        peer.send(b"abc")
        async with asyncio.timeout(60):
            await answered.wait()
            peer.close()
            await parted.wait()
        await reader.close()
        await owner.close()

    uvloop.run(main())
