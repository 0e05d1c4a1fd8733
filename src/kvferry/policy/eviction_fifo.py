"""S3-FIFO: a small queue that new blocks must survive, a main queue, and the memory of what left the small one. Pure.

Source: Yang et al., FIFO queues are all you need for cache eviction, SOSP 2023.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container

from kvferry.policy.eviction import EvictionPolicy, Key, Place

SMALL_SHARE = 0.1
MAX_USES = 3


class S3FIFO(EvictionPolicy[Key]):
    """Blocks used once leave soon; blocks used again while they are new, or remembered, go to the main queue."""

    name = "s3-fifo"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._small: OrderedDict[Key, int] = OrderedDict()
        self._main: OrderedDict[Key, int] = OrderedDict()
        self._left: OrderedDict[Key, None] = OrderedDict()

    def __contains__(self, key: object) -> bool:
        return key in self._small or key in self._main

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def insert(self, key: Key, place: Place[Key]) -> None:
        if key in self._left:
            del self._left[key]
            self._main[key] = 0
        else:
            self._small[key] = 0

    def touch(self, key: Key, place: Place[Key]) -> None:
        queue = self._small if key in self._small else self._main
        queue[key] = min(MAX_USES, queue[key] + 1)

    def discard(self, key: Key) -> None:
        self._small.pop(key, None)
        self._main.pop(key, None)

    def evict(self, held: Container[Key] = ()) -> Key | None:
        if len(self._small) >= SMALL_SHARE * self.capacity or not self._main:
            victim = self._evict_small(held)
            if victim is not None:
                return victim
        victim = self._evict_main(held)
        return self._evict_small(held) if victim is None else victim

    def _evict_small(self, held: Container[Key]) -> Key | None:
        for _ in range(len(self._small)):
            key, uses = self._small.popitem(last=False)
            if uses:
                self._main[key] = 0
            elif key in held:
                self._small[key] = uses
            else:
                self._left[key] = None
                if len(self._left) > self.capacity:
                    self._left.popitem(last=False)
                return key
        return None

    def _evict_main(self, held: Container[Key]) -> Key | None:
        for _ in range((MAX_USES + 1) * len(self._main)):
            key, uses = self._main.popitem(last=False)
            if not uses and key not in held:
                return key
            self._main[key] = max(0, uses - 1)
        return None
