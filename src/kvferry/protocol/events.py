"""What happens to a handoff, and what is to be done about it: the alphabet of the two machines.

`SourceHandoffs` and `TargetHandoffs` take one event and give a list of actions. The caller (`kvferry.handoff` in
production, `kvferry.sim` in the simulator) carries the actions out **in the order given**, without a gap in which
another thread could act on a later one first. Nothing here does I/O, and time comes in from outside.
"""

from __future__ import annotations

import enum
from typing import Literal

import msgspec

from kvferry.protocol.messages import Message, Run
from kvferry.types import HandoffId, HandoffTicket, Incarnation, InstanceRef, Outcome, Word


class ReleaseReason(enum.StrEnum):
    """Why the source's blocks were let go. The target's outcome is the verdict; this is only the source's reason."""

    ACKED = "acked"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    REVOKED = "revoked"
    PREEMPTED = "preempted"
    FAILED = "failed"


class _Value(msgspec.Struct, frozen=True, gc=False):
    """A frozen value; two of them are equal if their fields are."""


# Events of both sides ----------------------------------------------------------------------------------------------


class Received(_Value, frozen=True, gc=False):
    """A message came in. `peer` is the incarnation that the session authenticated, not what the message claims."""

    peer: Incarnation
    message: Message


class PeerLost(_Value, frozen=True, gc=False):
    """No channel to `peer` is left (its process died, or the connection broke). `cause` as in `KVError.cause`."""

    peer: Incarnation
    cause: str = "peer_gone"
    detail: str | None = None


class Cancelled(_Value, frozen=True, gc=False):
    """This side's request was aborted (client gone, router's order); `reason` is a sentence.

    For a handoff that is not known yet, a tombstone of `remaining_s` plus a lease keeps its request out when it
    arrives late.
    """

    handoff: HandoffId
    reason: str = "aborted"
    remaining_s: float = 0.0


class Tick(_Value, frozen=True, gc=False):
    """The time that `next_timer_s` named has come. Harmless at any other time."""


class Stalled(_Value, frozen=True, gc=False):
    """The event loop was late by `lag_s` (more than half a lease): read all sockets before any timer fires."""

    lag_s: float


class Serving(_Value, frozen=True, gc=False):
    """Whether the serving loop still turns. While it does not, this side neither heartbeats nor answers any."""

    alive: bool


# Events of the source ----------------------------------------------------------------------------------------------


class Offered(_Value, frozen=True, gc=False):
    """The prefill request arrived and its blocks are being allocated: the lease starts."""

    ticket: HandoffTicket
    prompt_digest: bytes
    num_blocks: int


class Published(_Value, frozen=True, gc=False):
    """The kernel that wrote this run has completed (R5); the run's digest is over these bytes.

    `word`, where set, is the lease under which the run was computed: a run that was on its way when the request was
    preempted is dropped.
    """

    handoff: HandoffId
    run: Run
    word: Word | None = None


class Sealed(_Value, frozen=True, gc=False):
    """Everything is published."""

    handoff: HandoffId


class Preempted(_Value, frozen=True, gc=False):
    """The engine takes the blocks back and will compute and publish the request again, under a new word.

    The old word must be zero before the engine reuses a block: it waits for `ReleaseBlocks(PREEMPTED)`, or the
    caller zeroes the word itself, in place, before it hands this event over.
    """

    handoff: HandoffId
    reason: str = "preempted"


class Revoked(_Value, frozen=True, gc=False):
    """The engine takes the blocks back for good (see `SourceHandoffs.pressure_order`); `reason` is a sentence."""

    handoff: HandoffId
    reason: str = "other requests needed the room"


class Failed(_Value, frozen=True, gc=False):
    """The prefill failed; the target hears of it at once. `why` is a sentence."""

    handoff: HandoffId
    why: str


# Events of the target ----------------------------------------------------------------------------------------------


class Queued(_Value, frozen=True, gc=False):
    """The decode request arrived and there is no room for it yet. Optional: keeps the source's lease alive."""

    ticket: HandoffTicket
    prompt_digest: bytes


class Selected(_Value, frozen=True, gc=False):
    """Blocks are reserved for the prompt's blocks `first_block` to `first_block + num_blocks - 1`: pull them."""

    ticket: HandoffTicket
    prompt_digest: bytes
    first_block: int
    num_blocks: int


class Connected(_Value, frozen=True, gc=False):
    """A channel to the source is open; `incarnation` is what answered there."""

    handoff: HandoffId
    incarnation: Incarnation


class ConnectFailed(_Value, frozen=True, gc=False):
    """No channel to the source could be opened in time. `cause` as in `KVError.cause`."""

    handoff: HandoffId
    cause: str
    detail: str | None = None


class ReadCompleted(_Value, frozen=True, gc=False):
    """A read has ended well: all bytes are in place, the word was still the same *after* the last byte (R2), the
    digest matched. No further byte of it will land."""

    handoff: HandoffId
    read_id: int
    nbytes: int = 0
    transport: str | None = None


class ReadFailed(_Value, frozen=True, gc=False):
    """A read has ended badly; no further byte of it will land (T4).

    `cause` as in `KVError.cause`: `lease_expired` (the word was another one), `integrity_error`, `peer_gone`,
    `transfer_timeout`, `handoff_aborted` (stopped because `StopReads` asked), and so on.
    """

    handoff: HandoffId
    read_id: int
    cause: str
    detail: str | None = None


# Actions -----------------------------------------------------------------------------------------------------------


class Send(_Value, frozen=True, gc=False):
    """Send a message to the peer of this incarnation. If no channel is open, drop it: timers heal all losses."""

    peer: Incarnation
    message: Message


class Refused(_Value, frozen=True, gc=False):
    """The local engine's `Offered`, `Queued` or `Selected` was not taken; nothing is held for it and no other action
    will follow for it. `reason`: `duplicate`, `closed`, `incarnation_changed`, `busy`."""

    handoff: HandoffId
    side: Literal["source", "target"]
    reason: str


class StoreWord(_Value, frozen=True, gc=False):
    """Source: put `word` into the word table, before anything is published under it."""

    slot: int
    word: Word


class ZeroWord(_Value, frozen=True, gc=False):
    """Source: store 0. Always comes before the `ReleaseBlocks` of the same lease (R1)."""

    slot: int


class ReleaseBlocks(_Value, frozen=True, gc=False):
    """Source: the blocks held under `word` may be reused; exactly once a lease (R8).

    After `PREEMPTED` the handoff goes on under a new word; after any other reason it is closed here, and an engine
    that still computes it stops.
    """

    handoff: HandoffId
    word: Word
    reason: ReleaseReason
    cause: str | None = None


class Connect(_Value, frozen=True, gc=False):
    """Target: open a channel to the source (or find an open one), then give `Connected` or `ConnectFailed`."""

    handoff: HandoffId
    source: InstanceRef
    deadline_s: float


class StartRead(_Value, frozen=True, gc=False):
    """Target: pull `run` (as far as this side needs its blocks) into the reserved blocks, guarded by `word` in
    `slot` of the source's word table; then give exactly one `ReadCompleted` or `ReadFailed` with this `read_id`.

    `deadline_s` is time from now.
    """

    handoff: HandoffId
    read_id: int
    run: Run
    word: Word
    slot: int
    deadline_s: float


class StopReads(_Value, frozen=True, gc=False):
    """Target: stop all reads of this handoff as soon as possible. Each still ends with its own event."""

    handoff: HandoffId


class Quarantine(_Value, frozen=True, gc=False):
    """Target: reads of this handoff did not stop in time. Close the link to `peer`, so that they must; their events
    are still awaited, and the blocks stay reserved until then."""

    handoff: HandoffId
    peer: Incarnation


class Ended(_Value, frozen=True, gc=False):
    """Target: the handoff is over and nothing writes into its blocks any more; exactly once."""

    handoff: HandoffId
    outcome: Outcome


SourceEvent = (
    Offered
    | Published
    | Sealed
    | Preempted
    | Revoked
    | Failed
    | Cancelled
    | Received
    | PeerLost
    | Tick
    | Stalled
    | Serving
)
TargetEvent = (
    Queued
    | Selected
    | Connected
    | ConnectFailed
    | ReadCompleted
    | ReadFailed
    | Cancelled
    | Received
    | PeerLost
    | Tick
    | Stalled
    | Serving
)
Action = Send | Refused | StoreWord | ZeroWord | ReleaseBlocks | Connect | StartRead | StopReads | Quarantine | Ended
