"""The source's half of a handoff: from the prefill request to the moment its blocks may be reused.

One table serves one rank. For each handoff:

    (unknown) ──Subscribe──▶ parked ──Offered──▶ open ──Published──▶ publishing ──Sealed──▶ sealed
        └─────────Offered───────────────────────▲ │ ◀───Preempted: a new word───┴─────────────┘
                                                  └──▶ released: acked | expired | cancelled | revoked | failed

`parked` holds a target that asked before the request came. From `open` on there is a lease with a word; everything
that is published goes out at once to a subscribed target, and each heartbeat is answered with whatever the target
does not know yet, so lost messages heal. `released` is a tombstone: it answers late messages with `Gone` and keeps a
late copy of the request out (R11), until deadline + lease.

All ways to `released` go through `_release`, which claims the lease (R8) and orders the word's zeroing before the
release of the blocks (R1).
"""

from __future__ import annotations

from collections.abc import Callable

from kvferry.protocol.details import OTHER_PROMPT
from kvferry.protocol.events import (
    Action,
    Cancelled,
    Failed,
    Offered,
    PeerLost,
    Preempted,
    Published,
    Received,
    Refused,
    ReleaseBlocks,
    ReleaseReason,
    Revoked,
    Sealed,
    Send,
    SourceEvent,
    StoreWord,
    Tick,
    ZeroWord,
)
from kvferry.protocol.lease import HandoffSettings, Lease
from kvferry.protocol.messages import (
    Ack,
    Cancel,
    Gone,
    Heartbeat,
    Manifest,
    Message,
    Reserved,
    State,
    Subscribe,
    manifest_digest,
)
from kvferry.protocol.records import SourceRecord, SourceState
from kvferry.protocol.tables import SourceTable
from kvferry.types import HandoffId, Incarnation, Word


class SourceHandoffs(SourceTable):
    """All handoffs of which this instance is the source. Not thread-safe: one owner calls it.

    Args:
        incarnation: this process's.
        new_word: draws a lease's word; no two draws may ever be equal, also not across restarts (R3).
    """

    def __init__(self, incarnation: Incarnation, settings: HandoffSettings, new_word: Callable[[], Word]) -> None:
        super().__init__(incarnation, settings)
        self._new_word = new_word
        self._handlers |= {
            Offered: self._on_offered,
            Published: self._on_published,
            Sealed: self._on_sealed,
            Preempted: self._on_preempted,
            Revoked: self._on_revoked,
            Failed: self._on_failed,
            Cancelled: self._on_cancelled,
            Received: self._on_received,
            PeerLost: self._on_peer_lost,
            Tick: self._on_tick,
        }

    def handle(self, event: SourceEvent, now_s: float) -> list[Action]:
        """Take one event; return what to do, in order.

        Raises:
            InvalidTransition: the engine did what the protocol forbids (sealed twice, published after the seal).
                The table is as before the event.
        """
        return self._handlers[type(event)](event, now_s)

    def knows(self, handoff: HandoffId) -> bool:
        """Whether this handoff's request has been here before, open or closed: a second copy is to be refused."""
        record = self._records.get(handoff)
        return record is not None and record.state is not SourceState.PARKED

    # What the engine does ------------------------------------------------------------------------------------------

    def _on_offered(self, event: Offered, now_s: float) -> list[Action]:
        ticket = event.ticket
        record = self._records.get(ticket.handoff)
        if record is not None and record.state is not SourceState.PARKED:
            reason = "closed" if record.state is SourceState.RELEASED else "duplicate"
            return [Refused(ticket.handoff, "source", reason)]
        if ticket.source.incarnation != self.incarnation:
            return [Refused(ticket.handoff, "source", "incarnation_changed")]
        target = Incarnation(ticket.target.incarnation)
        if record is None or record.target != target:
            record = self._add(ticket.handoff, target, now_s, 0.0)
        asked_digest = record.prompt_digest
        record.attempt = ticket.attempt
        record.opened_s = now_s
        record.deadline_s = now_s + self.settings.bounded_s(ticket.remaining_s)
        record.prompt_digest = event.prompt_digest
        record.num_blocks = event.num_blocks
        if not self._free_slots:
            refused = Refused(ticket.handoff, "source", "busy")
            return [refused, *self._close(record, ReleaseReason.FAILED, "no word slot is free", now_s, gone="refused")]
        self._uncount(record)
        record.state = SourceState.OPEN
        self._tell(record, now_s, "offered")
        out = self._open_lease(record, now_s, now_s + self.settings.lease_ttl_s)
        if record.subscribed and asked_digest != event.prompt_digest:
            return out + self._close(record, ReleaseReason.FAILED, OTHER_PROMPT, now_s, gone="prompt_mismatch")
        return out + self._push(record, 0, now_s)

    def _on_published(self, event: Published, now_s: float) -> list[Action]:
        record = self._live(event.handoff)
        if record is None or record.lease is None:
            return []  # released while the engine was still computing: it hears of that by its ReleaseBlocks
        if event.word is not None and event.word != record.lease.word:
            return []
        if record.state is SourceState.SEALED:
            raise self._invalid(record, "published")
        record.state = SourceState.PUBLISHING
        record.runs.append(event.run)
        self._tell(record, now_s, "published")
        return self._push(record, len(record.runs) - 1, now_s)

    def _on_sealed(self, event: Sealed, now_s: float) -> list[Action]:
        record = self._live(event.handoff)
        if record is None:
            return []
        if record.state is SourceState.SEALED:
            raise self._invalid(record, "sealed")
        record.state = SourceState.SEALED
        record.seal = Manifest(len(record.runs), record.num_blocks, manifest_digest(record.runs))
        self._tell(record, now_s, "sealed")
        return self._push(record, len(record.runs), now_s)

    def _on_preempted(self, event: Preempted, now_s: float) -> list[Action]:
        record = self._live(event.handoff)
        if record is None or record.lease is None:
            return []
        expires_s = record.lease.expires_s  # preemption is no sign of life of the target
        out = self._release(record, ReleaseReason.PREEMPTED, event.reason)
        record.state = SourceState.OPEN
        record.runs, record.seal = [], None
        record.runs_known = record.runs_pulled = 0
        self._tell(record, now_s, f"preempted ({event.reason})")
        out += self._open_lease(record, now_s, expires_s)
        return out + self._push(record, 0, now_s)

    def _on_revoked(self, event: Revoked, now_s: float) -> list[Action]:
        record = self._live(event.handoff)
        if record is None:
            return []
        return self._close(record, ReleaseReason.REVOKED, event.reason, now_s, gone="revoked")

    def _on_failed(self, event: Failed, now_s: float) -> list[Action]:
        record = self._live(event.handoff)
        if record is None:
            return []
        return self._close(record, ReleaseReason.FAILED, event.why, now_s, gone="failed")

    def _on_cancelled(self, event: Cancelled, now_s: float) -> list[Action]:
        record = self._records.get(event.handoff)
        if record is None:
            record = self._add(event.handoff, Incarnation(0), now_s, event.remaining_s)
        return self._close(record, ReleaseReason.CANCELLED, event.reason, now_s, gone="cancelled")

    # What the target says ------------------------------------------------------------------------------------------

    def _on_received(self, event: Received, now_s: float) -> list[Action]:
        message, peer = event.message, event.peer
        if message.target != peer or isinstance(message, State | Gone):
            self.counts["misaddressed"] += 1
            return []
        if message.source != self.incarnation:
            return [self._gone(message, now_s, "incarnation_changed")]
        record = self._records.get(message.handoff)
        if record is not None:
            if record.target != peer and record.target:
                return [self._gone(message, now_s, "not_the_target")]
            self._hear(record, message, now_s)
        match message:
            case Heartbeat():
                return self._on_heartbeat(record, message, now_s) if self._serving else []
            case Subscribe():
                return self._on_subscribe(record, message, peer, now_s) if self._serving else []
            case Ack():
                return self._on_ack(record, message, now_s)
            case Cancel():
                return self._on_cancel(record, message, peer, now_s)
            case Reserved() if record is not None:
                record.reserved = True
                self._arm(record)
        return []

    def _hear(self, record: SourceRecord, message: Message, now_s: float) -> None:
        """Note the target's tick, and let its echo renew the lease."""
        if message.sequence > record.heard_sequence:
            record.heard_sequence = message.sequence
            record.heard_tick_s = message.tick_s
        if record.lease is not None and self._serving:
            record.lease.renew(message.echo_s, now_s)

    def _on_subscribe(
        self, record: SourceRecord | None, message: Subscribe, peer: Incarnation, now_s: float
    ) -> list[Action]:
        if record is None:
            if self._per_peer[peer] >= self.settings.max_per_peer:
                return [self._gone(message, now_s, "busy")]
            record = self._add(message.handoff, peer, now_s, message.remaining_s, counted=True)
            record.subscribed = True
            self._hear(record, message, now_s)
        record.reserved = record.reserved or message.num_blocks > 0
        if record.state is SourceState.PARKED:
            record.prompt_digest = message.prompt_digest
            record.until_s = min(now_s + self.settings.lease_ttl_s, record.deadline_s + self.settings.lease_ttl_s)
        elif record.state is SourceState.RELEASED:
            return [self._gone(message, now_s, record.closed_as, record.closed_why)]
        elif message.prompt_digest != record.prompt_digest:
            record.subscribed = True
            return self._close(record, ReleaseReason.FAILED, OTHER_PROMPT, now_s, gone="prompt_mismatch")
        elif not record.subscribed:
            record.subscribed = True
            self._tell(record, now_s, "subscribed")
        self._arm(record)
        return self._push(record, 0, now_s)

    def _on_heartbeat(self, record: SourceRecord | None, message: Heartbeat, now_s: float) -> list[Action]:
        if record is None or record.state in (SourceState.PARKED, SourceState.RELEASED):
            if record is None or not record.closed_as:
                return [self._gone(message, now_s, "unknown")]
            return [self._gone(message, now_s, record.closed_as, record.closed_why)]
        first_run = 0
        if record.lease is not None and message.word == record.lease.word:
            first_run = max(0, min(message.runs_known, len(record.runs)))
            record.runs_known = max(record.runs_known, first_run)
            record.runs_pulled = max(record.runs_pulled, min(message.runs_pulled, len(record.runs)))
        self._arm(record)
        return self._push(record, first_run, now_s)

    def _on_ack(self, record: SourceRecord | None, message: Ack, now_s: float) -> list[Action]:
        if record is None:
            return [self._gone(message, now_s, "unknown")]
        if not self._names_lease(record, message.word):
            self.counts["stale_ack"] += 1
            return []
        record.subscribed = False  # it gets its answer below, once for each ack
        out = self._close(record, ReleaseReason.ACKED, None, now_s, gone="acked")
        return [*out, self._gone(message, now_s, record.closed_as)]

    def _on_cancel(self, record: SourceRecord | None, message: Cancel, peer: Incarnation, now_s: float) -> list[Action]:
        if record is None:
            # The cancel overtook its request: the tombstone keeps the request out when it comes.
            if self._per_peer[peer] >= self.settings.max_per_peer:
                self.counts["busy"] += 1
                return []
            record = self._add(message.handoff, peer, now_s, message.remaining_s, counted=True)
        record.subscribed = False  # it knows
        return self._close(record, ReleaseReason.CANCELLED, message.reason, now_s, gone="cancelled")

    def _on_peer_lost(self, event: PeerLost, now_s: float) -> list[Action]:
        out: list[Action] = []
        for record in [r for r in self._records.values() if r.target == event.peer and r.subscribed]:
            if record.state is SourceState.PARKED:
                self._forget(record)
            elif record.state is not SourceState.RELEASED:
                record.subscribed = False
                why = f"the connection to the decode instance was lost: {event.detail or event.cause}"
                out += self._close(record, ReleaseReason.FAILED, why, now_s, gone="failed")
        return out

    # Time ----------------------------------------------------------------------------------------------------------

    def _on_tick(self, event: Tick, now_s: float) -> list[Action]:
        out: list[Action] = []
        for record in self._due(now_s):
            if record.lease is None or record.state is SourceState.RELEASED:
                if record.until_s <= now_s:
                    self._forget(record)
                    continue
            elif record.lease.expires_s <= now_s:
                why = f"nothing was heard of the decode instance for {self.settings.lease_ttl_s:g} s, the lease's time"
                out += self._close(record, ReleaseReason.EXPIRED, why, now_s, gone="expired")
                continue
            self._arm(record)
        return out

    # Leases --------------------------------------------------------------------------------------------------------

    def _open_lease(self, record: SourceRecord, now_s: float, expires_s: float) -> list[Action]:
        ttl_s = self.settings.lease_ttl_s
        lease = Lease(
            self._free_slots.popleft(), self._new_word(), ttl_s=ttl_s, now_s=now_s, latest_s=record.deadline_s + ttl_s
        )
        lease.expires_s = min(expires_s, lease.latest_s)
        record.lease = lease
        self._arm(record)
        return [StoreWord(lease.slot, lease.word)]

    def _release(self, record: SourceRecord, reason: ReleaseReason, cause: str | None) -> list[Action]:
        lease = record.lease
        if lease is None or not self._claim(lease):
            return []
        self._free_slots.append(lease.slot)
        return [ZeroWord(lease.slot), ReleaseBlocks(record.handoff, lease.word, reason, cause)]

    def _claim(self, lease: Lease) -> bool:
        return lease.claim()

    def _names_lease(self, record: SourceRecord, word: Word) -> bool:
        """Whether an ack's word is that of the lease it would free (R10)."""
        return record.lease is not None and record.lease.word == word

    def _close(
        self, record: SourceRecord, reason: ReleaseReason, cause: str | None, now_s: float, *, gone: str
    ) -> list[Action]:
        """Release the blocks, tell a subscribed target, and leave a tombstone until deadline + lease."""
        out = self._release(record, reason, cause)
        if record.state is not SourceState.RELEASED:
            record.state = SourceState.RELEASED
            record.closed_as, record.closed_why = gone, cause or ""
            record.runs, record.seal = [], None
            record.until_s = record.deadline_s + self.settings.lease_ttl_s
            self._tell(record, now_s, f"released: {reason}" + (f" ({cause})" if cause else ""))
        if record.subscribed:
            record.subscribed = False
            out.append(Send(record.target, self._gone_message(record, now_s)))
        self._entomb(record)
        return out

    def _entomb(self, record: SourceRecord) -> None:
        """Keep the closed record, so that late copies of its messages find it closed (R11)."""
        self._arm(record)
