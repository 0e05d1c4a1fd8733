"""Real and virtual clocks. Everything that waits takes one of these, so that a test can make time jump."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Monotonic seconds since an arbitrary origin; never wall time, never compared across processes."""

    def now_s(self) -> float: ...


class RealClock:
    """The process's monotonic clock."""

    def now_s(self) -> float:
        return time.monotonic()


class VirtualClock:
    """A clock that moves only when told to."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now_s(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Move forward by `seconds` (>= 0)."""
        if seconds < 0:
            raise ValueError(f"a monotonic clock cannot move by {seconds} s; give a number >= 0")
        self._now_s += seconds
