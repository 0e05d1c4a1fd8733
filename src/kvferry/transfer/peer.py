"""A connected engine as this side sees it, and the values that transfers give back."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from kvferry.errors import KVError, TransportClosed
from kvferry.transfer.control import ControlConnection
from kvferry.transport.base import Link, RemoteRegion
from kvferry.transport.checksum import Sums
from kvferry.types import Incarnation

if TYPE_CHECKING:
    from kvferry.transfer.transfers import Transfer


class Completion(NamedTuple):
    """A finished transfer. `transport` is the one that moved the last byte; `retries` counts slices that failed on
    another one before. `sums`, int64 [num_blocks] in the lists' order, are the checksums of what was read, where they
    were asked for and every transport that moved a slice takes them on the way."""

    nbytes: int
    duration_s: float
    transport: str
    retries: int
    sums: Sums | None = None


class TransportChoice(NamedTuple):
    """One transport as considered for a peer; in order of preference. Figures come from the probe at connect."""

    scheme: str
    usable: bool
    why: str
    latency_us: float | None = None
    gbps: float | None = None


class Way:
    """One transport towards one peer: its link, or why there is none."""

    def __init__(self, scheme: str, link: Link | None, why: str) -> None:
        self.scheme, self.link, self.why = scheme, link, why
        self.latency_us: float | None = None
        self.gbps: float | None = None
        self.suspended_until_s = 0.0

    def usable(self) -> bool:
        return self.link is not None and time.monotonic() >= self.suspended_until_s

    def choice(self) -> TransportChoice:
        return TransportChoice(self.scheme, self.usable(), self.why, self.latency_us, self.gbps)


class Peer:
    """A connected engine. `regions` is kept current; `lost` says why it is gone, None while it is there.

    `address` is the listener that it told of; `hello` the upper room's bytes; `outbound` whether this side connected.
    """

    def __init__(
        self,
        connection: ControlConnection,
        *,
        address: str,
        incarnation: Incarnation,
        hello: bytes,
        offers: dict[str, dict[str, Any]],
        regions: dict[int, RemoteRegion],
        outbound: bool,
    ) -> None:
        self.name = f"{address}#{incarnation:x}"
        self.address, self.incarnation, self.hello, self.outbound = address, incarnation, hello, outbound
        self.regions = regions
        self.offers = offers
        self.lost: KVError | None = None
        self.ways: list[Way] = []
        self.opening = threading.Lock()
        self.transfers: set[Transfer] = set()
        self._connection = connection

    def send(self, payload: bytes) -> None:
        """Send a message of the upper room: in order, authenticated, at most 16 MiB. Only on the loop's thread.

        Raises: PeerGone if the peer is lost, or has not taken earlier messages.
        """
        self._connection.send_message(payload)

    def close(self) -> None:
        """Part from the peer: pending transfers fail, links are closed. Only on the loop's thread. Idempotent."""
        self._connection.close(TransportClosed("this side closed the connection", peer=self.name))

    def abort(self, reason: KVError) -> None:
        """The peer is known to be dead: end everything that waits for it. Only on the loop's thread."""
        self._connection.abort(reason)

    def __repr__(self) -> str:
        return f"<Peer {self.name}{' lost' if self.lost else ''}>"
