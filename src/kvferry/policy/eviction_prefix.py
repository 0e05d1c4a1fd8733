"""Prefix-aware LRU: a block is worth more while its successors are cached, which are useless without it. Pure."""

from __future__ import annotations

from collections.abc import Container

from kvferry.policy.eviction import EvictionPolicy, Key, KeyHeap, Place


class PrefixLRU(EvictionPolicy[Key]):
    """Only blocks without a cached successor leave, the one that was not used for longest first."""

    name = "prefix"
    deepest_first = True

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._used_at: dict[Key, int] = {}
        self._parents: dict[Key, Key | None] = {}
        self._successors: dict[Key, set[Key]] = {}
        self._leaves = KeyHeap[Key]()
        self._time = 0

    def __contains__(self, key: object) -> bool:
        return key in self._used_at

    def __len__(self) -> int:
        return len(self._used_at)

    def insert(self, key: Key, place: Place[Key]) -> None:
        self._parents[key] = place.parent
        if place.parent is not None:
            # The parent may come after its successor (deepest first), so that its set may exist before it does.
            self._successors.setdefault(place.parent, set()).add(key)
            self._leaves.discard(place.parent)
        self.touch(key, place)

    def touch(self, key: Key, place: Place[Key]) -> None:
        self._time += 1
        self._used_at[key] = self._time
        if key not in self._successors:
            self._leaves.put(key, self._time)

    def discard(self, key: Key) -> None:
        if key in self._used_at:
            self._leaves.discard(key)
            self._forget(key)

    def evict(self, held: Container[Key] = ()) -> Key | None:
        found = self._leaves.pop(held)
        if found is not None:
            self._forget(found[0])
            return found[0]
        # Every leaf is held: an inner block is the next best, and its successors become useless.
        victim = min((k for k in self._used_at if k not in held), key=self._used_at.__getitem__, default=None)
        if victim is not None:
            self.discard(victim)
        return victim

    def _forget(self, key: Key) -> None:
        del self._used_at[key]
        parent = self._parents.pop(key)
        if parent is None or parent not in self._successors:
            return
        siblings = self._successors[parent]
        siblings.discard(key)
        if not siblings:
            del self._successors[parent]
            if parent in self._used_at:
                self._leaves.put(parent, self._used_at[parent])
