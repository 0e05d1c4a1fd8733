"""What every conformance test starts from: a reader connected to an owner, with one region at each side."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from kvferry.testing.engines import EngineThread, LocalOwner
from kvferry.testing.owner import OwnerProcess, random_bytes
from kvferry.transfer import Peer, TransferSettings
from kvferry.transport.base import BlockList, Region, RemoteRegion

BLOCK = 64 << 10
UNTOUCHED = 0xEE
"""What fills a target that nothing was read into."""


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


class OwnerAndReader:
    """The fixtures, and what they may assume about the transport; `TransportConformance` says what each name means."""

    transports: ClassVar[tuple[str, ...]] = ()
    plugin: ClassVar[str] = ""
    shared: ClassVar[bool] = True
    own_process: ClassVar[bool] = True
    one_sided: ClassVar[bool] = True
    over_network: ClassVar[bool] = False
    many_blocks: ClassVar[int] = 1600
    word_stands_s: ClassVar[float] = 0.002
    num_connects: ClassVar[int] = 30

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
        target.buffer[:] = UNTOUCHED
        return Case(reader, owner, peer, peer.regions[region_id], target, random_bytes(num_blocks * BLOCK, 7))


def wait_until(condition: Any, within_s: float = 30.0) -> None:
    """Return when the condition holds. Raises: AssertionError if it does not within `within_s`."""
    until_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until_s, "it did not happen in time"
        time.sleep(0.002)
