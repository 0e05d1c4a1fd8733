"""How many layers this rank publishes at a time, by what it has seen of its own speed and of its targets' links. Pure.

The choice is `policy/publication.py`'s; here is what it is made from.
"""

from __future__ import annotations

import threading
from collections import deque

from kvferry.policy.publication import Carried, layers_a_publish, link_of

SEEN_LINKS = 32
SMOOTHING = 0.3


class Pace:
    """Thread-safe.

    Args:
        block_bytes: of one layer of one block, this rank's.
        fixed: so many layers at a time, whatever was seen (0: all); None to choose.
    """

    def __init__(self, num_layers: int, block_bytes: int, *, fixed: int | None = None) -> None:
        self._num_layers, self._block_bytes = num_layers, block_bytes
        self._fixed = fixed
        self._lock = threading.Lock()
        self._carried: deque[Carried] = deque(maxlen=SEEN_LINKS)
        self._tokens_a_s: float | None = None

    def layers_at_a_time(self, num_tokens: int, num_blocks: int, *, is_last: bool) -> int:
        """For a step that computes `num_tokens` and completes `num_blocks`; `is_last`: of some prompt it is the end."""
        if self._fixed is not None:
            return self._fixed or self._num_layers
        with self._lock:
            link, tokens_a_s = link_of(self._carried), self._tokens_a_s
        return layers_a_publish(
            num_layers=self._num_layers,
            layer_bytes=num_blocks * self._block_bytes,
            num_tokens=num_tokens,
            tokens_a_s=tokens_a_s,
            link=link,
            is_last=is_last,
        )

    def computed(self, num_tokens: int, seconds: float) -> None:
        """A step that published took so long, from its launch to its end on the device."""
        if seconds <= 0 or not num_tokens:
            return
        seen = num_tokens / seconds
        with self._lock:
            known = self._tokens_a_s if self._tokens_a_s is not None else seen
            self._tokens_a_s = known + SMOOTHING * (seen - known)

    def carried(self, num_blocks: int, num_layers: int, seconds: float) -> None:
        """A target acknowledged so much, `seconds` after it was published."""
        with self._lock:
            self._carried.append(Carried(num_blocks * num_layers * self._block_bytes, seconds))
