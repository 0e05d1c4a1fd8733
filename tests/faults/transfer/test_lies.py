"""Peers that lie and strangers on the port: refused by a typed error, nothing written, the engine lives on."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from kvferry.errors import RegistrationError, TransportError
from kvferry.testing.engines import EngineThread
from kvferry.testing.owner import OwnerProcess, random_bytes
from kvferry.transfer import Peer
from kvferry.transport.base import BlockList, Region, RemoteRegion
from kvferry.transport.streams import PREFACE
from kvferry.wire import encode_frame

SIZE = 1 << 20
SEED = 20261122


@pytest.fixture(scope="module")
def owner() -> Iterator[OwnerProcess]:
    owner = OwnerProcess(("shm", "tcp"))
    yield owner
    owner.close()


def one(source: RemoteRegion, target: Region, offset: int = 0) -> BlockList:
    at = np.array([offset], dtype=np.int64)
    return BlockList(source, target, at, np.zeros(1, dtype=np.int64), 4096)


def told_instead(peer: Peer, region: RemoteRegion) -> RemoteRegion:
    """As if the peer had told this of its region."""
    peer.regions[region.region_id] = region
    return region


@pytest.mark.parametrize("scheme", ["shm", "tcp"])
def test_a_region_larger_than_its_memory_is_refused(owner: OwnerProcess, scheme: str) -> None:
    region_id = owner.call("region", SIZE, seed=1)
    with EngineThread((scheme,)) as reader:
        peer = reader.connect(owner.address)
        target = reader.engine.allocate(SIZE)
        lie = told_instead(peer, msgspec.structs.replace(peer.regions[region_id], nbytes=SIZE * 4))
        with pytest.raises(RegistrationError):
            reader.run(reader.engine.read(peer, one(lie, target, 3 * SIZE), deadline_s=60.0))
        with pytest.raises(RegistrationError):
            reader.engine.read_sync(peer, one(lie, target, 3 * SIZE), deadline_s=60.0)
        assert not target.buffer.any()


def test_a_file_that_could_shrink_is_not_mapped() -> None:
    """A peer that could shrink the file would crash this process in the middle of a copy."""
    with EngineThread(("shm",)) as liar, EngineThread(("shm",)) as reader:
        region = liar.engine.allocate(SIZE)
        peer = reader.connect(liar.engine.address)
        unsealed = os.memfd_create("unsealed")
        try:
            os.ftruncate(unsealed, SIZE)
            told = peer.regions[region.region_id]
            handle = told.handles["shm"] | {"fd": unsealed, "inode": os.fstat(unsealed).st_ino}
            lie = told_instead(peer, msgspec.structs.replace(told, handles={"shm": handle}))
            target = reader.engine.allocate(SIZE)
            with pytest.raises(RegistrationError, match="sealed"):
                reader.run(reader.engine.read(peer, one(lie, target), deadline_s=60.0))
        finally:
            os.close(unsealed)


@pytest.mark.parametrize("handle", [{}, {"slot": 99_999, "address": 0}, {"slot": -1, "address": 0}])
def test_a_handle_that_makes_no_sense_is_an_error_of_kvferry(owner: OwnerProcess, handle: dict[str, int]) -> None:
    region_id = owner.call("region", SIZE, seed=1)
    with EngineThread(("shm",)) as reader:
        peer = reader.connect(owner.address)
        target = reader.engine.allocate(SIZE)
        lie = told_instead(peer, msgspec.structs.replace(peer.regions[region_id], handles={"shm": handle}))
        with pytest.raises(TransportError):
            reader.run(reader.engine.read(peer, one(lie, target), deadline_s=60.0))


def test_noise_on_the_listener_hurts_nobody(owner: OwnerProcess) -> None:
    rng = np.random.default_rng(SEED)
    region_id = owner.call("region", SIZE, seed=1)
    host, _, port = owner.address.removeprefix("tcp://").partition(":")
    for number in range(60):
        noise = rng.bytes(int(rng.integers(1, 300)))
        start = (b"", PREFACE, PREFACE + encode_frame(b"x"), b"KVF1", encode_frame(noise))[number % 5]
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(start + noise)
            with contextlib.suppress(OSError):  # It may have been refused already.
                stranger.shutdown(socket.SHUT_WR)
            stranger.settimeout(60)
            # Whatever the answer, the connection ends.
            while True:
                try:
                    if not stranger.recv(4096):
                        break
                except ConnectionResetError:
                    break
    with EngineThread(("tcp",)) as reader:
        peer = reader.connect(owner.address)
        target = reader.engine.allocate(SIZE)
        reader.run(reader.engine.read(peer, one(peer.regions[region_id], target), deadline_s=60.0))
        assert np.array_equal(target.buffer[:4096], random_bytes(SIZE, 1)[:4096])
