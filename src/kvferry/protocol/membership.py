"""Which instances there are, which lives of them, and which pairs can reach each other. Pure: time is an argument.

An instance registers and stays by repeating its report. Health is kept per (prefill, decode) edge beside that, so
that a partition between two healthy instances is routed around.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Iterator

import msgspec

from kvferry.errors import CompatibilityError
from kvferry.layout import Fingerprint
from kvferry.types import HandoffId, Role, Side

MAX_INSTANCES = 4096
MAX_SUPERSEDED = 1024
MAX_EDGES = 65536
EDGE_FAILURES = 2
EDGE_BACKOFF_S = 1.0
EDGE_BACKOFF_MAX_S = 30.0
STUCK_AFTER_S = 30.0


class HandoffView(msgspec.Struct, frozen=True):
    """One open handoff as one side sees it. `stage` is a word of the handoff machine of that side."""

    handoff: HandoffId
    side: Side
    stage: str
    age_s: float
    remaining_s: float
    peer: str = ""
    detail: str = ""


class InstanceReport(msgspec.Struct, frozen=True, kw_only=True):
    """What an instance tells the router: at the start, then at every heartbeat.

    `url` is the base of its HTTP server (`http://host:port`), `addresses` are its handoff listeners as really bound,
    one for each rank. `step` counts turns of its serving loop: it must move while requests run.
    """

    instance_id: str
    incarnation: int
    role: Role
    url: str
    model: str
    addresses: tuple[str, ...] = ()
    fingerprint: Fingerprint | None = None
    engine: str = ""
    version: str = ""
    num_blocks: int = 0
    free_blocks: int = 0
    running: int = 0
    waiting: int = 0
    step: int = 0
    handoffs: tuple[HandoffView, ...] = ()


class Lease(msgspec.Struct, frozen=True):
    """The router's answer to a report: the instance is gone if it stays silent for `ttl_s`."""

    ttl_s: float
    heartbeat_s: float
    warnings: tuple[str, ...] = ()


class Verdict(enum.StrEnum):
    """What a report did to the table."""

    JOINED = "joined"
    RESTARTED = "restarted"
    REFRESHED = "refreshed"
    SUPERSEDED = "superseded"
    FULL = "full"


class Member(msgspec.Struct):
    """One live instance. `polled` ones do not register; their health is asked for."""

    report: InstanceReport
    joined_s: float
    seen_s: float
    step_changed_s: float
    polled: bool = False

    def is_stuck(self, now_s: float) -> bool:
        """Its serving loop stood still with work to do, for longer than any step should take."""
        busy = self.report.running + self.report.waiting > 0
        return busy and not self.polled and now_s - self.step_changed_s > STUCK_AFTER_S


class Edge(msgspec.Struct):
    """Health of the way from one prefill to one decode instance (these incarnations of them)."""

    failures: int = 0
    blocked_until_s: float = 0.0
    last_cause: str = ""


EdgeKey = tuple[str, int, str, int]


class Membership:
    """The table. Not thread-safe; one owner calls it.

    A new incarnation of an instance replaces the old one at once: the old one's later reports are refused, so that two
    processes that were given the same name do not take turns.
    """

    def __init__(self, ttl_s: float, *, max_instances: int = MAX_INSTANCES) -> None:
        self.ttl_s = ttl_s
        self._max_instances = max_instances
        self._members: dict[str, Member] = {}
        self._superseded: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._edges: OrderedDict[EdgeKey, Edge] = OrderedDict()

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members.values())

    def __len__(self) -> int:
        return len(self._members)

    def get(self, instance_id: str) -> Member | None:
        return self._members.get(instance_id)

    def is_live(self, instance_id: str, incarnation: int) -> bool:
        """Whether exactly this life of the instance is in the table."""
        member = self._members.get(instance_id)
        return member is not None and member.report.incarnation == incarnation

    def report(self, report: InstanceReport, now_s: float, *, polled: bool = False) -> Verdict:
        """Take a registration or heartbeat. Idempotent.

        A registration replaces a polled member with the same url: the instance's own word is worth more.
        """
        if (report.instance_id, report.incarnation) in self._superseded:
            return Verdict.SUPERSEDED
        known = self._members.get(report.instance_id)
        if known is not None and known.report.incarnation == report.incarnation:
            if known.report.step != report.step or report.running + report.waiting == 0:
                known.step_changed_s = now_s
            known.report, known.seen_s = report, now_s
            return Verdict.REFRESHED
        if known is None and len(self._members) >= self._max_instances:
            return Verdict.FULL
        if known is not None:
            self._supersede(known.report)
        if not polled:
            for other in [m for m in self if m.polled and m.report.url == report.url]:
                del self._members[other.report.instance_id]
        self._members[report.instance_id] = Member(report, now_s, now_s, now_s, polled)
        return Verdict.JOINED if known is None else Verdict.RESTARTED

    def leave(self, instance_id: str, incarnation: int) -> Member | None:
        """Take this life of the instance out of the table; None where it is not in it."""
        if not self.is_live(instance_id, incarnation):
            return None
        return self._members.pop(instance_id)

    def expire(self, now_s: float) -> list[Member]:
        """Take out and return everything that was silent for longer than the ttl. They may come back."""
        gone = [m for m in self if now_s - m.seen_s > self.ttl_s]
        for member in gone:
            del self._members[member.report.instance_id]
        return gone

    def mismatches(self, report: InstanceReport) -> list[str]:
        """Why this instance cannot be paired with others of its model; each names both values."""
        found = []
        for other in self:
            theirs = other.report.fingerprint
            if other.report.instance_id == report.instance_id or other.report.model != report.model:
                continue
            if report.fingerprint is None or theirs is None:
                continue
            try:
                report.fingerprint.require_equal(theirs, peer=other.report.instance_id)
            except CompatibilityError as error:
                found.append(str(error))
        return found

    # Edges

    def edge_ok(self, key: EdgeKey, now_s: float) -> bool:
        """Whether handoffs may be tried over this edge now."""
        edge = self._edges.get(key)
        return edge is None or now_s >= edge.blocked_until_s

    def edge_succeeded(self, key: EdgeKey) -> None:
        self._edges.pop(key, None)

    def edge_failed(self, key: EdgeKey, cause: str, now_s: float) -> Edge:
        """Count a failure; after `EDGE_FAILURES` in a row the edge rests for a while that doubles each time."""
        edge = self._edges.setdefault(key, Edge())
        if len(self._edges) > MAX_EDGES:
            self._edges.popitem(last=False)
        edge.failures += 1
        edge.last_cause = cause
        if edge.failures >= EDGE_FAILURES:
            backoff_s = EDGE_BACKOFF_S * 2.0 ** min(edge.failures - EDGE_FAILURES, 16)
            edge.blocked_until_s = now_s + min(backoff_s, EDGE_BACKOFF_MAX_S)
        return edge

    def edges(self) -> dict[EdgeKey, Edge]:
        """The edges with failures that no success followed."""
        return dict(self._edges)

    def _supersede(self, report: InstanceReport) -> None:
        self._superseded[report.instance_id, report.incarnation] = None
        if len(self._superseded) > MAX_SUPERSEDED:
            self._superseded.popitem(last=False)
