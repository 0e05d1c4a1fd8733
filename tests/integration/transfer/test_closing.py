"""An engine that closes just as a peer comes."""

from __future__ import annotations

import asyncio
import socket

import pytest

from kvferry.transfer import TransferEngine


async def test_a_peer_that_comes_while_the_engine_closes_leaves_no_socket(caplog: pytest.LogCaptureFixture) -> None:
    """The leak check looks for the socket; the log, for what asyncio says of one that it accepted for nobody."""
    engine = TransferEngine(transports=("tcp",))
    await engine.start()
    await asyncio.sleep(0)  # It waits for peers now.
    host, _, port = engine.address.removeprefix("tcp://").rpartition(":")
    # The loop sees that there is something to accept in the same turn in which it goes on here.
    with socket.create_connection((host, int(port))):
        await asyncio.sleep(0)
        await engine.close()
    assert not caplog.records
