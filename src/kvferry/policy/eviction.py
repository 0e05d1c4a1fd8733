"""Which cached block leaves when another needs its room: the contract, LRU and LFU, and the choice by name. Pure.

The live pool and the trace replay (`kvferry sim cache`) run the same objects. A policy keeps books about keys; it owns
no memory and no clock: time is the number of uses.
"""

from __future__ import annotations

import abc
import heapq
from collections import OrderedDict
from collections.abc import Container, Hashable
from typing import ClassVar, Generic, NamedTuple, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Place(NamedTuple, Generic[Key]):
    """Where a block stood in the prompt that used it: block `depth` of `num_blocks`, after the block `parent`."""

    depth: int = 0
    num_blocks: int = 1
    parent: Key | None = None


class EvictionPolicy(abc.ABC, Generic[Key]):
    """The cached keys of one cache, in the order in which they should leave.

    A prompt's blocks are used in prefix order, or deepest first where `deepest_first` says so: then the beginning of a
    prompt, which more prompts share, counts as used last. The owner calls `evict` until there is room, then `insert`.
    """

    name: ClassVar[str]
    deepest_first: ClassVar[bool] = False

    def __init__(self, capacity: int) -> None:
        """
        Args:
            capacity: blocks that the cache holds; a scale for what is learned, not enforced here.
        """
        self.capacity = max(1, capacity)

    @abc.abstractmethod
    def __contains__(self, key: object) -> bool: ...

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def insert(self, key: Key, place: Place[Key]) -> None:
        """A block came in that was absent."""

    @abc.abstractmethod
    def touch(self, key: Key, place: Place[Key]) -> None:
        """A cached block was used again."""

    @abc.abstractmethod
    def discard(self, key: Key) -> None:
        """A block left for a reason of its owner's. Absent keys are ignored."""

    @abc.abstractmethod
    def evict(self, held: Container[Key] = ()) -> Key | None:
        """Forget and return the block that should leave next; None if all are `held`, which must stay."""

    def evict_many(self, count: int, held: Container[Key] = ()) -> list[Key]:
        """As so many calls of `evict` would: at most `count` blocks, the first to leave first."""
        victims: list[Key] = []
        while len(victims) < count and (victim := self.evict(held)) is not None:
            victims.append(victim)
        return victims


class LRU(EvictionPolicy[Key]):
    """The block that was not used for longest."""

    name = "lru"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._keys: OrderedDict[Key, None] = OrderedDict()

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def insert(self, key: Key, place: Place[Key]) -> None:
        self._keys[key] = None

    def touch(self, key: Key, place: Place[Key]) -> None:
        self._keys.move_to_end(key)

    def discard(self, key: Key) -> None:
        self._keys.pop(key, None)

    def evict(self, held: Container[Key] = ()) -> Key | None:
        victim = first_free(self._keys, held)
        if victim is not None:
            del self._keys[victim]
        return victim


class LFU(EvictionPolicy[Key]):
    """The block with the fewest uses; among equals, the one that was not used for longest."""

    name = "lfu"
    deepest_first = True
    ageing: ClassVar[bool] = False

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._uses: dict[Key, int] = {}
        self._order = KeyHeap[Key]()
        self._floor = 0

    def __contains__(self, key: object) -> bool:
        return key in self._uses

    def __len__(self) -> int:
        return len(self._uses)

    def insert(self, key: Key, place: Place[Key]) -> None:
        self._uses[key] = 1
        self._order.put(key, self._floor + 1)

    def touch(self, key: Key, place: Place[Key]) -> None:
        self._uses[key] += 1
        self._order.put(key, self._floor + self._uses[key])

    def discard(self, key: Key) -> None:
        if self._uses.pop(key, None) is not None:
            self._order.discard(key)

    def evict(self, held: Container[Key] = ()) -> Key | None:
        found = self._order.pop(held)
        if found is None:
            return None
        key, rank = found
        del self._uses[key]
        if self.ageing:
            self._floor = max(self._floor, rank)
        return key


class LFUDA(LFU[Key]):
    """LFU with dynamic ageing: a use counts from the rank of the last evicted block, so that old fame fades.

    Source: Arlitt et al., Evaluating content management techniques for Web proxy caches, 2000.
    """

    name = "lfu-da"
    ageing = True


class KeyHeap(Generic[Key]):
    """Keys by rank, least first, then by the time of their last `put`. A rank may change at any time."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Key]] = []
        self._current: dict[Key, tuple[int, int]] = {}
        self._time = 0

    def __contains__(self, key: object) -> bool:
        return key in self._current

    def put(self, key: Key, rank: int) -> None:
        self._time += 1
        self._current[key] = rank, self._time
        heapq.heappush(self._heap, (rank, self._time, key))
        # Entries that were replaced stay in the heap until they come up; often replaced keys must not fill memory.
        if len(self._heap) > 4 * len(self._current) + 64:
            self._heap = [(*at, k) for k, at in self._current.items()]
            heapq.heapify(self._heap)

    def discard(self, key: Key) -> None:
        self._current.pop(key, None)

    def pop(self, held: Container[Key] = ()) -> tuple[Key, int] | None:
        """The first key that is not held, with its rank; None if there is none."""
        passed: list[tuple[int, int, Key]] = []
        found: tuple[Key, int] | None = None
        while self._heap and found is None:
            rank, time, key = entry = heapq.heappop(self._heap)
            if self._current.get(key) != (rank, time):
                continue
            if key in held:
                passed.append(entry)
            else:
                del self._current[key]
                found = key, rank
        for entry in passed:
            heapq.heappush(self._heap, entry)
        return found


def first_free(keys: OrderedDict[Key, None] | dict[Key, int], held: Container[Key]) -> Key | None:
    """The first key in order that is not held."""
    return next((key for key in keys if key not in held), None)
