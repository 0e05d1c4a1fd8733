"""The contract of a transport: blocking, one-sided block reads between registered regions.

A transport instance belongs to one engine. As *owner* it exports regions to peers; as *reader* it opens a link to one
peer and reads from that peer's regions into its own. All calls of a `Link` block and are safe from any thread that
is no event loop's; the transfer engine (kvferry.transfer) runs them on its threads and adds asyncio, priorities,
deadlines, failover. `kvferry.testing` holds the conformance suite: T1 to T7 of the handoff protocol.

Importing this module imports no transport. `registry.py` maps schemes to implementations.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from kvferry.errors import RegistrationError
from kvferry.layout import Offsets
from kvferry.transport.checksum import Sums
from kvferry.types import Incarnation

MemoryKind = Literal["host", "cuda"]


class Region(msgspec.Struct, frozen=True):
    """Registered contiguous memory of this process.

    `address` is its first byte, `buffer` keeps it alive, `backing` is (fd, offset) where it is a mapping of shared
    memory that peers can map too. `writable` regions were lent out for a peer's `write`. `token` is 128 random bits
    in hex: a peer that does not know it cannot read.
    """

    region_id: int
    address: int
    nbytes: int
    token: str
    kind: MemoryKind = "host"
    device: int = 0
    writable: bool = False
    backing: tuple[int, int] | None = None
    buffer: Any = None


class RemoteRegion(msgspec.Struct, frozen=True):
    """A peer's region as this side learned it. `handles` maps a transport's scheme to what its `export` gave."""

    region_id: int
    nbytes: int
    token: str
    kind: MemoryKind = "host"
    device: int = 0
    writable: bool = False
    handles: dict[str, dict[str, Any]] = {}


class Guard(NamedTuple):
    """A lease's word to check after the last byte was read: 8 bytes at `offset` of the peer's `region_id`."""

    region_id: int
    offset: int
    word: int


class BlockList(NamedTuple):
    """`nbytes` from each `source_offsets[i]` of `source` to `target_offsets[i]` of `target`; int64 arrays [n].

    For a `read`, source is remote and target local; for a `write`, the other way round.
    """

    source: Region | RemoteRegion
    target: Region | RemoteRegion
    source_offsets: Offsets
    target_offsets: Offsets
    nbytes: int

    @property
    def total_bytes(self) -> int:
        return len(self.source_offsets) * self.nbytes


class StopToken:
    """Cancels one transfer. `set()` asks; the transfer's own return says that no further byte can land (T4)."""

    __slots__ = ("_asked",)

    def __init__(self) -> None:
        self._asked = False

    def set(self) -> None:
        self._asked = True

    def is_set(self) -> bool:
        return self._asked


class Link(abc.ABC):
    """The reader's way to one peer over one transport. Bound to both incarnations (T7).

    Block lists reach a link validated (`kvferry.transport.blocks`): offsets inside their regions, targets apart from
    one another, local regions registered. `regions` are the peer's regions by id; the engine sets it once and keeps
    it current, so that a link can find the region of a guard's word.
    """

    scheme: ClassVar[str]
    regions: Mapping[int, RemoteRegion] = {}

    def guard_region(self, guard: Guard) -> RemoteRegion:
        """The peer's region that holds the guard's word.

        Raises: RegistrationError if the peer has no such region (any more).
        """
        region = self.regions.get(guard.region_id)
        if region is None:
            raise RegistrationError(f"the peer has no region {guard.region_id}, which should hold the lease's word")
        return region

    @abc.abstractmethod
    def read(self, blocks: list[BlockList], *, guard: Guard | None, stop: StopToken, deadline_s: float) -> None:
        """Copy all block lists into local regions; return once every byte is in place (T1).

        With a `guard`, the word is loaded after the last read completed (T2).

        Raises:
            LeaseExpired: the guard's word was another one after the read.
            TransferTimeout: `deadline_s` (monotonic seconds from now) passed.
            HandoffAborted: `stop` was set.
            PeerGone, TransportError: the peer or the path failed.
            RegistrationError: a region is gone or its token is wrong; nothing was written.
        After failure: the target blocks hold unspecified bytes; no further byte will land (T4). Bytes outside the
        given target offsets are never touched (T5).
        """

    def read_block(self, block: BlockList, *, guard: Guard | None, deadline_s: float) -> None:
        """As `read` of a list that holds one block. Overridden where a small one has a shorter way."""
        self.read([block], guard=guard, stop=StopToken(), deadline_s=deadline_s)

    def read_summed(
        self, blocks: list[BlockList], *, guard: Guard | None, stop: StopToken, deadline_s: float
    ) -> list[Sums] | None:
        """As `read`, and each list's checksums (`kvferry.transport.checksum`) of what was read, taken on the way.

        None where this transport takes none: what lies in the target then can be summed afterwards.
        """
        self.read(blocks, guard=guard, stop=stop, deadline_s=deadline_s)
        return None

    @abc.abstractmethod
    def write(self, blocks: list[BlockList], *, stop: StopToken, deadline_s: float) -> None:
        """Copy local blocks into a peer's `writable` region. Raises and failure as for `read`."""

    @abc.abstractmethod
    def load_word(self, region: RemoteRegion, offset: int, *, deadline_s: float) -> int:
        """The 8 bytes at `offset` as a signed integer, loaded atomically by the machine or the owner (T2)."""

    def mapped(self, region: RemoteRegion) -> npt.NDArray[np.uint8] | None:
        """The peer's region as this process sees it, uint8 [nbytes], read-only; None where it is not mapped here.

        To look at bytes that were just read, while caches hold them. They are the peer's to change: what is seen means
        something only if a guard's word stands afterwards.
        """
        return None

    def forget(self, region: RemoteRegion) -> None:  # noqa: B027  (most transports hold nothing for one region)
        """The peer took a region back, and `regions` has it no more: let go of what is held of it. May block, and so is
        never called on an event loop."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release everything held of the peer: mappings, sockets, handles. Idempotent."""


class Transport(abc.ABC):
    """One way of moving bytes, for one engine."""

    scheme: ClassVar[str]

    @abc.abstractmethod
    def offer(self) -> Mapping[str, Any]:
        """What a peer must know to open a link to this side; msgpack-able. May bind a listener on first use."""

    @abc.abstractmethod
    def export(self, region: Region) -> dict[str, Any] | None:
        """What a peer must know to reach this region; None where this transport cannot serve it."""

    @abc.abstractmethod
    def withdraw(self, region: Region) -> None:
        """Stop serving a region, which the engine does not find any more. Returns when no peer is being sent its bytes
        (where this side sends; a one-sided reader finds out by itself)."""

    def sums(self, region: Region, offsets: Offsets, nbytes: int, *, deadline_s: float) -> Sums | None:
        """int64 [num_blocks]: checksums of blocks of this region; None where this transport can't look into it.

        Raises: TransferTimeout, TransportError.
        """
        return None

    @abc.abstractmethod
    def connect(self, offer: Mapping[str, Any], *, peer: str, incarnation: Incarnation, deadline_s: float) -> Link:
        """Open a link, bound to the peer's `incarnation`. Blocks. `peer` names the other side in errors.

        Raises:
            TransportError: this transport cannot reach that peer; the message says why (`engine.explain` shows it).
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Stop serving, close every link, join every thread. Idempotent."""
