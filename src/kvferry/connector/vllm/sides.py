"""What the worker half keeps of one request on either side of its handoffs. Pure: no vLLM, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvferry.types import HandoffId, Outcome, TerminalState


@dataclass
class SourceSide:
    """One offered request: the handoffs of each KV cache group. `generation` counts revokes: a publication of an older
    one is dropped. `last` is what was published last, when, and of how many layers."""

    groups: list[list[HandoffId]]
    open: set[HandoffId]
    generation: int = 0
    last: tuple[float, int, int] | None = None

    @property
    def handoffs(self) -> list[HandoffId]:
        return [handoff for group in self.groups for handoff in group]


@dataclass
class TargetSide:
    """One request that is being loaded, or (without block ids) told to be released."""

    handoffs: list[HandoffId]
    block_ids: list[int]
    outcomes: dict[HandoffId, Outcome] = field(default_factory=dict)

    def is_over(self) -> bool:
        return len(self.outcomes) == len(self.handoffs)

    def is_delivered(self) -> bool:
        return self.is_over() and all(o.state is TerminalState.DELIVERED for o in self.outcomes.values())


def combine(outcomes: list[Outcome]) -> Outcome:
    """One outcome for all of a rank's source ranks: the first bad one, otherwise delivered, with the bytes of all."""
    worst = next((o for o in outcomes if o.state is not TerminalState.DELIVERED), outcomes[0])
    return Outcome(
        handoff=worst.handoff,
        state=worst.state,
        stage=worst.stage,
        cause=worst.cause,
        detail=worst.detail,
        bytes_moved=sum(o.bytes_moved for o in outcomes),
        duration_s=max(o.duration_s for o in outcomes),
        transport=worst.transport,
        attempt=worst.attempt,
    )
