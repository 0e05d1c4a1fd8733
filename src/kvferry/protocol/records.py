"""What each side keeps of one handoff."""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field

from kvferry.protocol.lease import Lease
from kvferry.protocol.messages import NO_WORD, Manifest, Run
from kvferry.types import HandoffId, HandoffTicket, Incarnation, Outcome, Stage, TerminalState, Word

NEVER_S = float("inf")


class SourceState(enum.StrEnum):
    """Where a handoff is at the source. `released` is closed."""

    PARKED = "parked"
    OPEN = "open"
    PUBLISHING = "publishing"
    SEALED = "sealed"
    RELEASED = "released"


class TargetState(enum.StrEnum):
    """Where a handoff is at the target. The last four are closed."""

    RESERVING = "reserving"
    WAITING = "waiting"
    PULLING = "pulling"
    DRAINING = "draining"
    DELIVERED = "delivered"
    RECOMPUTING = "recomputing"
    ABORTED = "aborted"
    FAILED = "failed"


CLOSED_AS = {
    TerminalState.DELIVERED: TargetState.DELIVERED,
    TerminalState.RECOMPUTED: TargetState.RECOMPUTING,
    TerminalState.ABORTED: TargetState.ABORTED,
    TerminalState.FAILED: TargetState.FAILED,
}
CLOSED_STATES = frozenset(CLOSED_AS.values())
_STAGES = {TargetState.RESERVING: Stage.RESERVING, TargetState.WAITING: Stage.WAITING}

Story = deque[tuple[float, str]]


def new_story() -> Story:
    """What happened to one handoff, (when, what), the latest forty."""
    return deque(maxlen=40)


@dataclass(slots=True)
class SourceRecord:
    """One handoff at the source. `until_s` ends a parked entry or a tombstone; an open one ends with its lease."""

    handoff: HandoffId
    target: Incarnation  # 0: not known (this side cancelled a handoff that it had not met)
    opened_s: float
    deadline_s: float
    until_s: float
    state: SourceState = SourceState.PARKED
    attempt: int = 0
    lease: Lease | None = None
    prompt_digest: bytes = b""
    num_blocks: int = 0
    subscribed: bool = False
    reserved: bool = False
    runs: list[Run] = field(default_factory=list)
    runs_known: int = 0
    runs_pulled: int = 0
    seal: Manifest | None = None
    heard_tick_s: float | None = None
    heard_sequence: int = 0
    closed_as: str = ""
    closed_why: str = ""
    counted_peer: Incarnation | None = None  # whose bound in `max_per_peer` this entry uses up
    story: Story = field(default_factory=new_story)


@dataclass(slots=True)
class TargetRecord:
    """One handoff at the target."""

    ticket: HandoffTicket
    prompt_digest: bytes
    opened_s: float
    deadline_s: float
    lapse_s: float  # without another answer, the source counts as silent from here on
    until_s: float  # the tombstone's end
    state: TargetState = TargetState.RESERVING
    selected: bool = False
    first_block: int = 0
    num_blocks: int = 0
    connected: bool = False
    beat_s: float = NEVER_S  # the next heartbeat, or the next ack once delivered
    heard_tick_s: float | None = None
    heard_sequence: int = 0
    word: Word = NO_WORD
    slot: int = 0
    dead_word: Word = NO_WORD  # a read found that it no longer stands
    dead_since_s: float = 0.0
    runs: list[Run] = field(default_factory=list)
    seal: Manifest | None = None
    num_started: int = 0
    num_done: int = 0
    covered: list[int] = field(default_factory=list)  # for each layer, a bit for each prompt block that has arrived
    reads: dict[int, int] = field(default_factory=dict)  # read id -> run index
    drain_by_s: float = NEVER_S
    ending: Outcome | None = None
    acks_left: int = 0
    bytes_moved: int = 0
    transport: str | None = None
    story: Story = field(default_factory=new_story)

    @property
    def handoff(self) -> HandoffId:
        return self.ticket.handoff

    @property
    def source(self) -> Incarnation:
        return Incarnation(self.ticket.source.incarnation)

    @property
    def stage(self) -> Stage:
        """The word for the request's life that goes into an outcome."""
        return _STAGES.get(self.state, Stage.PULLING)

    def needed_bits(self, run: Run) -> int:
        """The prompt blocks of this run that this side has reserved, one bit each."""
        low = max(run.first_block, self.first_block)
        high = min(run.first_block + run.num_blocks, self.first_block + self.num_blocks)
        return (1 << high) - (1 << low) if high > low else 0

    def missing_blocks(self) -> int:
        """How many reserved blocks, counted over all layers, have not arrived."""
        needed = (1 << (self.first_block + self.num_blocks)) - (1 << self.first_block)
        return sum((needed & ~bits).bit_count() for bits in self.covered)
