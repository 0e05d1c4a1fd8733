"""The conformance suite over NIXL (UCX on loopback), where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import pytest

from kvferry.errors import TransferUnfinished
from kvferry.testing.conformance import BLOCK, TransportConformance, offsets
from kvferry.testing.engines import EngineThread
from kvferry.testing.faults import NetworkNamespace
from kvferry.testing.owner import OwnerProcess, random_bytes
from kvferry.transport.base import BlockList

INSTALLED = any(importlib.util.find_spec(name) for name in ("nixl", "nixl_cu12", "nixl_cu13"))

# UCX keeps threads and sockets of its own for the life of the process.
pytestmark = [
    pytest.mark.skipif(not INSTALLED, reason="nixl is not installed"),
    pytest.mark.leaks_allowed,
]


class OverUcx(TransportConformance):
    """UCX reads its variables when an agent is made: the owner's process inherits them, readers see them here."""

    transports = ("nixl",)
    many_blocks = 400
    num_connects = 8
    ucx: ClassVar[dict[str, str]] = {}

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def environment(cls) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in ({"UCX_NET_DEVICES": "lo"} | cls.ucx).items():
                patch.setenv(name, value)
            yield


class TestNixl(OverUcx):
    """UCX chooses: across processes of one host the kernel copies, and the owner takes no part."""


class TestNixlTcp(OverUcx):
    ucx = {"UCX_TLS": "tcp"}
    one_sided = False
    word_stands_s = 0.02


def test_a_cut_network_ends_in_an_error_that_says_what_may_still_land(monkeypatch: pytest.MonkeyPatch) -> None:
    """UCX cannot take a read back whose peer does not answer: the caller is told not to reuse the target."""
    if (why_not := NetworkNamespace.why_not()) is not None:
        pytest.skip(why_not)
    monkeypatch.setenv("UCX_TLS", "tcp")
    monkeypatch.delenv("UCX_NET_DEVICES", raising=False)
    network = NetworkNamespace()
    owner = None
    try:
        owner = OwnerProcess(("nixl",), listen=f"tcp://{network.host}:0", prefix=network.prefix)
        region_id = owner.call("region", BLOCK, seed=7)
        with EngineThread(("nixl",)) as reader:
            peer = reader.connect(owner.address)
            target = reader.engine.allocate(BLOCK)
            whole = BlockList(peer.regions[region_id], target, offsets([0]), offsets([0]), BLOCK)
            reader.run(reader.engine.read(peer, whole, deadline_s=10.0))
            assert np.array_equal(target.buffer, random_bytes(BLOCK, 7))
            network.cut()
            with pytest.raises(TransferUnfinished, match="may still be written") as unfinished:
                reader.run(reader.engine.read(peer, whole, deadline_s=0.5))
            assert not unfinished.value.is_over()
        assert unfinished.value.is_over()
    finally:
        if owner is not None:
            owner.close()
        network.close()
