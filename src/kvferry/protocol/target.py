"""The target's half of a handoff: from the decode request to the one outcome that everybody hears of.

One table serves one rank. For each handoff:

    reserving ──Selected──▶ waiting ──first run──▶ pulling ──seal, all read──▶ verifying ──▶ delivered
        │                      │                     │ ▲                          │
        │                      │         a new word: ▼ │ read on                  │
        └──────────────────────┴────▶ draining (own reads must stop first: R7) ◀──┘
                                          └──▶ recomputing | aborted | failed

The reader drives: a run that the source has published is read at once, guarded by the lease's word, and counts only if
the word still stood after its last byte. All progress belongs to one word (R6): another word in a `State`, or a read
that found another word, throws it away.

Every wait has an end: the deadline of the ticket, a lease without an answer from the source, `drain_s` for reads that
should stop (then their link is closed). Until the last own read has ended, nothing is freed, retried or reported.
`_finish` is the only way out besides `delivered`; both lead to one `Ended`, after which a tombstone answers late
messages and keeps a second copy of the request out (R11).
"""

from __future__ import annotations

import itertools

import msgspec

from kvferry.errors import InvalidTransition
from kvferry.protocol import details
from kvferry.protocol.events import (
    Action,
    Cancelled,
    Connect,
    Connected,
    ConnectFailed,
    Ended,
    PeerLost,
    Quarantine,
    Queued,
    ReadCompleted,
    ReadFailed,
    Received,
    Refused,
    Selected,
    Send,
    StartRead,
    StopReads,
    TargetEvent,
    Tick,
)
from kvferry.protocol.lease import HandoffSettings
from kvferry.protocol.messages import (
    NO_WORD,
    Gone,
    Manifest,
    Reserved,
    State,
    manifest_digest,
)
from kvferry.protocol.records import CLOSED_AS, CLOSED_STATES, NEVER_S, TargetRecord, TargetState
from kvferry.protocol.tables import TargetTable
from kvferry.types import HandoffId, HandoffTicket, Incarnation, InstanceRef, Outcome, Stage, TerminalState

_PROBLEM_OF_BOTH = frozenset({"prompt_mismatch", "incarnation_changed", "not_the_target"})


class TargetHandoffs(TargetTable):
    """All handoffs of which this instance is the target. Not thread-safe: one owner calls it.

    Args:
        incarnation: this process's.
        num_layers: layers that a complete prompt must bring.
    """

    def __init__(self, incarnation: Incarnation, settings: HandoffSettings, num_layers: int) -> None:
        super().__init__(incarnation, settings, num_layers)
        self._read_ids = itertools.count(1)
        self._handlers |= {
            Queued: self._on_queued,
            Selected: self._on_selected,
            Connected: self._on_connected,
            ConnectFailed: self._on_connect_failed,
            ReadCompleted: self._on_read_completed,
            ReadFailed: self._on_read_failed,
            Cancelled: self._on_cancelled,
            Received: self._on_received,
            PeerLost: self._on_peer_lost,
            Tick: self._on_tick,
        }

    def handle(self, event: TargetEvent, now_s: float) -> list[Action]:
        """Take one event; return what to do, in order.

        Raises:
            InvalidTransition: a read ended that was not started, or ended twice: a bug of the caller.
        """
        return self._handlers[type(event)](event, now_s)

    def knows(self, handoff: HandoffId) -> bool:
        """Whether this handoff's request has been here before, open or closed."""
        return handoff in self._records

    # What the engine does ------------------------------------------------------------------------------------------

    def _on_queued(self, event: Queued, now_s: float) -> list[Action]:
        return self._open(event.ticket, event.prompt_digest, now_s)[1]

    def _on_selected(self, event: Selected, now_s: float) -> list[Action]:
        record = self._records.get(event.ticket.handoff)
        out: list[Action] = []
        if record is None or record.state is not TargetState.RESERVING:
            record, out = self._open(event.ticket, event.prompt_digest, now_s)
            if record is None or record.state is not TargetState.RESERVING:
                return out
        record.selected = True
        record.first_block, record.num_blocks = event.first_block, event.num_blocks
        record.state = TargetState.WAITING
        self._tell(record, now_s, f"selected {event.num_blocks} blocks from {event.first_block} on")
        if record.connected:
            head = self._head(record, now_s)
            out.append(
                Send(record.source, Reserved(first_block=event.first_block, num_blocks=event.num_blocks, **head))
            )
        if not event.num_blocks:
            record.word = NO_WORD  # nothing is taken under it, so nothing will be acknowledged
            record.ending = self._outcome(record, TerminalState.DELIVERED, None, None, None)
            return out + self._let_go(record, now_s) + self._end(record, now_s)
        return out + self._advance(record, now_s)

    def _let_go(self, record: TargetRecord, now_s: float) -> list[Action]:
        """This side had every block already: nothing is pulled, and the source need not hold or compute anything."""
        return [self._cancel(record, now_s, "not_needed")] if record.connected else []

    def _open(
        self, ticket: HandoffTicket, prompt_digest: bytes, now_s: float
    ) -> tuple[TargetRecord | None, list[Action]]:
        """A new record in RESERVING, with what its start needs; no record if the request was here before."""
        known = self._records.get(ticket.handoff)
        if known is not None:
            reason = "closed" if known.state in CLOSED_STATES else "duplicate"
            return None, [Refused(ticket.handoff, "target", reason)]
        record = self._add(ticket, prompt_digest, now_s, ticket.remaining_s)
        if ticket.target.incarnation != self.incarnation:
            return record, self._finish(record, now_s, "incarnation_changed", details.REFUSED["incarnation_changed"])
        self._arm(record)
        connect_s = min(record.deadline_s - now_s, self.settings.lease_ttl_s)
        return record, [Connect(ticket.handoff, ticket.source, connect_s)]

    def _on_cancelled(self, event: Cancelled, now_s: float) -> list[Action]:
        record = self._records.get(event.handoff)
        if record is None:
            self._bury_unknown(event, now_s)
            return []
        if record.ending is not None and record.state is TargetState.DRAINING:
            record.ending = self._outcome(
                record, TerminalState.ABORTED, Stage.DRAINING, "handoff_aborted", event.reason
            )
            return []
        return self._finish(record, now_s, "handoff_aborted", event.reason, state=TerminalState.ABORTED)

    # The channel ---------------------------------------------------------------------------------------------------

    def _on_connected(self, event: Connected, now_s: float) -> list[Action]:
        closed = self._records.get(event.handoff)
        if closed is not None and closed.state is TargetState.DELIVERED and not closed.num_blocks:
            closed.connected = event.incarnation == closed.source
            return self._let_go(closed, now_s)
        record = self._open_record(event.handoff)
        if record is None:
            return []
        if event.incarnation != record.source:
            told = details.of_gone(record, "incarnation_changed", "")
            return self._finish(record, now_s, "incarnation_changed", told)
        record.connected = True
        record.lapse_s = now_s + self.settings.lease_ttl_s
        self._tell(record, now_s, "connected")
        return self._beat(record, now_s)

    def _on_connect_failed(self, event: ConnectFailed, now_s: float) -> list[Action]:
        record = self._open_record(event.handoff)
        if record is None:
            return []
        return self._finish(record, now_s, event.cause, details.of_connect_failed(record, event.detail))

    def _on_peer_lost(self, event: PeerLost, now_s: float) -> list[Action]:
        out: list[Action] = []
        for record in [r for r in self._records.values() if r.source == event.peer and r.connected]:
            record.connected = False
            if record.state not in CLOSED_STATES:
                out += self._finish(record, now_s, event.cause, details.of_peer_lost(record, event.detail))
        return out

    def _on_received(self, event: Received, now_s: float) -> list[Action]:
        message = event.message
        record = self._records.get(message.handoff)
        if message.source != event.peer or not isinstance(message, State | Gone):
            self.counts["misaddressed"] += 1
            return []
        if record is None or message.target != self.incarnation or record.source != event.peer:
            self.counts["unknown"] += 1
            return []
        first = record.heard_tick_s is None
        if message.sequence > record.heard_sequence:
            record.heard_tick_s = message.tick_s
        if isinstance(message, Gone):
            return self._on_gone(record, message, now_s)
        out = self._on_state(record, message, now_s)
        if first and record.ending is None:
            # Answer at once: until the source has its own tick back, its lease runs from the offer.
            out += self._beat(record, now_s)
        return out

    def _on_gone(self, record: TargetRecord, message: Gone, now_s: float) -> list[Action]:
        record.acks_left = 0
        if record.state in CLOSED_STATES:
            self._arm(record)
            return []
        if message.reason == "busy":
            return []  # not parked for want of room; the next heartbeat asks again
        cause = message.reason if message.reason in _PROBLEM_OF_BOTH else f"source_{message.reason}"
        return self._finish(record, now_s, cause, details.of_gone(record, message.reason, message.detail))

    def _on_state(self, record: TargetRecord, message: State, now_s: float) -> list[Action]:
        if record.state in CLOSED_STATES:
            if record.state is TargetState.DELIVERED and record.word and message.word == record.word:
                return [self._ack(record, now_s)]
            return [self._cancel(record, now_s, "closed")]
        if record.ending is not None:
            return []
        if message.echo_s is not None:
            # The source held the lease for `remaining_s` after it had heard what this side sent at `echo_s`.
            record.lapse_s = max(record.lapse_s, message.echo_s + message.remaining_s)
        self._arm(record)
        if message.sequence <= record.heard_sequence:
            return []  # older than what is known (I4)
        record.heard_sequence = message.sequence
        if message.word == NO_WORD:
            return []
        if message.word == record.dead_word:
            if message.echo_s is not None and message.echo_s >= record.dead_since_s:
                told = f"{details.source_of(record)} says that its lease stands; the blocks say that it ended"
                return self._finish(record, now_s, "word_mismatch", told)
            return []
        out = self._adopt(record, message, now_s) if message.word != record.word else []
        if message.first_run > len(record.runs):
            return out + self._beat(record, now_s)  # one was lost on the way: ask for it
        record.runs += message.runs[len(record.runs) - message.first_run :]
        record.seal = message.seal or record.seal
        return out + self._advance(record, now_s)

    def _adopt(self, record: TargetRecord, message: State, now_s: float) -> list[Action]:
        """Take up a new word; all progress under the old one is void (R6)."""
        self._tell(record, now_s, "a new word" if record.word else "the first word")
        record.word, record.slot = message.word, message.slot
        return self._discard(record, now_s)

    def _discard(self, record: TargetRecord, now_s: float) -> list[Action]:
        record.runs, record.seal = [], None
        record.num_started = record.num_done = 0
        record.covered = [0] * self.num_layers
        if not self._reads_pending(record):
            return []
        record.state = TargetState.DRAINING
        record.drain_by_s = now_s + self.settings.drain_s
        return [StopReads(record.handoff)]

    # Reading -------------------------------------------------------------------------------------------------------

    def _advance(self, record: TargetRecord, now_s: float) -> list[Action]:
        """Start what can be read; deliver when everything sealed has arrived."""
        self._arm(record)
        if not record.selected or record.state is TargetState.DRAINING:
            return []
        out: list[Action] = []
        while record.num_started < len(record.runs):
            index = record.num_started
            run = record.runs[index]
            if not 0 <= run.layer_start < run.layer_stop <= self.num_layers:
                layers = f"layers {run.layer_start} to {run.layer_stop - 1}, of {self.num_layers}"
                problem = f"{details.source_of(record)} published a run of {layers}"
                return out + self._finish(record, now_s, "integrity_error", problem, stage=Stage.VERIFYING)
            record.num_started += 1
            if not record.needed_bits(run):
                record.num_done += 1
                continue
            read_id = next(self._read_ids)
            record.reads[read_id] = index
            record.state = TargetState.PULLING
            out.append(StartRead(record.handoff, read_id, run, record.word, record.slot, record.deadline_s - now_s))
        if record.seal is not None and record.num_done >= record.seal.num_runs and not record.reads:
            out += self._verify(record, record.seal, now_s)
        return out

    def _verify(self, record: TargetRecord, seal: Manifest, now_s: float) -> list[Action]:
        """Everything that the seal promises has been read under one word; does it make up the whole prompt?"""
        missing, problem = record.missing_blocks(), None
        if len(record.runs) != seal.num_runs or manifest_digest(record.runs) != seal.digest:
            problem = f"its manifest of {seal.num_runs} runs is not that of the {len(record.runs)} runs received"
        elif missing:
            problem = f"{missing} of {record.num_blocks * self.num_layers} blocks were never published"
        if problem is not None:
            told = f"what {details.source_of(record)} sealed is not whole: {problem}"
            return self._finish(record, now_s, "integrity_error", told, stage=Stage.VERIFYING)
        record.acks_left = self.settings.ack_repeats
        record.ending = self._outcome(record, TerminalState.DELIVERED, None, None, None)
        ack = self._ack(record, now_s)
        return [ack, *self._end(record, now_s)]

    def _on_read_completed(self, event: ReadCompleted, now_s: float) -> list[Action]:
        record, index = self._take_read(event.handoff, event.read_id, "read completed")
        record.bytes_moved += event.nbytes
        record.transport = event.transport or record.transport
        if record.state is TargetState.DRAINING or record.ending is not None:
            return self._drained(record, now_s)
        run = record.runs[index]
        bits = record.needed_bits(run)
        for layer in run.layers:
            record.covered[layer] |= bits
        record.num_done += 1
        return self._advance(record, now_s)

    def _on_read_failed(self, event: ReadFailed, now_s: float) -> list[Action]:
        record, _ = self._take_read(event.handoff, event.read_id, "read failed")
        if record.state is TargetState.DRAINING or record.ending is not None:
            return self._drained(record, now_s)
        self._tell(record, now_s, f"a read failed: {event.cause}")
        if event.cause != "lease_expired":
            stage = Stage.VERIFYING if event.cause == "integrity_error" else Stage.PULLING
            told = details.of_read_failed(record, event.detail)
            return self._finish(record, now_s, event.cause, told, stage=stage)
        # The word fell: the source has revoked the lease. It may publish again under a new one, or say why not.
        record.dead_word, record.dead_since_s = record.word, now_s
        record.word = NO_WORD
        record.state = TargetState.WAITING
        return self._discard(record, now_s) + self._beat(record, now_s)

    def _take_read(self, handoff: HandoffId, read_id: int, event: str) -> tuple[TargetRecord, int]:
        record = self._records.get(handoff)
        if record is None:
            raise InvalidTransition(f"handoff {handoff} at the target", "unknown", event)
        if read_id not in record.reads:
            raise self._invalid(record, f"{event}, number {read_id}, which is not under way,")
        return record, record.reads.pop(read_id)

    def _reads_pending(self, record: TargetRecord) -> bool:
        """Whether own reads may still write into this handoff's blocks (R7)."""
        return bool(record.reads)

    def _drained(self, record: TargetRecord, now_s: float) -> list[Action]:
        if self._reads_pending(record):
            return []
        record.drain_by_s = NEVER_S
        if record.state in CLOSED_STATES:
            return []
        if record.ending is not None:
            return self._end(record, now_s)
        record.state = TargetState.PULLING if record.word else TargetState.WAITING
        return self._advance(record, now_s)

    # The end -------------------------------------------------------------------------------------------------------

    def _finish(
        self,
        record: TargetRecord,
        now_s: float,
        cause: str,
        detail: str,
        *,
        stage: Stage | None = None,
        state: TerminalState | None = None,
    ) -> list[Action]:
        """End without the blocks: tell the source, stop the own reads, and report once they have stopped (R7)."""
        if record.ending is not None:
            return []
        fallback = TerminalState.RECOMPUTED if self.settings.recompute_on_failure else TerminalState.FAILED
        record.ending = self._outcome(record, state or fallback, stage or record.stage, cause, detail)
        self._tell(record, now_s, f"ending: {cause} ({detail})")
        out: list[Action] = [self._cancel(record, now_s, cause)] if record.connected else []
        if not self._reads_pending(record):
            return out + self._end(record, now_s)
        if record.state is not TargetState.DRAINING:
            record.state = TargetState.DRAINING
            record.drain_by_s = now_s + self.settings.drain_s
            out.append(StopReads(record.handoff))
        self._arm(record)
        return out

    def _end(self, record: TargetRecord, now_s: float) -> list[Action]:
        """No own read is left: report the outcome, and leave a tombstone until deadline + lease."""
        assert record.ending is not None
        outcome = msgspec.structs.replace(
            record.ending,
            duration_s=now_s - record.opened_s,
            bytes_moved=record.bytes_moved,
            transport=record.transport,
        )
        record.ending = outcome
        record.state = CLOSED_AS[outcome.state]
        record.runs, record.covered = [], []
        record.beat_s = now_s + self.settings.ack_interval_s if record.acks_left else NEVER_S
        self._tell(record, now_s, f"ended: {outcome.state}")
        self._entomb(record)
        return [Ended(record.handoff, outcome)]

    def _entomb(self, record: TargetRecord) -> None:
        """Keep the closed record, so that late copies of its messages find it closed (R11)."""
        self._arm(record)

    def _bury_unknown(self, event: Cancelled, now_s: float) -> None:
        """The cancel overtook its request: leave a tombstone for a handoff that was never open."""
        nobody = InstanceRef("", 0)
        ticket = HandoffTicket(event.handoff, "target", nobody, nobody, event.remaining_s)
        record = self._add(ticket, b"", now_s, event.remaining_s)
        record.state = TargetState.ABORTED
        record.ending = self._outcome(record, TerminalState.ABORTED, Stage.QUEUE, "handoff_aborted", event.reason)
        self._entomb(record)

    def _outcome(
        self,
        record: TargetRecord,
        state: TerminalState,
        stage: Stage | None,
        cause: str | None,
        detail: str | None,
    ) -> Outcome:
        return Outcome(record.handoff, state, stage, cause, detail, attempt=record.ticket.attempt)

    # Time ----------------------------------------------------------------------------------------------------------

    def _on_tick(self, event: Tick, now_s: float) -> list[Action]:
        out: list[Action] = []
        for record in self._due(now_s):
            if record.state in CLOSED_STATES:
                out += self._tick_closed(record, now_s)
                continue
            if record.drain_by_s <= now_s:
                record.drain_by_s = NEVER_S
                self.counts["quarantined"] += 1
                self._tell(record, now_s, "quarantined: its reads do not end")
                out.append(Quarantine(record.handoff, record.source))
            if record.ending is None:
                if record.deadline_s <= now_s:
                    out += self._finish(record, now_s, "deadline_exceeded", details.of_deadline(record))
                elif record.lapse_s <= now_s:
                    cause = "source_silent" if self._serving else "serving_stalled"
                    told = details.of_silence(record, self.settings.lease_ttl_s, serving=self._serving)
                    out += self._finish(record, now_s, cause, told)
                elif record.beat_s <= now_s:
                    out += self._beat(record, now_s)
            self._arm(record)
        return out

    def _tick_closed(self, record: TargetRecord, now_s: float) -> list[Action]:
        if record.until_s <= now_s:
            self._forget(record)
            return []
        out: list[Action] = []
        if record.acks_left and record.beat_s <= now_s:
            record.acks_left -= 1
            record.beat_s = now_s + self.settings.ack_interval_s
            out.append(self._ack(record, now_s))
        self._arm(record)
        return out
