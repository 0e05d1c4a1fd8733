"""A handoff node that only writes down what it is told, and tickets for it."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass, field

from kvferry.types import HandoffTicket, InstanceRef, Outcome, TerminalState, new_handoff_id

Released = namedtuple("Released", "handoff reason at_s")


class FakeNode:
    def __init__(self):
        self.calls, self.targets = [], []
        self._released = []
        self._outcomes = []

    def offer(self, ticket, prompt_digest, num_blocks, *, target=None):
        self.targets.append(target)
        self.calls.append(("offer", ticket.handoff, num_blocks))

    def publish(self, handoff, layers, first_block, block_ids):
        self.calls.append(("publish", handoff, layers, first_block, list(block_ids)))

    def seal(self, handoff):
        self.calls.append(("seal", handoff))

    def revoke(self, handoff, reason):
        self.calls.append(("revoke", handoff))

    def cancel(self, handoff, reason, *, side):
        self.calls.append(("cancel", handoff, side))

    def drop_select(self, ticket, prompt_digest, first_block, block_ids):
        self.calls.append(("drop_select", ticket.handoff, ticket.source.addresses, first_block, list(block_ids)))

    def released(self):
        found, self._released = self._released, []
        return found

    def outcomes(self):
        found, self._outcomes = self._outcomes, []
        return found

    def names(self):
        return [call[0] for call in self.calls]

    def release(self, handoff, reason="acked", at_s=0.0):
        self._released.append(Released(handoff, reason, at_s))

    def end(self, handoff, state=TerminalState.DELIVERED, **details):
        self._outcomes.append(Outcome(handoff, state, **details))


def ticket(side, *, sources=1, targets=1, remaining_s=30.0):
    def ref(name, count):
        return InstanceRef(name, 1, tuple(f"tcp://127.0.0.1:{9000 + i}" for i in range(count)))

    return HandoffTicket(new_handoff_id(), side, ref("p", sources), ref("d", targets), remaining_s)


@dataclass
class Request:
    request_id: str
    prompt_token_ids: list
    kv_transfer_params: dict | None = None


@dataclass
class Outcomes:
    """What the scheduler half reported."""

    seen: list = field(default_factory=list)

    def __call__(self, outcome, recomputed):
        self.seen.append((outcome, recomputed))

    @property
    def last(self):
        return self.seen[-1][0]
