"""Two nodes, real sockets and shared memory: what is published arrives, and nothing else is ever taken for it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from kvferry.clock import RealClock
from kvferry.errors import ConfigError, TransferUnfinished
from kvferry.handoff.node import HandoffNode, Released
from kvferry.layout import PROTOCOL_VERSION, Fingerprint, KVLayout, LayerLayout, block_offsets
from kvferry.protocol.events import ReleaseReason
from kvferry.protocol.lease import HandoffSettings
from kvferry.protocol.membership import HandoffView
from kvferry.transfer import TransferSettings
from kvferry.transport import registry
from kvferry.transport.base import BlockList, Guard, RemoteRegion, StopToken
from kvferry.transport.checksum import sums_of_blocks
from kvferry.transport.shm import ShmLink, ShmTransport
from kvferry.types import HandoffId, HandoffTicket, InstanceRef, Outcome, TerminalState, new_handoff_id

LAYERS, BLOCKS, BLOCK_BYTES = 3, 32, 512
FINGERPRINT = Fingerprint(model="m", dtype="float32", block_size=16, num_layers=LAYERS, num_kv_heads=2, head_size=4)
# A process may get no CPU for seconds: a lease runs out in a test only where its end is what the test is about.
PATIENT = HandoffSettings(lease_ttl_s=60.0, heartbeat_s=0.2, stall_grace_s=0.1, drain_s=1.0, ack_interval_s=0.1)
HASTY = HandoffSettings(lease_ttl_s=0.9, heartbeat_s=0.2, stall_grace_s=0.1, drain_s=1.0, ack_interval_s=0.1)
REMAINING_S = 60.0
SLACK_S = 20.0
DIGEST = b"prompt" * 5
SECRET = b"k" * 32


class Instance:
    """A node with host memory that a test can look into."""

    def __init__(self, name: str, **options: Any) -> None:
        options = {"settings": PATIENT, "secret": SECRET, "fingerprint": FINGERPRINT, **options}
        self.node = HandoffNode(instance_id=name, **options)
        self.memory = self.node.allocate(LAYERS * BLOCKS * BLOCK_BYTES)
        self.memory[:] = np.random.default_rng(len(name)).integers(0, 256, self.memory.size, dtype=np.uint8)
        layers = tuple(LayerLayout(0, i * BLOCKS * BLOCK_BYTES, BLOCK_BYTES) for i in range(LAYERS))
        self.layout = KVLayout(BLOCKS, 16, BLOCK_BYTES, 2, layers)
        self.node.start(self.layout)
        self.seen_released: list[Released] = []
        self.seen_outcomes: list[Outcome] = []

    def close(self) -> None:
        self.node.close()
        del self.memory

    @property
    def ref(self) -> InstanceRef:
        return InstanceRef(self.node.instance_id, self.node.incarnation, (self.node.address,))

    def block(self, layer: int, block_id: int) -> bytes:
        at = int(block_offsets(self.layout, layer, [block_id])[0])
        return self.memory[at : at + BLOCK_BYTES].tobytes()

    def released(self, handoff: HandoffId, timeout_s: float = REMAINING_S) -> Released:
        return self._await(self.seen_released, self.node.released, handoff, timeout_s)

    def outcome(self, handoff: HandoffId, timeout_s: float = REMAINING_S) -> Outcome:
        return self._await(self.seen_outcomes, self.node.outcomes, handoff, timeout_s)

    def _await(self, seen: list[Any], poll: Callable[[], list[Any]], handoff: HandoffId, timeout_s: float) -> Any:
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            seen += poll()
            found = [x for x in seen if x.handoff == handoff]
            if found:
                return found[0]
            time.sleep(0.005)
        raise AssertionError(f"nothing about {handoff} within {timeout_s} s; open: {self.node.views()}")

    def until(self, seen: Callable[[HandoffView], bool]) -> None:
        """Return when it holds of an open handoff here."""
        end = time.monotonic() + REMAINING_S
        while not any(seen(view) for view in self.node.views()):
            assert time.monotonic() < end, f"it holds of none: {self.node.views()}"
            time.sleep(0.005)


def subscribed(view: HandoffView) -> bool:
    """Whether the source has heard of the target's request."""
    return "not subscribed" not in view.detail


def two_instances(settings: HandoffSettings) -> Iterator[tuple[Instance, Instance]]:
    """A source and a target, of which neither has lost anything in the end."""
    source, target = Instance("source", settings=settings), Instance("a-target", settings=settings)
    yield source, target
    for instance in (source, target):
        instance.node.check_integrity()
        instance.close()


@pytest.fixture
def pair() -> Iterator[tuple[Instance, Instance]]:
    yield from two_instances(PATIENT)


@pytest.fixture
def hasty_pair() -> Iterator[tuple[Instance, Instance]]:
    yield from two_instances(HASTY)


def ticket(source: Instance, target: Instance, remaining_s: float = REMAINING_S) -> HandoffTicket:
    return HandoffTicket(new_handoff_id(), "target", source.ref, target.ref, remaining_s)


def publish_all(source: Instance, handoff: HandoffId, block_ids: list[int]) -> None:
    for layer in range(LAYERS):
        source.node.publish(handoff, range(layer, layer + 1), 0, block_ids)
    source.node.seal(handoff)


def assert_delivered(
    source: Instance, target: Instance, handoff: HandoffId, source_ids: list[int], target_ids: list[int]
) -> None:
    outcome = target.outcome(handoff)
    assert outcome.state is TerminalState.DELIVERED, outcome
    assert outcome.bytes_moved == LAYERS * len(source_ids) * BLOCK_BYTES
    for layer in range(LAYERS):
        for s, t in zip(source_ids, target_ids, strict=True):
            assert target.block(layer, t) == source.block(layer, s)
    assert source.released(handoff).reason is ReleaseReason.ACKED


def test_what_is_published_arrives_and_the_source_lets_go(pair: tuple[Instance, Instance]) -> None:
    source, target = pair
    untouched = {b: [target.block(layer, b) for layer in range(LAYERS)] for b in range(BLOCKS) if b not in (9, 2, 4)}
    one = ticket(source, target)
    source.node.offer(one, DIGEST, 3)
    target.node.drop_select(one, DIGEST, 0, [9, 2, 4])
    publish_all(source, one.handoff, [5, 30, 7])
    assert_delivered(source, target, one.handoff, [5, 30, 7], [9, 2, 4])
    assert {b: [target.block(layer, b) for layer in range(LAYERS)] for b in untouched} == untouched
    assert not source.node.views() or all(v.stage == "released" for v in source.node.views())


@pytest.mark.parametrize("transports", [("shm",), ("tcp",)])
def test_each_transport_alone_serves(transports: tuple[str, ...]) -> None:
    source, target = Instance("source", transports=transports), Instance("a-target", transports=transports)
    one = ticket(source, target)
    target.node.drop_select(one, DIGEST, 0, [1, 2])
    source.node.offer(one, DIGEST, 2)
    publish_all(source, one.handoff, [3, 4])
    outcome = target.outcome(one.handoff)
    assert outcome.state is TerminalState.DELIVERED
    assert outcome.transport == transports[0]
    for instance in (source, target):
        instance.close()


def test_the_target_may_come_first_and_is_parked(pair: tuple[Instance, Instance]) -> None:
    source, target = pair
    one = ticket(source, target)
    target.node.drop_select(one, DIGEST, 0, [1])
    source.until(lambda view: view.stage == "parked")
    source.node.offer(one, DIGEST, 1)
    publish_all(source, one.handoff, [8])
    assert_delivered(source, target, one.handoff, [8], [1])


def test_only_what_the_target_lacks_is_pulled(pair: tuple[Instance, Instance]) -> None:
    source, target = pair
    one = ticket(source, target)
    source.node.offer(one, DIGEST, 4)
    target.node.drop_select(one, DIGEST, 2, [20])
    publish_all(source, one.handoff, [5, 6, 7, 8])
    outcome = target.outcome(one.handoff)
    assert (outcome.state, outcome.bytes_moved) == (TerminalState.DELIVERED, LAYERS * BLOCK_BYTES)
    assert [target.block(layer, 20) for layer in range(LAYERS)] == [source.block(layer, 7) for layer in range(LAYERS)]
    assert source.released(one.handoff).reason is ReleaseReason.ACKED


def test_a_target_that_has_everything_lets_the_source_go(pair: tuple[Instance, Instance]) -> None:
    source, target = pair
    one = ticket(source, target)
    source.node.offer(one, DIGEST, 1)
    target.node.drop_select(one, DIGEST, 1, [])
    outcome = target.outcome(one.handoff)
    assert (outcome.state, outcome.bytes_moved) == (TerminalState.DELIVERED, 0)
    released = source.released(one.handoff)
    assert (released.reason, released.cause) == (ReleaseReason.CANCELLED, "not_needed")


def test_a_source_that_never_hears_of_the_request_costs_the_deadline_and_no_more(
    hasty_pair: tuple[Instance, Instance],
) -> None:
    source, target = hasty_pair
    one, began_s = ticket(source, target, remaining_s=0.8), time.monotonic()
    target.node.drop_select(one, DIGEST, 0, [1])
    outcome = target.outcome(one.handoff)
    assert outcome.state is TerminalState.RECOMPUTED
    assert outcome.stage == "waiting"
    assert outcome.cause
    assert time.monotonic() - began_s < 0.8 + HASTY.lease_ttl_s + SLACK_S


def test_a_target_that_never_comes_does_not_hold_the_source(hasty_pair: tuple[Instance, Instance]) -> None:
    source, target = hasty_pair
    one = ticket(source, target)
    source.node.offer(one, DIGEST, 1)
    publish_all(source, one.handoff, [3])
    assert source.released(one.handoff).reason is ReleaseReason.EXPIRED


def test_another_prompt_under_the_same_id_is_refused(pair: tuple[Instance, Instance]) -> None:
    source, target = pair
    one = ticket(source, target)
    source.node.offer(one, b"another prompt" * 2, 1)
    publish_all(source, one.handoff, [3])
    before = target.block(0, 1)
    target.node.drop_select(one, DIGEST, 0, [1])
    outcome = target.outcome(one.handoff)
    assert (outcome.state, outcome.cause) == (TerminalState.RECOMPUTED, "prompt_mismatch")
    assert target.block(0, 1) == before


@pytest.fixture(params=[("xxh3", "shm"), ("sum", "shm"), ("sum", "tcp")], ids="-".join)
def checked(request: pytest.FixtureRequest) -> Iterator[tuple[Instance, Instance]]:
    """The source names the digest that both use."""
    digest, transport = request.param
    source = Instance("source", digest=digest, transports=(transport,))
    target = Instance("a-target", transports=(transport,))
    yield source, target
    for instance in (source, target):
        instance.close()


def test_what_a_digest_covers_whole_or_in_part_is_delivered(checked: tuple[Instance, Instance]) -> None:
    source, target = checked
    one, two = ticket(source, target), ticket(source, target)
    for each in (one, two):
        source.node.offer(each, DIGEST, 3)
        source.node.publish(each.handoff, range(2), 0, [5, 30, 7])
        source.node.publish(each.handoff, range(2, 3), 0, [5, 30, 7])
        source.node.seal(each.handoff)
    target.node.drop_select(one, DIGEST, 0, [9, 2, 4])
    assert_delivered(source, target, one.handoff, [5, 30, 7], [9, 2, 4])
    target.node.drop_select(two, DIGEST, 1, [11, 12])
    assert_delivered(source, target, two.handoff, [30, 7], [11, 12])


def test_a_byte_changed_after_publishing_is_caught(checked: tuple[Instance, Instance]) -> None:
    source, target = checked
    one = ticket(source, target)
    source.node.offer(one, DIGEST, 2)
    publish_all(source, one.handoff, [3, 4])
    source.memory[int(block_offsets(source.layout, 1, [4])[0]) + 77] ^= 1
    target.node.drop_select(one, DIGEST, 0, [1, 2])
    outcome = target.outcome(one.handoff)
    assert (outcome.state, outcome.cause) == (TerminalState.RECOMPUTED, "integrity_error")
    assert "block 1 of the prompt, layers 1 to 1" in (outcome.detail or "")
    assert "{" not in (outcome.detail or "")
    source.released(one.handoff)


class SummingLink(ShmLink):
    """Takes sums on the way, as the cuda transport's kernel does; what it reads is another thing than what it sums."""

    scheme = "summing"
    flip = 0

    def read_summed(
        self, blocks: list[BlockList], *, guard: Guard | None, stop: StopToken, deadline_s: float
    ) -> list[Any]:
        whole = [b._replace(source=_as_shm(b.source)) for b in blocks]
        self.read(whole, guard=guard, stop=stop, deadline_s=deadline_s)
        sums = [sums_of_blocks(b.target.buffer, b.target_offsets, b.nbytes) for b in blocks]  # type: ignore[union-attr]
        sums[0][1] ^= SummingLink.flip
        return sums

    def load_word(self, region: RemoteRegion, offset: int, *, deadline_s: float) -> int:
        return super().load_word(_as_shm(region), offset, deadline_s=deadline_s)


class SummingTransport(ShmTransport):
    scheme = "summing"

    def connect(self, offer: Any, *, peer: str, incarnation: Any, deadline_s: float) -> SummingLink:
        return SummingLink(offer, peer=peer, incarnation=incarnation)


def _as_shm(region: Any) -> RemoteRegion:
    return msgspec.structs.replace(region, handles={"shm": region.handles["summing"]})  # type: ignore[no-any-return]


@pytest.mark.parametrize("flip", [0, 1 << 40])
def test_sums_that_the_transport_takes_on_the_way_are_what_is_checked(
    flip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SummingLink, "flip", flip)
    monkeypatch.setitem(sys.modules, "summing_transport", sys.modules[__name__])
    monkeypatch.setattr(registry, "_registrations", dict(registry._registrations))
    registry.register_transport("summing", "summing_transport:SummingTransport", reach="host")
    no_probe = TransferSettings(probe=False)
    source = Instance("source", digest="sum", transports=("summing",), transfer=no_probe)
    target = Instance("a-target", transports=("summing",), transfer=no_probe)
    one = ticket(source, target)
    source.node.offer(one, DIGEST, 2)
    publish_all(source, one.handoff, [3, 4])
    target.node.drop_select(one, DIGEST, 0, [1, 2])
    outcome = target.outcome(one.handoff)
    assert (outcome.state, outcome.cause) == (
        (TerminalState.RECOMPUTED, "integrity_error") if flip else (TerminalState.DELIVERED, None)
    ), outcome
    if flip:
        assert "block 1 of the prompt" in (outcome.detail or "")
    for instance in (source, target):
        instance.close()


def test_preempted_blocks_are_never_taken_for_the_requests(pair: tuple[Instance, Instance]) -> None:
    source, target = pair
    one = ticket(source, target)
    source.node.offer(one, DIGEST, 2)
    source.node.publish(one.handoff, range(LAYERS), 0, [3])
    target.node.drop_select(one, DIGEST, 0, [1, 2])
    source.until(lambda view: "1 pulled" in view.detail)
    source.node.revoke(one.handoff)
    source.memory[:] = 7  # Reused at once, as an engine would.
    rng = np.random.default_rng(5)
    for layer in range(LAYERS):
        for block_id in (10, 11):
            at = int(block_offsets(source.layout, layer, [block_id])[0])
            source.memory[at : at + BLOCK_BYTES] = rng.integers(0, 256, BLOCK_BYTES)
    publish_all(source, one.handoff, [10, 11])
    outcome = target.outcome(one.handoff)
    assert outcome.state is TerminalState.DELIVERED
    for layer in range(LAYERS):
        assert [target.block(layer, b) for b in (1, 2)] == [source.block(layer, b) for b in (10, 11)]
    assert source.released(one.handoff).reason is ReleaseReason.ACKED


def test_blocks_that_are_reused_without_a_word_changing_hands_are_a_word_mismatch(
    pair: tuple[Instance, Instance],
) -> None:
    """The reader sees the word after its read, so a lease that ended in between is noticed without any message."""
    source, target = pair
    one = ticket(source, target)
    source.node.offer(one, DIGEST, 1)
    words = source.node._require_words()
    publish_all(source, one.handoff, [3])
    for slot in range(4):
        words.store(slot, 0)
    target.node.drop_select(one, DIGEST, 0, [1])
    outcome = target.outcome(one.handoff)
    assert outcome.state is TerminalState.RECOMPUTED
    assert outcome.cause == "word_mismatch"


@pytest.mark.parametrize("side", ["source", "target"])
def test_an_abort_on_either_side_ends_both_at_once(pair: tuple[Instance, Instance], side: str) -> None:
    source, target = pair
    one = ticket(source, target)
    source.node.offer(one, DIGEST, 2)
    target.node.drop_select(one, DIGEST, 0, [1, 2])
    source.node.publish(one.handoff, range(LAYERS), 0, [3])
    source.until(lambda view: "1 pulled" in view.detail)
    began_s = time.monotonic()
    (source if side == "source" else target).node.cancel(one.handoff, "client_gone", side=side)
    outcome = target.outcome(one.handoff)
    assert outcome.state is (TerminalState.ABORTED if side == "target" else TerminalState.RECOMPUTED)
    source.released(one.handoff)
    assert time.monotonic() - began_s < SLACK_S < min(REMAINING_S, PATIENT.lease_ttl_s)


class LeapingClock(RealClock):
    """The real time, and what was leapt over."""

    leapt_s = 0.0

    def now_s(self) -> float:
        return super().now_s() + self.leapt_s

    def leap(self, node: HandoffNode, seconds: float) -> None:
        """The node's timers that are due by then ring now."""
        self.leapt_s += seconds
        node._loop.call(node._tick, self.now_s())


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_read_that_cannot_be_taken_back_keeps_its_blocks(monkeypatch: pytest.MonkeyPatch, cancelled: bool) -> None:
    """UCX may write after the deadline: until it can't, the handoff has not ended, whatever asks for its end."""
    clock = LeapingClock()
    source, target = Instance("source"), Instance("a-target", clock=clock)
    begun, over = threading.Event(), threading.Event()

    async def unfinished(*_args: Any, **_named: Any) -> None:
        begun.set()
        raise TransferUnfinished("bytes may still land", is_over=over.is_set)

    monkeypatch.setattr(target.node._engine, "read", unfinished)
    one = ticket(source, target)
    source.node.offer(one, DIGEST, 1)
    target.node.drop_select(one, DIGEST, 0, [1])
    publish_all(source, one.handoff, [3])
    assert begun.wait(REMAINING_S)
    if cancelled:
        target.node.cancel(one.handoff, "client_gone", side="target")
    # Deadline, lease and drain pass meanwhile: the last of them closes the channel, which must not end it either.
    clock.leap(target.node, REMAINING_S + PATIENT.lease_ttl_s)
    target.until(lambda view: view.stage == "draining")
    clock.leap(target.node, PATIENT.drain_s)
    assert source.released(one.handoff).reason is not ReleaseReason.ACKED
    with pytest.raises(AssertionError, match="draining"):
        target.outcome(one.handoff, timeout_s=0.3)
    over.set()
    outcome = target.outcome(one.handoff)
    assert outcome.state is (TerminalState.ABORTED if cancelled else TerminalState.RECOMPUTED)
    for instance in (source, target):
        instance.node.check_integrity()
        instance.close()


def test_a_source_that_dies_is_named_at_once(pair: tuple[Instance, Instance]) -> None:
    source, target = pair
    one = ticket(source, target)
    source.node.offer(one, DIGEST, 2)
    target.node.drop_select(one, DIGEST, 0, [1, 2])
    source.node.publish(one.handoff, range(LAYERS), 0, [3])
    source.until(lambda view: "1 pulled" in view.detail)
    began_s = time.monotonic()
    source.node.close()
    outcome = target.outcome(one.handoff)
    assert (outcome.state, outcome.cause) == (TerminalState.RECOMPUTED, "peer_gone")
    assert time.monotonic() - began_s < SLACK_S < min(REMAINING_S, PATIENT.lease_ttl_s)


def test_a_target_that_dies_frees_the_source_within_a_lease(hasty_pair: tuple[Instance, Instance]) -> None:
    source, target = hasty_pair
    one = ticket(source, target)
    source.node.offer(one, DIGEST, 2)
    target.node.drop_select(one, DIGEST, 0, [1, 2])
    source.until(subscribed)
    began_s = time.monotonic()
    target.node.close()
    source.released(one.handoff)
    assert time.monotonic() - began_s < HASTY.lease_ttl_s + SLACK_S < REMAINING_S


def test_an_absent_source_is_an_outcome_not_an_exception(pair: tuple[Instance, Instance]) -> None:
    _, target = pair
    gone = InstanceRef("ghost", 5, ("tcp://127.0.0.1:1",))
    for ref in (gone, msgspec.structs.replace(gone, addresses=())):
        one = HandoffTicket(new_handoff_id(), "target", ref, target.ref, REMAINING_S)
        target.node.drop_select(one, DIGEST, 0, [1])
        outcome = target.outcome(one.handoff)
        assert outcome.state is TerminalState.RECOMPUTED
        assert outcome.cause in ("peer_gone", "compatibility_error")


def test_a_restarted_source_is_another_one(pair: tuple[Instance, Instance]) -> None:
    source, target = pair
    stale = InstanceRef("source", source.node.incarnation + 2, (source.node.address,))
    one = HandoffTicket(new_handoff_id(), "target", stale, target.ref, REMAINING_S)
    began_s = time.monotonic()
    target.node.drop_select(one, DIGEST, 0, [1])
    outcome = target.outcome(one.handoff)
    assert (outcome.state, outcome.cause) == (TerminalState.RECOMPUTED, "incarnation_changed")
    assert time.monotonic() - began_s < SLACK_S


@pytest.mark.parametrize(
    ("field", "value", "seen"),
    [
        ("model", "other", "model: here 'other', there 'm'"),
        ("dtype", "bfloat16", "dtype: here 'bfloat16', there 'float32'"),
        ("block_size", 32, "block_size: here 32, there 16"),
        ("protocol_version", 99, f"protocol_version: here 99, there {PROTOCOL_VERSION}"),
    ],
)
def test_sides_that_differ_are_refused_with_both_values(field: str, value: Any, seen: str) -> None:
    source = Instance("source", fingerprint=msgspec.structs.replace(FINGERPRINT, **{field: value}))
    target = Instance("a-target")
    one = ticket(source, target)
    source.node.offer(one, DIGEST, 1)
    target.node.drop_select(one, DIGEST, 0, [1])
    outcome = target.outcome(one.handoff)
    assert (outcome.state, outcome.cause) == (TerminalState.RECOMPUTED, "compatibility_error")
    assert seen in (outcome.detail or ""), outcome
    for instance in (source, target):
        instance.close()


def test_another_secret_is_refused() -> None:
    source, target = Instance("source"), Instance("a-target", secret=b"z" * 32)
    one = ticket(source, target)
    target.node.drop_select(one, DIGEST, 0, [1])
    outcome = target.outcome(one.handoff)
    assert (outcome.state, outcome.cause) == (TerminalState.RECOMPUTED, "authentication_error")
    for instance in (source, target):
        instance.close()


def test_many_at_once_each_get_their_own(pair: tuple[Instance, Instance]) -> None:
    source, target = pair
    tickets = [ticket(source, target) for _ in range(10)]
    for i, one in enumerate(tickets):
        target.node.drop_select(one, DIGEST + bytes([i]), 0, [3 * i, 3 * i + 1])
    for i, one in reversed(list(enumerate(tickets))):
        source.node.offer(one, DIGEST + bytes([i]), 2)
        publish_all(source, one.handoff, [31 - 2 * i, 30 - 2 * i])
    for i, one in enumerate(tickets):
        assert_delivered(source, target, one.handoff, [31 - 2 * i, 30 - 2 * i], [3 * i, 3 * i + 1])


def test_peers_are_told_where_to_connect_never_a_wildcard() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.advertise_host"):
        Instance("source", listen="tcp://0.0.0.0:0")
    with pytest.raises(ConfigError, match="without a cluster secret"):
        Instance("source", listen="tcp://0.0.0.0:0", advertise_host="localhost", secret=None)
    source = Instance("source", listen="tcp://0.0.0.0:0", advertise_host="localhost")
    target = Instance("a-target")
    assert source.node.address.startswith("tcp://localhost:")
    one = ticket(source, target)
    source.node.offer(one, DIGEST, 1)
    target.node.drop_select(one, DIGEST, 0, [1])
    publish_all(source, one.handoff, [8])
    assert_delivered(source, target, one.handoff, [8], [1])
    for instance in (source, target):
        instance.close()
