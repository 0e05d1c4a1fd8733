"""Leases and the timers that watch them. Pure values: the time comes in with every call.

A lease is the source's timed promise not to reuse some blocks. Its *word*, a random nonce that lies next to the
blocks, makes the promise checkable: a reader whose word still stands after its last byte has read what was published.
Clocks decide only how long blocks are kept for a silent reader; that no wrong byte is used rests on the word alone.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable
from typing import Generic, TypeVar

import msgspec

from kvferry.errors import ConfigError
from kvferry.types import Word

K = TypeVar("K", bound=Hashable)


class HandoffSettings(msgspec.Struct, frozen=True):
    """Times and bounds of the handoff, equal in meaning on both sides; seconds.

    Attributes:
        lease_ttl_s: a silent peer's blocks are kept, and a silent peer is waited for, this long.
        heartbeat_s: how often the target speaks up; a few of these must fit into a lease.
        stall_grace_s: after a stall, how long timers wait for the sockets to be read.
        drain_s: how long stopped reads may take to end before their link is closed.
        ack_repeats, ack_interval_s: the ack is sent this often, this far apart, until the source confirms.
        max_remaining_s: a longer deadline in a peer's message is cut to this.
        max_per_peer: parked requests, and tombstones made by a peer's cancels, are each bounded by this.
        num_slots: words in the word table, so the most leases at a time.
        recompute_on_failure: what the target's request becomes when its handoff fails: recomputed there, or failed.
    """

    lease_ttl_s: float = 3.0
    heartbeat_s: float = 0.6
    stall_grace_s: float = 0.2
    drain_s: float = 2.0
    ack_repeats: int = 4
    ack_interval_s: float = 0.3
    max_remaining_s: float = 3600.0
    max_per_peer: int = 256
    num_slots: int = 4096
    recompute_on_failure: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.heartbeat_s * 3 <= self.lease_ttl_s:
            raise ConfigError(
                f"a lease of {self.lease_ttl_s} s does not hold three heartbeats of {self.heartbeat_s} s: one lost "
                "message would end it; lower heartbeat_s or raise lease_ttl_s"
            )

    def bounded_s(self, remaining_s: float) -> float:
        """A peer's remaining time as far as this side believes it: 0 (also for NaN) to `max_remaining_s`."""
        return min(remaining_s, self.max_remaining_s) if remaining_s > 0 else 0.0


class Lease:
    """The source's record of one lease: the word, its slot, how long it lasts, and whether it was claimed."""

    __slots__ = ("claimed", "expires_s", "latest_s", "slot", "ttl_s", "word")

    def __init__(self, slot: int, word: Word, *, ttl_s: float, now_s: float, latest_s: float) -> None:
        self.slot = slot
        self.word = word
        self.ttl_s = ttl_s
        self.latest_s = latest_s
        self.expires_s = min(now_s + ttl_s, latest_s)
        self.claimed = False

    def renew(self, echo_s: float | None, now_s: float) -> None:
        """The target has proved that it was alive at `echo_s` of this side's clock: the lease lasts a term from then.

        Never from now: the proof may have waited in a socket while this process was stopped.
        """
        if echo_s is not None and echo_s <= now_s:
            self.expires_s = max(self.expires_s, min(echo_s + self.ttl_s, self.latest_s))

    def remaining_s(self, now_s: float) -> float:
        return max(0.0, self.expires_s - now_s)

    def claim(self) -> bool:
        """Take the right to free the blocks. True for the first caller only (R8)."""
        if self.claimed:
            return False
        self.claimed = True
        return True


class Timers(Generic[K]):
    """One next wake-up for each key. Setting a key's time again replaces the earlier one."""

    def __init__(self) -> None:
        self._wake: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._count = itertools.count()

    def set(self, key: K, at_s: float) -> None:
        """Wake `key` at `at_s`."""
        if self._wake.get(key) != at_s:
            self._wake[key] = at_s
            heapq.heappush(self._heap, (at_s, next(self._count), key))

    def drop(self, key: K) -> None:
        """Never wake `key`; a key that is not set is fine."""
        self._wake.pop(key, None)

    def next_s(self) -> float | None:
        """When the next key wakes, or None."""
        heap = self._heap
        while heap and self._wake.get(heap[0][2]) != heap[0][0]:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def due(self, now_s: float) -> list[K]:
        """Take out all keys whose time has come, earliest first."""
        keys: list[K] = []
        while (at_s := self.next_s()) is not None and at_s <= now_s:
            key = heapq.heappop(self._heap)[2]
            del self._wake[key]
            keys.append(key)
        return keys

    def __contains__(self, key: object) -> bool:
        return key in self._wake
