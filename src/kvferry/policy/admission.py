"""Whether a request starts now, waits, or is refused with an honest Retry-After. Pure."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

MAX_RETRY_AFTER_S = 60


class Admission(NamedTuple):
    """`retry_after_s` is set where the request is refused: whole seconds, at least 1."""

    verdict: Literal["start", "wait", "refuse"]
    retry_after_s: int = 0


def admit(*, in_flight: int, max_in_flight: int, queued: int, max_queue: int, mean_request_s: float) -> Admission:
    """First come, first served, up to `max_in_flight` at once and `max_queue` waiting.

    Args:
        mean_request_s: how long requests took lately; 0 where that is not known.
    """
    if in_flight < max_in_flight and not queued:
        return Admission("start")
    if queued < max_queue:
        return Admission("wait")
    return Admission("refuse", retry_after_s(queued, max_in_flight, mean_request_s))


def retry_after_s(queued: int, max_in_flight: int, mean_request_s: float) -> int:
    """When a queue of this length should have drained: whole seconds, 1 to 60."""
    estimate_s = (queued + 1) * mean_request_s / max(max_in_flight, 1)
    return max(1, min(MAX_RETRY_AFTER_S, math.ceil(estimate_s)))
