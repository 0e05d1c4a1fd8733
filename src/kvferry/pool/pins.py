"""Pins of clients: each keeps a block in host memory until it is taken back, or its client is gone."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from kvferry.pool.entries import Entry
from kvferry.pool.index import BlockIndex
from kvferry.pool.keys import BlockSpace


class Pins:
    """Every pin of a node by the client that set it. Used on one thread.

    A pin is on the block that was there: its removal ends it, and what is put under the same hash later is not pinned.
    """

    def __init__(self, index: BlockIndex) -> None:
        self._index = index
        self._by_owner: dict[Hashable, dict[tuple[BlockSpace, bytes], list[Entry]]] = {}

    def pin(self, owner: Hashable, space: BlockSpace, hashes: Sequence[bytes]) -> int:
        """Pin these blocks; returns how many of them are in host memory."""
        mine = self._by_owner.setdefault(owner, {})
        pinned = self._index.pin(space, hashes)
        for entry in pinned:
            mine.setdefault((space, entry.key[1]), []).append(entry)
        return len(pinned)

    def unpin(self, owner: Hashable, space: BlockSpace, hashes: Sequence[bytes]) -> int:
        """Take back one pin of the owner's own on each; returns how many had one."""
        mine, count = self._by_owner.get(owner, {}), 0
        for block_hash in hashes:
            pinned = mine.get((space, block_hash), [])
            while pinned:
                if self._index.unpin(pinned.pop()):
                    count += 1
                    break
            if not pinned:
                mine.pop((space, block_hash), None)
        return count

    def end_all(self, owner: Hashable) -> None:
        """The owner is gone."""
        for pinned in self._by_owner.pop(owner, {}).values():
            for entry in pinned:
                self._index.unpin(entry)
