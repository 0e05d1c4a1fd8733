"""Which ends of handoffs speak against the way between two instances."""

from __future__ import annotations

import pytest

from kvferry.router.fleet import Fleet
from kvferry.types import HandoffId, InstanceRef, Outcome, Stage, TerminalState

PREFILL, DECODE = InstanceRef("p", 1), InstanceRef("d", 2)


def failures_after(stage: Stage, cause: str) -> int:
    fleet = Fleet(ttl_s=3.0, heartbeat_s=1.0)
    outcome = Outcome(HandoffId("ab" * 16), TerminalState.RECOMPUTED, stage, cause)
    fleet.note_outcome(PREFILL, DECODE, outcome, 0.0)
    return sum(edge.failures for edge in fleet.membership.edges().values())


@pytest.mark.parametrize(
    ("stage", "cause"),
    [
        (Stage.WAITING, "source_silent"),
        (Stage.WAITING, "peer_gone"),
        (Stage.RESERVING, "peer_gone"),
        (Stage.PULLING, "transfer_timeout"),
        (Stage.WAITING, "deadline_exceeded"),
        (Stage.VERIFYING, "integrity_error"),
    ],
)
def test_what_happened_between_two_instances_counts_against_their_edge(stage: Stage, cause: str) -> None:
    assert failures_after(stage, cause) == 1


@pytest.mark.parametrize(
    ("stage", "cause"),
    [
        (Stage.WAITING, "source_cancelled"),
        (Stage.PULLING, "source_revoked"),
        (Stage.WAITING, "prompt_mismatch"),
        (Stage.RESERVING, "handoff_unused"),
        (Stage.RESERVING, "deadline_exceeded"),
        (Stage.QUEUE, "transfer_timeout"),
    ],
)
def test_what_one_side_did_by_itself_does_not(stage: Stage, cause: str) -> None:
    assert failures_after(stage, cause) == 0
