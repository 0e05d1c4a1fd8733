"""Pins of clients: each keeps a block in host memory until it is taken back, or its client is gone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

from kvferry.pool.index import BlockIndex
from kvferry.pool.keys import BlockSpace


class Pins:
    """Every pin of a node by the client that set it. Used on one thread."""

    def __init__(self, index: BlockIndex) -> None:
        self._index = index
        self._by_owner: dict[Hashable, Counter[tuple[BlockSpace, bytes]]] = {}

    def pin(self, owner: Hashable, space: BlockSpace, hashes: Sequence[bytes]) -> int:
        """Pin these blocks; returns how many of them are in host memory."""
        mine, count = self._by_owner.setdefault(owner, Counter()), 0
        for block_hash in hashes:
            pinned = self._index.pin(space, [block_hash])
            if pinned:
                mine[space, block_hash] += pinned
            count += pinned
        return count

    def unpin(self, owner: Hashable, space: BlockSpace, hashes: Sequence[bytes]) -> int:
        """Take back one pin of the owner's own on each; returns how many had one."""
        mine, count = self._by_owner.get(owner, Counter()), 0
        for block_hash in hashes:
            if not mine[space, block_hash]:
                continue
            count += self._index.unpin(space, [block_hash])
            mine[space, block_hash] -= 1
            if not mine[space, block_hash]:
                del mine[space, block_hash]
        return count

    def end_all(self, owner: Hashable) -> None:
        """The owner is gone."""
        for (space, block_hash), count in self._by_owner.pop(owner, Counter()).items():
            for _ in range(count):
                self._index.unpin(space, [block_hash])
