"""The conformance suite over every host transport."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kvferry.testing.conformance import TransportConformance
from kvferry.transfer import TransferSettings


class TestInproc(TransportConformance):
    transports = ("inproc",)
    own_process = False

    @pytest.fixture
    def owner(self) -> Iterator[Any]:
        """One for each test: what the owner holds is held by this process, and would look like a leak."""
        owner = self.make_owner()
        yield owner
        owner.close()


class TestSharedMemory(TransportConformance):
    transports = ("shm",)


class TestProcessMemory(TransportConformance):
    """Memory that no peer can map: copied across processes by the kernel."""

    transports = ("shm",)
    shared = False


class TestTcp(TransportConformance):
    transports = ("tcp",)
    one_sided = False
    over_network = True


class TestTcpWithDigest(TransportConformance):
    transports = ("tcp",)
    one_sided = False

    def settings(self) -> TransferSettings:
        return TransferSettings(verify_digest=True)
