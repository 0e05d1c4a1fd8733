"""What all exchanges of a router share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvferry.router.fleet import Fleet
from kvferry.router.metrics import RouterMetrics
from kvferry.router.upstreams import UpstreamPool
from kvferry.types import HandoffId

if TYPE_CHECKING:
    from kvferry.router.exchange import Exchange


class Surroundings:
    """What all exchanges of a router share."""

    def __init__(
        self,
        fleet: Fleet,
        pool: UpstreamPool,
        metrics: RouterMetrics,
        *,
        handoff_deadline_s: float,
        outcome_wait_s: float,
        attempts: int,
        stream_first_token: bool = False,
    ) -> None:
        self.stream_first_token = stream_first_token
        self.fleet, self.pool, self.metrics = fleet, pool, metrics
        self.handoff_deadline_s = handoff_deadline_s
        self.outcome_wait_s = outcome_wait_s
        self.attempts = attempts
        self.handoffs: dict[HandoffId, Exchange] = {}
        self.retry_after_s: Callable[[], int] = lambda: 1
