"""The conformance suite over every host transport."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvferry.testing.conformance import Case, TransportConformance, wait_until
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

    def test_memory_that_was_taken_back_is_unmapped(self, case: Case) -> None:
        """Mapped here, the owner could not free it."""
        inode = str(case.source.handles["shm"]["inode"])
        case.read(case.blocks([0], [0]))
        case.reader.engine.read_sync(case.peer, case.blocks([0], [0], 4096), deadline_s=60.0)
        assert inode in mapped_inodes()
        case.owner.call("unregister", case.source.region_id)
        wait_until(lambda: inode not in mapped_inodes())


def mapped_inodes() -> set[str]:
    return {line.split()[4] for line in Path("/proc/self/maps").read_text().splitlines()}


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
