"""What crosses between the two halves of the connector. Pure: it never imports vLLM.

Scheduler to worker, once a step: a `StepPlan`. Worker to scheduler: `RankReport`s. vLLM carries both (between
processes where it runs more than one worker), so they are plain values.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from kvferry.types import HandoffId, HandoffTicket, Incarnation, InstanceRef, Outcome


@dataclass(frozen=True)
class Offer:
    """The source has a request whose blocks a target will want. `num_blocks` covers the whole prompt, in each group."""

    request_id: str
    ticket: HandoffTicket
    digest: bytes
    num_blocks: int


@dataclass(frozen=True)
class Publish:
    """After this step's forward, prompt blocks [first_block, first_block + len(block_ids)) of one KV cache group are
    complete."""

    request_id: str
    first_block: int
    block_ids: list[int]
    is_last: bool
    group: int = 0


class GroupBlocks(NamedTuple):
    """Own blocks for the prompt's blocks `first_block` onwards, in one KV cache group."""

    first_block: int
    block_ids: list[int]


@dataclass(frozen=True)
class Pull:
    """The target reserved `block_ids` for prompt blocks from `first_block` on, and so in `other_groups` where the model
    has several KV cache groups.

    Without block ids it has everything already: the source may release at once, and no request waits for this.
    """

    request_id: str
    ticket: HandoffTicket
    digest: bytes
    first_block: int
    block_ids: list[int]
    other_groups: list[GroupBlocks] = field(default_factory=list)

    @property
    def groups(self) -> list[GroupBlocks]:
        """What to pull, group by group."""
        return [GroupBlocks(self.first_block, self.block_ids), *self.other_groups]


@dataclass(frozen=True)
class Cancel:
    """The request is over on this side."""

    request_id: str
    reason: str


@dataclass(frozen=True)
class PoolLoad:
    """Fill `block_ids` with the pool's blocks of these hashes."""

    request_id: str
    hashes: list[bytes]
    block_ids: list[int]


@dataclass(frozen=True)
class PoolSave:
    """After this step's forward, blocks `first_block` onwards are complete: offer them to the pool. The request has
    `num_blocks` full blocks so far."""

    request_id: str
    first_block: int
    num_blocks: int
    hashes: list[bytes]
    block_ids: list[int]


@dataclass(frozen=True)
class StepPlan:
    """What the worker half does in one step: first the revokes and the drops, then the offers, the cancels, the pulls
    and loads; the publishes and saves once the step's forward has completed on the device. `is_empty_step`: vLLM
    computes nothing in it, otherwise `num_tokens`. `pool_drops`: requests whose saves must stop, because their blocks
    were taken from them."""

    is_empty_step: bool = False
    num_tokens: int = 0
    revokes: list[str] = field(default_factory=list)
    offers: list[Offer] = field(default_factory=list)
    cancels: list[Cancel] = field(default_factory=list)
    pulls: list[Pull] = field(default_factory=list)
    publishes: list[Publish] = field(default_factory=list)
    pool_drops: list[str] = field(default_factory=list)
    pool_loads: list[PoolLoad] = field(default_factory=list)
    pool_saves: list[PoolSave] = field(default_factory=list)


@dataclass(frozen=True)
class RankReport:
    """How one rank's part of a handoff ended at the target. No byte of it lands in its blocks any more."""

    request_id: str
    rank: int
    outcome: Outcome


def group_handoff(ticket: HandoffTicket, group: int) -> HandoffTicket:
    """The ticket of the handoff of this KV cache group: each has one of its own, as its blocks are others. The first
    has the request's."""
    if not group:
        return ticket
    name = f"{ticket.handoff}/group {group}"
    return msgspec.structs.replace(ticket, handoff=HandoffId(hashlib.sha256(name.encode()).hexdigest()[:32]))


def rank_handoff(ticket: HandoffTicket, source_rank: int, target_rank: int) -> HandoffTicket:
    """The ticket of the handoff between these two ranks.

    Each pair of ranks that share heads runs a handoff of its own; its id follows from the request's, so that both
    sides know it. An address that the ticket does not name stays empty.
    """
    if len(ticket.source.addresses) <= 1 and len(ticket.target.addresses) <= 1:
        return ticket
    name = f"{ticket.handoff}/{source_rank}/{target_rank}"
    return msgspec.structs.replace(
        ticket,
        handoff=HandoffId(hashlib.sha256(name.encode()).hexdigest()[:32]),
        source=_of_rank(ticket.source, source_rank),
        target=_of_rank(ticket.target, target_rank),
    )


def with_remaining(ticket: HandoffTicket, remaining_s: float) -> HandoffTicket:
    """The same ticket with the time that is left now."""
    return msgspec.structs.replace(ticket, remaining_s=max(0.0, remaining_s))


def rank_incarnation(incarnation: int, rank: int, num_ranks: int) -> Incarnation:
    """One rank's incarnation: its own where there are several, so that no rank is taken for another."""
    if num_ranks <= 1:
        return Incarnation(incarnation)
    digest = hashlib.sha256(f"{incarnation}/{rank}/{num_ranks}".encode()).digest()
    return Incarnation(int.from_bytes(digest[:8], "little") >> 1 | 1)


def _of_rank(ref: InstanceRef, rank: int) -> InstanceRef:
    size = len(ref.addresses)
    addresses = (ref.addresses[rank],) if rank < size else ()
    return InstanceRef(ref.instance_id, rank_incarnation(ref.incarnation, rank, size), addresses)
