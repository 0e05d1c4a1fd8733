"""What the two tables keep, and what they say: records, one timer each, messages, views.

The transitions, which are the protocol itself, are in `source` and `target`.
"""

from __future__ import annotations

import enum
import itertools
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from kvferry.errors import InvalidTransition
from kvferry.protocol.events import Action, Send, Serving, Stalled
from kvferry.protocol.lease import HandoffSettings, Timers
from kvferry.protocol.membership import HandoffView
from kvferry.protocol.messages import NO_WORD, Ack, Cancel, Gone, Heartbeat, Message, State, Subscribe
from kvferry.protocol.records import (
    CLOSED_STATES,
    NEVER_S,
    SourceRecord,
    SourceState,
    Story,
    TargetRecord,
)
from kvferry.types import HandoffId, HandoffTicket, Incarnation, Word


class _Record(Protocol):
    @property
    def handoff(self) -> HandoffId: ...
    @property
    def state(self) -> enum.StrEnum: ...
    @property
    def story(self) -> Story: ...


R = TypeVar("R", bound=_Record)


class HandoffTable(Generic[R]):
    """The records of one side, one timer for each. Not thread-safe: one owner calls it."""

    side: str = ""

    def __init__(self, incarnation: Incarnation, settings: HandoffSettings) -> None:
        self.incarnation = incarnation
        self.settings = settings
        self.counts: Counter[str] = Counter()
        self._records: dict[HandoffId, R] = {}
        self._timers: Timers[HandoffId] = Timers()
        self._sequence = itertools.count(1)
        self._hold_until_s = -NEVER_S
        self._serving = True
        self._handlers: dict[type, Callable[[Any, float], list[Action]]] = {
            Stalled: self._on_stalled,
            Serving: self._on_serving,
        }

    def next_timer_s(self) -> float | None:
        """When to give the next `Tick`, on the clock of `now_s`; None while nothing waits."""
        at_s = self._timers.next_s()
        return None if at_s is None else max(at_s, self._hold_until_s)

    def __len__(self) -> int:
        """Handoffs that are kept here, tombstones included."""
        return len(self._records)

    def _due(self, now_s: float) -> list[R]:
        """The records whose time has come; none while messages that waited through a stall are still being read."""
        if now_s < self._hold_until_s:
            return []
        return [self._records[handoff] for handoff in self._timers.due(now_s)]

    def _on_stalled(self, event: Stalled, now_s: float) -> list[Action]:
        self._hold_until_s = now_s + self.settings.stall_grace_s
        return []

    def _on_serving(self, event: Serving, now_s: float) -> list[Action]:
        self._serving = event.alive
        return []

    def _tell(self, record: R, now_s: float, what: str) -> None:
        record.story.append((now_s, what))

    def _invalid(self, record: R, event: str) -> InvalidTransition:
        story = tuple(f"{at_s:.3f} s: {what}" for at_s, what in record.story)
        return InvalidTransition(f"handoff {record.handoff} at the {self.side}", str(record.state), event, story)


class SourceTable(HandoffTable[SourceRecord]):
    """The records of the source."""

    side = "source"

    def __init__(self, incarnation: Incarnation, settings: HandoffSettings) -> None:
        super().__init__(incarnation, settings)
        self._free_slots: deque[int] = deque(range(settings.num_slots))
        self._per_peer: Counter[Incarnation] = Counter()

    def _arm(self, record: SourceRecord) -> None:
        """Set the one timer that this record needs in its state."""
        if record.lease is None or record.state is SourceState.RELEASED:
            self._timers.set(record.handoff, record.until_s)
        else:
            self._timers.set(record.handoff, record.lease.expires_s)

    # Records -------------------------------------------------------------------------------------------------------

    def _add(
        self, handoff: HandoffId, target: Incarnation, now_s: float, remaining_s: float, *, counted: bool = False
    ) -> SourceRecord:
        """A new entry, parked for a lease at most; `counted` if a peer made it and its bound must hold."""
        if handoff in self._records:
            self._forget(self._records[handoff])
        deadline_s = now_s + self.settings.bounded_s(remaining_s)
        record = SourceRecord(handoff, target, now_s, deadline_s, now_s)
        self._records[handoff] = record
        if counted:
            record.counted_peer = target
            self._per_peer[target] += 1
        self._tell(record, now_s, "added")
        return record

    def _forget(self, record: SourceRecord) -> None:
        self._uncount(record)
        self._timers.drop(record.handoff)
        del self._records[record.handoff]

    def _uncount(self, record: SourceRecord) -> None:
        if record.counted_peer is not None:
            self._per_peer[record.counted_peer] -= 1
            if not self._per_peer[record.counted_peer]:
                del self._per_peer[record.counted_peer]
            record.counted_peer = None

    def _live(self, handoff: HandoffId) -> SourceRecord | None:
        record = self._records.get(handoff)
        if record is None or record.state in (SourceState.PARKED, SourceState.RELEASED):
            return None
        return record

    # Messages ------------------------------------------------------------------------------------------------------

    def _push(self, record: SourceRecord, first_run: int, now_s: float) -> list[Action]:
        """The state from `first_run` on, if the target has asked for this handoff."""
        if not record.subscribed:
            return []
        lease = record.lease
        state = State(
            handoff=record.handoff,
            source=self.incarnation,
            target=record.target,
            attempt=record.attempt,
            sequence=next(self._sequence),
            tick_s=now_s,
            echo_s=record.heard_tick_s,
            remaining_s=max(0.0, (record.until_s if lease is None else lease.expires_s) - now_s),
            word=NO_WORD if lease is None else lease.word,
            slot=0 if lease is None else lease.slot,
            first_run=first_run,
            runs=tuple(record.runs[first_run:]),
            seal=record.seal,
        )
        return [Send(record.target, state)]

    def _gone(self, asked: Message, now_s: float, reason: str, detail: str = "") -> Send:
        """The answer to a message about something that is not here."""
        self.counts[reason] += 1
        gone = Gone(
            handoff=asked.handoff,
            source=asked.source,
            target=asked.target,
            attempt=asked.attempt,
            sequence=next(self._sequence),
            tick_s=now_s,
            echo_s=asked.tick_s,
            reason=reason,
            detail=detail,
        )
        return Send(asked.target, gone)

    def _gone_message(self, record: SourceRecord, now_s: float) -> Gone:
        return Gone(
            handoff=record.handoff,
            source=self.incarnation,
            target=record.target,
            attempt=record.attempt,
            sequence=next(self._sequence),
            tick_s=now_s,
            echo_s=record.heard_tick_s,
            reason=record.closed_as,
            detail=record.closed_why,
        )

    # Looking in ----------------------------------------------------------------------------------------------------

    def pressure_order(self) -> list[HandoffId]:
        """Whom to take blocks from first: unsubscribed, then the slowest; never one that computes."""
        sealed = [r for r in self._records.values() if r.state is SourceState.SEALED]
        sealed.sort(key=lambda r: (r.subscribed, r.reserved, r.runs_pulled / max(1, len(r.runs)), r.opened_s))
        return [r.handoff for r in sealed]

    def views(self, now_s: float) -> list[HandoffView]:
        """All open or parked handoffs, for reports."""
        return [
            HandoffView(
                handoff=r.handoff,
                side="source",
                stage=r.state,
                age_s=now_s - r.opened_s,
                remaining_s=r.deadline_s - now_s,
                peer=f"{r.target:x}",
                detail=f"{len(r.runs)} runs published, {r.runs_pulled} pulled"
                + ("" if r.subscribed else ", not subscribed"),
            )
            for r in self._records.values()
            if r.state is not SourceState.RELEASED
        ]

    def check_integrity(self) -> None:
        """Raises: InvalidTransition if a slot is lost or held twice, or a record waits without a timer (I9)."""
        held = [r.lease.slot for r in self._records.values() if r.lease is not None and not r.lease.claimed]
        slots = sorted([*held, *self._free_slots])
        if slots != list(range(self.settings.num_slots)):
            raise InvalidTransition(
                "the source's word slots", f"{len(held)} held, {len(self._free_slots)} free", "check"
            )
        for record in self._records.values():
            if record.handoff not in self._timers:
                raise self._invalid(record, "waiting without a timer")


class TargetTable(HandoffTable[TargetRecord]):
    """The records of the target."""

    side = "target"

    def __init__(self, incarnation: Incarnation, settings: HandoffSettings, num_layers: int) -> None:
        super().__init__(incarnation, settings)
        self.num_layers = num_layers

    def _arm(self, record: TargetRecord) -> None:
        """Set the one timer that this record needs in its state."""
        if record.handoff not in self._records:
            return
        if record.state in CLOSED_STATES:
            at_s = min(record.until_s, record.beat_s) if record.acks_left else record.until_s
        elif record.ending is not None:
            at_s = record.drain_by_s
        else:
            at_s = min(record.deadline_s, record.lapse_s, record.beat_s, record.drain_by_s)
        if at_s == NEVER_S:
            self._timers.drop(record.handoff)  # quarantined: only the end of its reads can move it
        else:
            self._timers.set(record.handoff, at_s)

    # Records -------------------------------------------------------------------------------------------------------

    def _add(self, ticket: HandoffTicket, prompt_digest: bytes, now_s: float, remaining_s: float) -> TargetRecord:
        ttl_s = self.settings.lease_ttl_s
        deadline_s = now_s + self.settings.bounded_s(remaining_s)
        record = TargetRecord(ticket, prompt_digest, now_s, deadline_s, now_s + ttl_s, deadline_s + ttl_s)
        record.covered = [0] * self.num_layers
        self._records[ticket.handoff] = record
        self._tell(record, now_s, "opened")
        return record

    def _open_record(self, handoff: HandoffId) -> TargetRecord | None:
        record = self._records.get(handoff)
        return None if record is None or record.ending is not None else record

    def _forget(self, record: TargetRecord) -> None:
        self._timers.drop(record.handoff)
        del self._records[record.handoff]

    # Messages ------------------------------------------------------------------------------------------------------

    def _beat(self, record: TargetRecord, now_s: float) -> list[Action]:
        """Speak up: `Subscribe` until the source has named a word, `Heartbeat` from then on."""
        record.beat_s = now_s + self.settings.heartbeat_s
        self._arm(record)
        if not self._serving or not record.connected:
            return []
        head = self._head(record, now_s)
        if record.word == NO_WORD:
            subscribe = Subscribe(
                prompt_digest=record.prompt_digest,
                first_block=record.first_block,
                num_blocks=record.num_blocks,
                **head,
            )
            return [Send(record.source, subscribe)]
        beat = Heartbeat(word=record.word, runs_known=len(record.runs), runs_pulled=record.num_done, **head)
        return [Send(record.source, beat)]

    def _ack(self, record: TargetRecord, now_s: float) -> Send:
        return Send(record.source, Ack(word=record.word, **self._head(record, now_s)))

    def _cancel(self, record: TargetRecord, now_s: float, reason: str) -> Send:
        return Send(record.source, Cancel(reason=reason, **self._head(record, now_s)))

    def _head(self, record: TargetRecord, now_s: float) -> dict[str, Any]:
        """The fields that every message of this side carries."""
        return {
            "handoff": record.handoff,
            "source": record.source,
            "target": self.incarnation,
            "attempt": record.ticket.attempt,
            "sequence": next(self._sequence),
            "tick_s": now_s,
            "echo_s": record.heard_tick_s,
            "remaining_s": max(0.0, record.deadline_s - now_s),
        }

    # Looking in ----------------------------------------------------------------------------------------------------

    def views(self, now_s: float) -> list[HandoffView]:
        """All handoffs that have not ended, for reports."""
        return [
            HandoffView(
                handoff=r.handoff,
                side="target",
                stage=r.state,
                age_s=now_s - r.opened_s,
                remaining_s=r.deadline_s - now_s,
                peer=r.ticket.source.instance_id,
                detail=f"{r.num_done} runs pulled of {len(r.runs)} known, {len(r.reads)} reads under way",
            )
            for r in self._records.values()
            if r.state not in CLOSED_STATES
        ]

    def progress(self, handoff: HandoffId) -> tuple[Word, int, int] | None:
        """(word, runs known, runs pulled) of a handoff that has not ended; None otherwise."""
        record = self._records.get(handoff)
        if record is None or record.state in CLOSED_STATES:
            return None
        return record.word, len(record.runs), record.num_done

    def check_integrity(self) -> None:
        """Raises: InvalidTransition if a record waits without a timer and without a read under way (I9)."""
        for record in self._records.values():
            if record.handoff not in self._timers and not record.reads:
                raise self._invalid(record, "waiting without a timer")
