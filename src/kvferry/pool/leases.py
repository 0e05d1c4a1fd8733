"""Leases of gets: each is one word that stands as long as its blocks stay as they are. Used on one thread."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from kvferry.clock import Clock
from kvferry.errors import RegistrationError
from kvferry.pool.arena import new_word
from kvferry.pool.entries import Entry
from kvferry.pool.index import BlockIndex
from kvferry.types import Word


class Lease(NamedTuple):
    """Blocks held for one reader. `owner` is its connection; `ends_s` is on the clock of the node."""

    owner: Hashable
    entries: tuple[Entry, ...]
    word: Word
    word_offset: int
    ends_s: float


class Leases:
    """Every lease of a node, by its owner and the id that the owner gave it."""

    def __init__(self, index: BlockIndex, clock: Clock, ttl_s: float) -> None:
        self._index, self._clock, self._ttl_s = index, clock, ttl_s
        self._leases: dict[tuple[Hashable, int], Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def grant(self, owner: Hashable, lease_id: int, entries: list[Entry]) -> Lease:
        """Lease blocks on which the caller has one hold each; the lease takes these holds over.

        Raises: PoolExhausted when no word is free, RegistrationError for an id in use; the holds stay the caller's.
        """
        if (owner, lease_id) in self._leases:
            raise RegistrationError(f"lease {lease_id} exists; a client numbers its requests, each once")
        word = new_word()
        offset = self._index.arena.words.allocate(word)
        lease = Lease(owner, tuple(entries), word, offset, self._clock.now_s() + self._ttl_s)
        self._leases[owner, lease_id] = lease
        return lease

    def end(self, owner: Hashable, lease_id: int) -> bool:
        """The reader is done, or is no longer waited for. False if the lease had ended before."""
        lease = self._leases.pop((owner, lease_id), None)
        if lease is None:
            return False
        # The word goes first: a reader that is still at it finds out before any of its slabs is another's.
        self._index.arena.words.free(lease.word_offset)
        for entry in lease.entries:
            self._index.release(entry)
        return True

    def end_all(self, owner: Hashable) -> int:
        """The owner is gone."""
        mine = [lease_id for who, lease_id in self._leases if who == owner]
        return sum(self.end(owner, lease_id) for lease_id in mine)

    def expire(self) -> int:
        """End the leases whose time is over; returns how many."""
        now_s = self._clock.now_s()
        late = [key for key, lease in self._leases.items() if lease.ends_s <= now_s]
        return sum(self.end(*key) for key in late)
