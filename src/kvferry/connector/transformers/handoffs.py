"""The engine's side of insert and drop_select: which sequence's blocks belong to which handoff.

The handoff node (kvferry.handoff) moves the bytes; this keeps the engine's promises to it. Source: blocks stay held
from `offer` until the node names the handoff as released. Target: blocks stay untouched from `drop_select` until the
node gives the outcome, because reads may still land in them.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Protocol

from kvferry.connector.transformers.scheduler import Pass
from kvferry.connector.transformers.sequence import Sequence
from kvferry.errors import HandoffAborted
from kvferry.hashing import hash_list_digest
from kvferry.types import HandoffId, HandoffTicket, Outcome, Side

MAX_REMEMBERED = 4096


class Released(Protocol):
    """A source handoff that is over; its blocks may be freed."""

    @property
    def handoff(self) -> HandoffId: ...
    @property
    def reason(self) -> str: ...
    @property
    def cause(self) -> str | None: ...


class HandoffPort(Protocol):
    """What the engine needs of a handoff node. Thread-safe; no call blocks."""

    def offer(self, ticket: HandoffTicket, prompt_digest: bytes, num_blocks: int) -> None: ...
    def publish(self, handoff: HandoffId, layers: range, first_block: int, block_ids: list[int]) -> None: ...
    def seal(self, handoff: HandoffId) -> None: ...
    def cancel(self, handoff: HandoffId, reason: str, *, side: Side, remaining_s: float = 0.0) -> None: ...
    def released(self) -> Seq[Released]: ...
    def expect(self, ticket: HandoffTicket, prompt_digest: bytes) -> None: ...
    def drop_select(
        self, ticket: HandoffTicket, prompt_digest: bytes, first_block: int, block_ids: list[int]
    ) -> None: ...
    def outcomes(self) -> Seq[Outcome]: ...
    def beat(self) -> None: ...
    def check_integrity(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Ended:
    """A handoff that is over on this side, with the sequence whose blocks it bound."""

    sequence: Sequence
    reason: str
    cause: str | None = None


class Handoffs:
    """Open handoffs of one engine, by id."""

    def __init__(self, port: HandoffPort, *, num_layers: int, block_size: int, root_of: Callable[[str], bytes]) -> None:
        self._port = port
        self._num_layers = num_layers
        self._block_size = block_size
        self._root_of = root_of
        self._sources: dict[HandoffId, Sequence] = {}
        self._targets: dict[HandoffId, Sequence] = {}
        self._expected: dict[HandoffId, Sequence] = {}
        self._seen: OrderedDict[HandoffId, None] = OrderedDict()

    @property
    def num_open(self) -> int:
        return len(self._sources) + len(self._targets) + len(self._expected)

    def holds(self, sequence: Sequence) -> bool:
        """Whether the sequence's blocks must not be freed yet."""
        ticket = sequence.request.ticket
        if ticket is None:
            return False
        return any(t.get(ticket.handoff) is sequence for t in (self._sources, self._targets))

    def offer(self, sequence: Sequence, ticket: HandoffTicket) -> None:
        """Begin the source side; blocks found by prefix are published at once.

        Raises: KVError: the node refuses; nothing is held.
        """
        self._require_new(ticket)
        self._port.offer(ticket, self._digest(sequence), sequence.prompt_blocks(self._block_size))
        self._sources[ticket.handoff] = sequence
        sequence.publishing = True
        num_cached = sequence.num_computed // self._block_size
        if num_cached:
            blocks = sequence.block_table[:num_cached]
            self._port.publish(ticket.handoff, range(self._num_layers), 0, blocks)
            sequence.num_published_blocks = num_cached

    def publisher(self, work: Pass) -> Callable[[int], None]:
        """What to call with each layer whose KV of this pass is in memory."""
        sequence, ticket = work.sequence, work.sequence.request.ticket
        if not sequence.publishing or ticket is None:
            return lambda layer: None
        handoff = ticket.handoff
        first, stop = sequence.num_published_blocks, self._num_complete(work)
        blocks = sequence.block_table[first:stop]

        def publish(layer: int) -> None:
            if blocks:
                self._port.publish(handoff, range(layer, layer + 1), first, blocks)

        return publish

    def after_pass(self, work: Pass) -> None:
        """Count what the pass published, and seal once the whole prompt's KV is there."""
        sequence, ticket = work.sequence, work.sequence.request.ticket
        if sequence.publishing and ticket is not None:
            sequence.num_published_blocks = self._num_complete(work)
            if work.yields_token:
                sequence.publishing = False
                self._port.seal(ticket.handoff)

    def expect(self, sequence: Sequence, ticket: HandoffTicket) -> None:
        """Begin the target side of a sequence that has no blocks yet, so that the source keeps its own.

        Raises: KVError: the node refuses.
        """
        self._require_new(ticket)
        self._port.expect(ticket, self._digest(sequence))
        self._expected[ticket.handoff] = sequence

    def drop_select(self, sequence: Sequence, ticket: HandoffTicket) -> None:
        """Ask for the prompt's blocks that are not found by prefix; after `expect`, once the blocks are reserved.

        Raises: KVError: the node refuses; nothing will be written.
        """
        self._expected.pop(ticket.handoff, None)
        first = sequence.num_computed // self._block_size
        wanted = sequence.block_table[first : sequence.prompt_blocks(self._block_size)]
        self._port.drop_select(ticket, self._digest(sequence), first, wanted)
        self._targets[ticket.handoff] = sequence

    def cancel(self, sequence: Sequence, reason: str, remaining_s: float) -> None:
        """Tell the node that this side gave up; blocks in its hands are named later by `released` or `outcomes`.

        Also for a sequence that still waits: the node remembers for `remaining_s`, so that the peer hears of it.
        """
        ticket = sequence.request.ticket
        if ticket is None or sequence.index > 0:
            return
        open_here = self.holds(sequence) or self._expected.get(ticket.handoff) is sequence
        if open_here or ticket.handoff not in self._seen:
            sequence.publishing = False
            self._port.cancel(ticket.handoff, reason, side=ticket.side, remaining_s=max(0.0, remaining_s))

    def beat(self) -> None:
        """The serving loop turned."""
        self._port.beat()

    def released(self) -> list[Ended]:
        """Source sequences that are no longer held, each once."""
        ended = []
        for released in self._port.released():
            sequence = self._sources.pop(released.handoff, None)
            if sequence is not None:
                sequence.publishing = False
                ended.append(Ended(sequence, str(released.reason), released.cause))
        return ended

    def outcomes(self) -> list[tuple[Sequence, Outcome]]:
        """Target sequences into whose blocks nothing is written any more, each once; some may not have any yet."""
        pairs = [
            (self._targets.pop(o.handoff, None) or self._expected.pop(o.handoff, None), o)
            for o in self._port.outcomes()
        ]
        return [(sequence, outcome) for sequence, outcome in pairs if sequence is not None]

    def check_integrity(self) -> None:
        self._port.check_integrity()

    def _require_new(self, ticket: HandoffTicket) -> None:
        """An attempt's id is used once on each side; a second use would share the first one's blocks."""
        if ticket.handoff in self._seen:
            raise HandoffAborted(
                f"handoff {ticket.handoff} was here before; a retry must come with an id of its own", stage="reserving"
            )
        self._seen[ticket.handoff] = None
        if len(self._seen) > MAX_REMEMBERED:
            self._seen.popitem(last=False)

    def _num_complete(self, work: Pass) -> int:
        """Prompt blocks whose bytes are final after this pass: the last one only with the last prompt token."""
        if work.yields_token:
            return work.sequence.prompt_blocks(self._block_size)
        return work.stop // self._block_size

    def _digest(self, sequence: Sequence) -> bytes:
        request = sequence.request
        return hash_list_digest(request.prompt, self._block_size, self._root_of(request.namespace))
