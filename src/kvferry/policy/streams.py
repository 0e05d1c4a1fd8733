"""How many streams a large transfer over a network gets, learned from what they gave. Pure."""

from __future__ import annotations


class StreamCount:
    """How many streams a large batch gets: each count is tried, then the best is kept and now and then checked."""

    def __init__(self, most: int) -> None:
        self._counts = [count for count in (1, 2, 4, 8) if count <= most] or [1]
        self._rates: dict[int, float] = {}
        self._batches = 0

    def choose(self) -> int:
        """The number of streams for the next large batch."""
        self._batches += 1
        for count in self._counts:
            if count not in self._rates:
                return count
        if self._batches % 32 == 0:
            return self._counts[self._batches // 32 % len(self._counts)]
        return max(self._rates, key=lambda count: self._rates[count])

    def learn(self, count: int, bytes_per_s: float) -> None:
        """What `count` streams gave."""
        known = self._rates.get(count, bytes_per_s)
        self._rates[count] = 0.5 * known + 0.5 * bytes_per_s
