"""A peer that knows the secret and lies: no message may raise, break a table, or keep anything for ever."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from kvferry.protocol.events import (
    Connected,
    Offered,
    Published,
    Queued,
    ReadFailed,
    Received,
    ReleaseBlocks,
    Sealed,
    Selected,
    StartRead,
    Tick,
)
from kvferry.protocol.lease import HandoffSettings
from kvferry.protocol.messages import (
    Ack,
    Cancel,
    Gone,
    Heartbeat,
    Manifest,
    Message,
    Reserved,
    Run,
    State,
    Subscribe,
    manifest_digest,
)
from kvferry.protocol.source import SourceHandoffs
from kvferry.protocol.target import TargetHandoffs
from kvferry.types import HandoffId, HandoffTicket, Incarnation, InstanceRef, Word

P, D = Incarnation(11), Incarnation(22)
IDS = [HandoffId(f"{n:032x}") for n in range(4)]
SETTINGS = HandoffSettings(max_per_peer=2, num_slots=3, max_remaining_s=30.0)
TIMES = (0.0, -1.0, 1e308, math.inf, -math.inf, math.nan, 1.0, 5.0)
COUNTS = (0, 1, 2, 3, -1, 1 << 62, -(1 << 62))
KINDS: tuple[type[Message], ...] = (Subscribe, Reserved, Heartbeat, State, Ack, Cancel, Gone)


def message(rng: random.Random, words: list[int]) -> Message:
    """Any message, its fields well-typed and otherwise anything."""
    kind = rng.choice(KINDS)
    runs = tuple(
        Run(rng.choice(COUNTS[:5]), rng.choice(COUNTS[:5]), rng.choice(COUNTS), b"\0" * 8 * rng.randrange(4), b"d")
        for _ in range(rng.randrange(3))
    )
    values: dict[str, Any] = {
        "handoff": rng.choice(IDS),
        "source": P,
        "target": D,
        "attempt": rng.choice(COUNTS),
        "sequence": rng.choice((*COUNTS, *range(10, 30))),
        "tick_s": rng.choice(TIMES),
        "echo_s": rng.choice((None, *TIMES)),
        "remaining_s": rng.choice(TIMES),
        "prompt_digest": rng.choice((b"prompt", b"other", b"")),
        "first_block": rng.choice(COUNTS),
        "num_blocks": rng.choice(COUNTS),
        "word": Word(rng.choice((0, 1, -5, *words))),
        "runs_known": rng.choice(COUNTS),
        "runs_pulled": rng.choice(COUNTS),
        "slot": rng.choice(COUNTS),
        "first_run": rng.choice(COUNTS),
        "runs": runs,
        "seal": rng.choice((None, Manifest(rng.choice(COUNTS), 2, manifest_digest(runs)))),
        "reason": rng.choice(("busy", "expired", "")),
    }
    return kind(**{k: v for k, v in values.items() if k in kind.__struct_fields__})  # type: ignore[no-any-return]


def ticket(handoff: HandoffId) -> HandoffTicket:
    return HandoffTicket(handoff, "source", InstanceRef("p", P), InstanceRef("d", D), 4.0)


def require_sane_timer(at_s: float | None, now_s: float) -> None:
    assert at_s is None or now_s - 10 < at_s <= now_s + SETTINGS.max_remaining_s + SETTINGS.lease_ttl_s


@pytest.mark.parametrize("seed", range(12))
def test_the_source_survives_any_message(seed: int) -> None:
    rng = random.Random(seed)
    words: list[int] = []

    def draw() -> Word:
        words.append(rng.getrandbits(62) | 1)
        return Word(words[-1])

    table = SourceHandoffs(P, SETTINGS, draw)
    table.handle(Offered(ticket(IDS[0]), b"prompt", 2), 0.0)
    table.handle(Published(IDS[0], Run.of(range(2), 0, [1, 2])), 0.0)
    table.handle(Sealed(IDS[0]), 0.0)
    table.handle(Offered(ticket(IDS[1]), b"prompt", 2), 0.0)
    released: list[Word] = []
    now_s = 0.0
    for _ in range(200):
        now_s += rng.random() * 0.03
        event = rng.choice((Received(D, message(rng, words)), Tick()))
        released += [a.word for a in table.handle(event, now_s) if isinstance(a, ReleaseBlocks)]
        table.check_integrity()
        require_sane_timer(table.next_timer_s(), now_s)
    released += [a.word for a in table.handle(Tick(), 60.0) if isinstance(a, ReleaseBlocks)]
    table.handle(Tick(), 120.0)
    assert sorted(released) == sorted(words) and len(table) == 0


@pytest.mark.parametrize("seed", range(12))
def test_the_target_survives_any_message(seed: int) -> None:
    rng = random.Random(seed)
    table = TargetHandoffs(D, SETTINGS, 2)
    table.handle(Selected(ticket(IDS[0]), b"prompt", 0, 2), 0.0)
    table.handle(Selected(ticket(IDS[1]), b"prompt", 1, 3), 0.0)
    table.handle(Queued(ticket(IDS[2]), b"prompt"), 0.0)
    for handoff in IDS[:3]:
        table.handle(Connected(handoff, P), 0.0)
    reads: list[StartRead] = []
    now_s = 0.0
    for _ in range(200):
        now_s += rng.random() * 0.03
        event: Any = rng.choice((Received(P, message(rng, [7, 8])), Tick()))
        if reads and rng.random() < 0.2:
            read = reads.pop()
            event = ReadFailed(read.handoff, read.read_id, rng.choice(("lease_expired", "peer_gone")))
        actions = table.handle(event, now_s)
        reads += [a for a in actions if isinstance(a, StartRead)]
        for read in reads:
            assert set(read.run.layers) <= {0, 1}
        table.check_integrity()
        require_sane_timer(table.next_timer_s(), now_s)
    for read in reads:
        table.handle(ReadFailed(read.handoff, read.read_id, "handoff_aborted"), 50.0)
    for now_s in (60.0, 120.0):
        table.handle(Tick(), now_s)
    assert len(table) == 0 and table.views(120.0) == []
