"""Messages on the wire: round trips, runs, manifests."""

from __future__ import annotations

import numpy as np
import pytest

from kvferry.errors import WireError
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
from kvferry.types import HandoffId, Incarnation, Word
from kvferry.wire import Codec

HEAD = {
    "handoff": HandoffId("00" * 16),
    "source": Incarnation((1 << 63) - 1),
    "target": Incarnation(2),
    "attempt": 1,
    "sequence": 9,
    "tick_s": 1.5,
    "echo_s": 0.25,
    "remaining_s": 3.0,
}
RUN = Run.of(range(2, 4), 5, [7, 70_000, 3], b"digest")
CODEC: Codec[Message] = Codec(Message)


@pytest.mark.parametrize(
    "message",
    [
        Subscribe(prompt_digest=b"p", first_block=1, num_blocks=2, **HEAD),
        Reserved(first_block=1, num_blocks=2, **HEAD),
        Heartbeat(word=Word((1 << 63) - 1), runs_known=3, runs_pulled=2, **HEAD),
        State(word=Word(5), slot=3, first_run=1, runs=(RUN, RUN), seal=Manifest(3, 4, b"m"), **HEAD),
        State(word=Word(0), **(HEAD | {"echo_s": None})),
        Ack(word=Word(5), **HEAD),
        Cancel(reason="aborted", **HEAD),
        Gone(reason="expired", detail="why", **HEAD),
    ],
    ids=lambda message: type(message).__name__,
)
def test_each_message_survives_the_wire(message: Message) -> None:
    assert CODEC.decode(CODEC.encode(message)) == message


def test_a_message_without_its_handoff_is_none() -> None:
    other: Codec[dict[str, object]] = Codec()
    with pytest.raises(WireError):
        CODEC.decode(other.encode({"type": "ack", "word": 5}))


def test_a_run_gives_its_block_ids_back_as_an_array() -> None:
    assert RUN.num_blocks == 3 and RUN.layers == range(2, 4)
    assert RUN.block_ids.dtype == np.int64
    np.testing.assert_array_equal(RUN.block_ids, [7, 70_000, 3])


@pytest.mark.parametrize(
    "other",
    [
        Run.of(range(2, 3), 5, [7, 8], b"digest"),
        Run.of(range(1, 4), 5, [7, 8], b"digest"),
        Run.of(range(2, 4), 6, [7, 8], b"digest"),
        Run.of(range(2, 4), 5, [7, 8, 9], b"digest"),
        Run.of(range(2, 4), 5, [7, 8], b"digesT"),
    ],
)
def test_the_manifest_tells_apart_what_lies_where(other: Run) -> None:
    run = Run.of(range(2, 4), 5, [7, 8], b"digest")
    assert manifest_digest([run]) != manifest_digest([other])
    assert manifest_digest([run, other]) != manifest_digest([other, run])


def test_the_manifest_does_not_depend_on_where_the_source_keeps_its_blocks() -> None:
    assert manifest_digest([Run.of(range(1), 0, [1, 2])]) == manifest_digest([Run.of(range(1), 0, [5, 9])])
