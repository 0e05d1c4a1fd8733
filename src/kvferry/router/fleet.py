"""The instances as the router sees them: membership, what it gave each of them to do, and whom a request gets."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from kvferry.observe import get_log
from kvferry.policy.routing import Candidate, Placement, choose
from kvferry.protocol.membership import EdgeKey, InstanceReport, Lease, Member, Membership, Verdict
from kvferry.router.upstreams import Origin
from kvferry.types import InstanceRef, Outcome, Stage, TerminalState

_log = get_log("kvferry.router")

# These say something about the request or about one side, nothing about the way between the two.
_NO_FAULT_OF_THE_EDGE = frozenset(
    {
        "handoff_aborted",
        "handoff_unused",
        "pool_exhausted",
        "prompt_mismatch",
        "source_cancelled",
        "source_refused",
        "source_revoked",
    }
)


class Target(NamedTuple):
    """One instance that a leg goes to."""

    ref: InstanceRef
    origin: Origin


class Fleet:
    """Membership with loads. One event loop."""

    def __init__(self, *, ttl_s: float, heartbeat_s: float) -> None:
        self.membership = Membership(ttl_s)
        self._heartbeat_s = heartbeat_s
        self._in_flight: Counter[str] = Counter()
        self._foreign: dict[str, int] = {}
        self._left: dict[tuple[str, int], None] = {}
        self._other_names: dict[str, frozenset[str]] = {}
        self._turn = 0

    # What instances say

    def report(self, report: InstanceReport, now_s: float, *, polled: bool = False) -> tuple[Verdict, Lease]:
        """Take a registration or heartbeat; log what it changed.

        Raises: ConfigError if its url is none.
        """
        Origin.of(report.url)
        verdict = self.membership.report(report, now_s, polled=polled)
        if verdict in (Verdict.SUPERSEDED, Verdict.FULL):
            return verdict, Lease(self.membership.ttl_s, self._heartbeat_s)
        here = self._in_flight[report.instance_id]
        self._foreign[report.instance_id] = max(0, report.running + report.waiting - here)
        warnings = tuple(self.membership.mismatches(report))
        if verdict is not Verdict.REFRESHED:
            _log.info(f"instance {verdict}", instance=report.instance_id, role=report.role, url=report.url)
            for warning in warnings:
                _log.warning("instances cannot be paired", instance=report.instance_id, why=warning)
        return verdict, Lease(self.membership.ttl_s, self._heartbeat_s, warnings)

    def name_models(self, instance_id: str, names: frozenset[str]) -> None:
        """Further model names (adapters) that an instance serves."""
        self._other_names[instance_id] = names

    def leave(self, instance_id: str, incarnation: int) -> bool:
        """The instance goes on purpose: it gets no new request, and ends those that it has."""
        member = self.membership.leave(instance_id, incarnation)
        if member is None:
            return False
        if len(self._left) > 1024:
            self._left.clear()
        self._left[instance_id, incarnation] = None
        _log.info("instance left", instance=instance_id, role=member.report.role)
        return True

    def expire(self, now_s: float) -> list[Member]:
        """Take out who is silent for too long."""
        gone = self.membership.expire(now_s)
        for member in gone:
            r = member.report
            _log.warning("instance gone", instance=r.instance_id, role=r.role, silent_s=now_s - member.seen_s)
        return gone

    def is_lost(self, ref: InstanceRef) -> bool:
        """Whether this life of the instance ended without a word: it is silent, or another one took its place."""
        key = (ref.instance_id, ref.incarnation)
        if self.membership.is_live(*key) or key in self._left:
            return False
        # A polled instance that has registered since lives on under its own name.
        return ref.incarnation != 0 or len(self.membership) == 0

    # Requests

    def knows_model(self, model: str) -> bool:
        return any(self._serves(m, model) for m in self.membership)

    def models(self) -> list[str]:
        """Every model name that some instance serves, sorted."""
        names = {m.report.model for m in self.membership}
        for member in self.membership:
            names |= self._other_names.get(member.report.instance_id, frozenset())
        return sorted(names - {""})

    def is_ready(self) -> bool:
        """Whether some instance can decode."""
        return any(m.report.role != "prefill" for m in self.membership)

    def has_decode_beside(self, instance_id: str) -> bool:
        """Whether another instance could take over what this one decodes."""
        return any(m.report.role != "prefill" and m.report.instance_id != instance_id for m in self.membership)

    def place(
        self, model: str | None, now_s: float, *, excluded: frozenset[str] = frozenset(), direct_reason: str = ""
    ) -> Placement | None:
        """The policy's choice among the live instances that serve the model."""
        candidates = [
            Candidate(r.instance_id, r.incarnation, r.role, self.load(r.instance_id), r.addresses, r.fingerprint)
            for m in self.membership
            for r in (m.report,)
            if (model is None or self._serves(m, model)) and not m.is_stuck(now_s)
        ]
        self._turn += 1

        def edge_ok(prefill: Candidate, decode: Candidate) -> bool:
            key = (prefill.instance_id, prefill.incarnation, decode.instance_id, decode.incarnation)
            return self.membership.edge_ok(key, now_s)

        return choose(
            candidates, edge_ok=edge_ok, excluded=excluded, direct_reason=direct_reason, turn=self._turn
        )  # fmt: skip

    def target(self, candidate: Candidate) -> Target:
        """Where a leg to this candidate goes."""
        member = self.membership.get(candidate.instance_id)
        assert member is not None
        ref = InstanceRef(candidate.instance_id, candidate.incarnation, candidate.addresses)
        return Target(ref, Origin.of(member.report.url))

    def load(self, instance_id: str) -> int:
        """Requests that this router has there, and those that others had at the last report."""
        return self._in_flight[instance_id] + self._foreign.get(instance_id, 0)

    def took(self, instance_id: str) -> None:
        self._in_flight[instance_id] += 1

    def released(self, instance_id: str) -> None:
        self._in_flight[instance_id] -= 1
        if self._in_flight[instance_id] <= 0:
            del self._in_flight[instance_id]

    def note_outcome(self, prefill: InstanceRef, decode: InstanceRef, outcome: Outcome, now_s: float) -> None:
        """Keep the edge's health by how its handoffs end."""
        key: EdgeKey = (prefill.instance_id, prefill.incarnation, decode.instance_id, decode.incarnation)
        if outcome.state is TerminalState.DELIVERED:
            self.membership.edge_succeeded(key)
        elif _blames_the_edge(outcome):
            edge = self.membership.edge_failed(key, outcome.cause or "unknown", now_s)
            if edge.blocked_until_s > now_s:
                _log.warning(
                    "edge rests",
                    prefill=prefill.instance_id,
                    decode=decode.instance_id,
                    rest_s=edge.blocked_until_s - now_s,
                    failures=edge.failures,
                    cause=edge.last_cause,
                )

    def _serves(self, member: Member, model: str) -> bool:
        # An instance that does not say what it serves is asked for anything; it can say no itself.
        report = member.report
        return report.model in (model, "") or model in self._other_names.get(report.instance_id, ())


def _blames_the_edge(outcome: Outcome) -> bool:
    if outcome.state is TerminalState.ABORTED or outcome.cause in _NO_FAULT_OF_THE_EDGE:
        return False
    # It was the target that had no room in time.
    waited_for_room = outcome.stage is Stage.RESERVING and outcome.cause == "deadline_exceeded"
    return outcome.stage is not Stage.QUEUE and not waited_for_room
