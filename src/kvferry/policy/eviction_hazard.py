"""Eviction by learned reuse: the block leaves whose room would earn the fewest hits. Pure.

Blocks fall into classes by how often they were used again and by where they stand in their prompt. For each class the
policy counts, over blocks cached and blocks remembered after they left, at which age they were used again. That gives
the hits that a block of that class and age earns for each unit of time that it goes on occupying its room, taken over
the best time to keep it. Ages count uses, on a logarithmic scale, so that hours and seconds fit the same table; old
counts fade.

Source: the idea is that of EVA (Beckmann and Sanchez, Maximizing cache performance under uncertainty, HPCA 2017), with
classes for prompts and with a memory of evicted blocks, without which long gaps between turns could not be learned.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container

import numpy as np

from kvferry.policy.eviction import EvictionPolicy, Key, Place

NUM_AGES = 28
NUM_PLACES = 11
MAX_REUSES = 2
NUM_CLASSES = NUM_PLACES * (MAX_REUSES + 1)
MEMORY = 3
"""Blocks remembered after they left, in multiples of the capacity."""
FADING = 0.95
EMPTY = float("inf")
_LENGTH_CLASS = [min(4, max(0, bits - 2)) for bits in range(65)]
"""By the bit length of a prompt's number of blocks."""

_Use = tuple[int, int, int]
"""A block's class, the time of its last use, and how often it was used again. Plain, as millions are made."""


class Hazard(EvictionPolicy[Key]):
    """Evicts the block with the lowest learned rate of hits."""

    name = "hazard"
    deepest_first = True

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._cached: dict[Key, _Use] = {}
        self._left: OrderedDict[Key, _Use] = OrderedDict()
        self._queues: list[dict[Key, int]] = [{} for _ in range(NUM_CLASSES)]
        # The rate of each class's oldest block as last looked at; looked at again before it decides.
        self._rates = [EMPTY] * NUM_CLASSES
        self._unit = max(1, self.capacity // 64)
        self._hits = [[0.0] * NUM_AGES for _ in range(NUM_CLASSES)]
        self._ended = [[0.0] * NUM_AGES for _ in range(NUM_CLASSES)]
        # Until something is learned it is LRU: older blocks earn less, whatever their class.
        self._rate_at = [[1.0 / (age + 1) for age in range(NUM_AGES)] for _ in range(NUM_CLASSES)]
        self._widths = np.diff(np.sqrt(2.0) ** np.arange(NUM_AGES + 1))
        self._time = 0
        self._learn_at = self.capacity // 4

    def __contains__(self, key: object) -> bool:
        return key in self._cached

    def __len__(self) -> int:
        return len(self._cached)

    def insert(self, key: Key, place: Place[Key]) -> None:
        self._time += 1
        before = self._left.pop(key, None)
        self._use(key, place, before)

    def touch(self, key: Key, place: Place[Key]) -> None:
        self._time += 1
        before = self._cached[key]
        del self._queues[before[0]][key]
        self._use(key, place, before)

    def discard(self, key: Key) -> None:
        use = self._cached.pop(key, None)
        if use is not None:
            del self._queues[use[0]][key]

    def evict(self, held: Container[Key] = ()) -> Key | None:
        return next(iter(self.evict_many(1, held)), None)

    def evict_many(self, count: int, held: Container[Key] = ()) -> list[Key]:
        rates, blocked, victims = self._rates, list[int](), list[Key]()
        while len(victims) < count:
            rate = min(rates)
            if rate == EMPTY:
                break
            group = rates.index(rate)
            queue, rate_at, leaving = self._queues[group], self._rate_at[group], list[Key]()
            for key, used_at in queue.items():
                if key in held:
                    continue
                now = rate_at[self._age(used_at)]
                if now > rate:
                    # Another group's oldest block may earn less.
                    rates[group] = now
                    break
                # This group stays the one that earns least.
                rates[group] = rate = now
                leaving.append(key)
                if len(victims) + len(leaving) == count:
                    break
            else:
                rates[group] = EMPTY
                if len(queue) > len(leaving):
                    blocked.append(group)
            for key in leaving:
                self._leave(key)
            victims += leaving
        for group in blocked:
            rates[group] = 0.0
        return victims

    def _use(self, key: Key, place: Place[Key], before: _Use | None) -> None:
        now, reuses = self._time, 0
        if before is not None:
            was, used_at, reuses = before
            age = self._age(used_at)
            self._hits[was][age] += 1
            self._ended[was][age] += 1
            reuses += 1
        group = _place_class(place) + NUM_PLACES * (reuses if reuses < MAX_REUSES else MAX_REUSES)
        self._cached[key] = group, now, reuses
        queue = self._queues[group]
        if not queue:
            self._rates[group] = 0.0
        queue[key] = now
        if now >= self._learn_at:
            self._learn()

    def _leave(self, key: Key) -> None:
        use = self._left[key] = self._cached.pop(key)
        del self._queues[use[0]][key]
        if len(self._left) > MEMORY * self.capacity:
            _, (group, used_at, _) = self._left.popitem(last=False)
            self._ended[group][self._age(used_at)] += 1

    def _age(self, used_at: int) -> int:
        """The age's step: two to each doubling."""
        units = (self._time - used_at) // self._unit + 1
        age = (units * units).bit_length() - 1
        return age if age < NUM_AGES else NUM_AGES - 1

    def _learn(self) -> None:
        """Rates from the counts: the most hits for each unit of time, over all times to go on keeping a block."""
        self._learn_at = self._time + max(16, self.capacity // 4)
        hits, ended = np.array(self._hits), np.array(self._ended)
        alive = np.cumsum(ended[:, ::-1], axis=1)[:, ::-1] + 1.0
        room = np.cumsum(alive * self._widths, axis=1)
        earned = np.cumsum(hits, axis=1)
        rates = np.empty_like(hits)
        for age in range(NUM_AGES):
            room_before = room[:, age - 1 : age] if age else 0.0
            earned_before = earned[:, age - 1 : age] if age else 0.0
            rates[:, age] = ((earned[:, age:] - earned_before) / (room[:, age:] - room_before)).max(axis=1)
        self._rate_at = rates.tolist()
        self._hits = (hits * FADING).tolist()
        self._ended = (ended * FADING).tolist()
        self._rates = [0.0 if queue else EMPTY for queue in self._queues]


def _place_class(place: Place[Key]) -> int:
    """0 to 10: the first block of a prompt; one between, by the length of the prompt; its last, likewise."""
    if place.depth == 0:
        return 0
    length = _LENGTH_CLASS[place.num_blocks.bit_length()]
    return 1 + length if place.depth < place.num_blocks - 1 else 6 + length
