"""Nodes of unequal tensor-parallel ranks: the shared heads arrive, and a byte that changed on the way is found."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from kvferry.handoff.digests import DigestKind
from kvferry.handoff.node import HandoffNode
from kvferry.layout import Fingerprint, HeadGrid, KVLayout, LayerLayout, block_offsets, head_vectors
from kvferry.protocol.lease import HandoffSettings
from kvferry.types import HandoffTicket, InstanceRef, Outcome, TerminalState, new_handoff_id

LAYERS, HEADS, TOKENS, VECTOR, BLOCKS = 2, 4, 8, 16, 6
FINGERPRINT = Fingerprint("m", "float32", TOKENS, LAYERS, HEADS, VECTOR // 4)
SETTINGS = HandoffSettings(lease_ttl_s=60.0, heartbeat_s=0.2, stall_grace_s=0.1, drain_s=1.0, ack_interval_s=0.1)
PROMPT, REMAINING_S = b"prompt", 60.0
SOURCE_IDS, TARGET_IDS = [4, 1, 5], [0, 3, 2]


class Rank:
    def __init__(self, order: str, rank: int, size: int, digest: DigestKind) -> None:
        self.node = HandoffNode(
            instance_id=f"{rank}-of-{size}", fingerprint=FINGERPRINT, settings=SETTINGS, secret=b"k" * 32, digest=digest
        )
        heads = HEADS // size
        part = heads * TOKENS * VECTOR
        strides = (TOKENS * VECTOR, VECTOR) if order == "HND" else (VECTOR, heads * VECTOR)
        layers = tuple(LayerLayout(0, i * BLOCKS * 2 * part, 2 * part) for i in range(LAYERS))
        grid = HeadGrid((0, part), *strides, VECTOR)
        self.layout = KVLayout(BLOCKS, TOKENS, 2 * part, heads, layers, grid, tp_rank=rank, tp_size=size)
        self.memory = self.node.allocate(LAYERS * BLOCKS * 2 * part)
        self.memory[:] = np.random.default_rng([rank, size]).integers(0, 256, self.memory.size, dtype=np.uint8)
        self.node.start(self.layout)

    def vectors(self, block_ids: list[int], heads: range) -> np.ndarray:
        """uint8 [layers, blocks, parts * heads * tokens, VECTOR]."""
        assert self.layout.grid is not None
        inside = head_vectors(self.layout, self.layout.grid, heads)
        at = np.stack([block_offsets(self.layout, layer, block_ids)[:, None] + inside for layer in range(LAYERS)])
        return self.memory[at[..., None] + np.arange(VECTOR)]

    @property
    def ref(self) -> InstanceRef:
        return InstanceRef(self.node.instance_id, self.node.incarnation, (self.node.address,))

    def ended(self) -> Outcome:
        until_s = time.monotonic() + REMAINING_S
        while not (found := self.node.outcomes()):
            assert time.monotonic() < until_s, self.node.views()
            time.sleep(0.005)
        return found[0]

    def close(self) -> None:
        self.node.check_integrity()
        self.node.close()
        del self.memory


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> Iterator[tuple[Rank, Rank]]:
    digest, (source, target) = request.param
    with ExitStack() as stack:
        made = Rank("NHD", *source, digest), Rank("HND", *target, digest)
        for rank in made:
            stack.callback(rank.close)
        yield made


def hand_over(source: Rank, target: Rank, *, flip: int | None) -> Outcome:
    """Three blocks; one bit of one byte of the source's changes after it was published."""
    ticket = HandoffTicket(new_handoff_id(), "target", source.ref, target.ref, REMAINING_S)
    slice_ = target.layout.tp_rank, target.layout.tp_size
    source.node.offer(ticket, PROMPT, len(SOURCE_IDS), target=slice_)
    source.node.publish(ticket.handoff, range(LAYERS), 0, SOURCE_IDS)
    source.node.seal(ticket.handoff)
    if flip is not None:
        source.memory[flip] ^= 4
    target.node.drop_select(ticket, PROMPT, 0, TARGET_IDS)
    outcome, until_s = target.ended(), time.monotonic() + REMAINING_S
    while not source.node.released():
        assert time.monotonic() < until_s, source.node.views()
        time.sleep(0.005)
    assert not source.node._heads, "what was kept for this handoff alone is gone with it"
    return outcome


BOTH = [(digest, ranks) for digest in ("xxh3", "sum") for ranks in (((0, 1), (1, 2)), ((1, 2), (0, 1)))]


def named(param: Any) -> str:
    digest, (source, target) = param
    return f"{digest}-{source[1]}-to-{target[1]}"


@pytest.mark.parametrize("ranks", BOTH, ids=named, indirect=True)
def test_shared_heads_arrive_and_a_changed_byte_is_found(ranks: tuple[Rank, Rank]) -> None:
    source, target = ranks
    outcome = hand_over(source, target, flip=None)
    assert outcome.state is TerminalState.DELIVERED, outcome
    shared = range(HEADS // 2, HEADS)
    assert (target.vectors(TARGET_IDS, shared) == source.vectors(SOURCE_IDS, shared)).all()

    assert source.layout.grid is not None
    last = head_vectors(source.layout, source.layout.grid, shared)[-1]
    flip = int(block_offsets(source.layout, 1, [SOURCE_IDS[1]])[0] + last) + 3
    outcome = hand_over(source, target, flip=flip)
    assert (outcome.state, outcome.cause) == (TerminalState.RECOMPUTED, "integrity_error"), outcome
    assert "block 1 of the prompt" in (outcome.detail or "")


@pytest.mark.parametrize("ranks", [("xxh3", ((0, 1), (1, 2)))], ids=named, indirect=True)
def test_what_the_target_does_not_take_does_not_matter(ranks: tuple[Rank, Rank]) -> None:
    source, target = ranks
    assert source.layout.grid is not None
    other = head_vectors(source.layout, source.layout.grid, range(0, 1))[0]
    flip = int(block_offsets(source.layout, 1, [SOURCE_IDS[1]])[0] + other)
    assert hand_over(source, target, flip=flip).state is TerminalState.DELIVERED
