"""The handoff, run: both machines of `protocol` over the transfer engine, for one rank of one instance.

The engine's serving thread calls the methods; none of them waits. A thread of the node's own runs the event loop with
the transfer engine, the channels to peers and the timers. The machines are called under one lock, from both threads,
and their actions are carried out under it too: when `revoke` returns, the lease's word is zero, and the engine may
reuse the blocks at once.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from kvferry.addresses import host_of, is_wildcard
from kvferry.clock import Clock, RealClock
from kvferry.errors import ConfigError, KVError, TransportError
from kvferry.handoff.channels import Channels, encode
from kvferry.handoff.digests import DigestKind, Memory, heads_to_check
from kvferry.handoff.loop import NodeLoop
from kvferry.handoff.memory import KVMemory
from kvferry.handoff.pulls import Pulls, Target
from kvferry.handoff.reading import NodeHello, hellos
from kvferry.handoff.words import Words
from kvferry.layout import Fingerprint, KVLayout
from kvferry.protocol.details import REFUSED
from kvferry.protocol.events import (
    Action,
    Cancelled,
    Connect,
    Ended,
    Failed,
    Offered,
    PeerLost,
    Preempted,
    Published,
    Quarantine,
    Queued,
    Received,
    Refused,
    ReleaseBlocks,
    ReleaseReason,
    Revoked,
    Sealed,
    Selected,
    Send,
    Serving,
    SourceEvent,
    Stalled,
    StartRead,
    StopReads,
    StoreWord,
    TargetEvent,
    Tick,
    ZeroWord,
)
from kvferry.protocol.lease import HandoffSettings
from kvferry.protocol.membership import HandoffView
from kvferry.protocol.messages import Gone, Message, Run, State
from kvferry.protocol.source import SourceHandoffs
from kvferry.protocol.target import TargetHandoffs
from kvferry.transfer import Peer, TransferEngine, TransferSettings
from kvferry.types import (
    HandoffId,
    HandoffTicket,
    Incarnation,
    Outcome,
    Side,
    Stage,
    TerminalState,
    Word,
    new_incarnation,
)
from kvferry.wire import require_secret

_log = logging.getLogger("kvferry.handoff")


class Released(NamedTuple):
    """The source's blocks of `handoff` may be reused, and why. `cause` says more where there is more to say; `at_s` is
    the clock's time."""

    handoff: HandoffId
    reason: ReleaseReason
    cause: str | None = None
    at_s: float = 0.0


class HandoffNode:
    """Both sides of the handoff for one rank. Thread-safe; no method but `start` and `close` waits.

    Life: construct, `allocate` or `register` the KV memory, `start(layout)`, use, `close`.

    Args:
        fingerprint: must equal the peer's; a difference ends the handoff with an error that names both values.
        advertise_host: what peers connect to, where it is not the bound address; a wildcard (0.0.0.0) requires it.
        incarnation: where several ranks share one; else a fresh one is drawn.
        wake: called, on any thread, when `outcomes` or `released` has something new.
        digest: of each published block: `xxh3` (host memory only; nothing of GPU memory), `sum` (host and GPU memory,
            where the kernel that pulls takes it on the way), or `none`.
    """

    def __init__(
        self,
        *,
        instance_id: str,
        fingerprint: Fingerprint,
        listen: str = "tcp://127.0.0.1:0",
        advertise_host: str | None = None,
        secret: bytes | None = None,
        settings: HandoffSettings | None = None,
        transfer: TransferSettings | None = None,
        transports: Sequence[str] = ("cuda", "shm", "tcp"),
        incarnation: Incarnation | None = None,
        digest: DigestKind = "xxh3",
        wake: Callable[[], None] = lambda: None,
        clock: Clock | None = None,
    ) -> None:
        self.instance_id = instance_id
        self.fingerprint = fingerprint
        self.incarnation = incarnation or new_incarnation()
        self.settings = settings or HandoffSettings()
        self.layout: KVLayout | None = None
        require_secret(host_of(listen), secret, "the handoff listener")
        if advertise_host is None and is_wildcard(host_of(listen)):
            raise ConfigError(
                f"the handoff listener {listen} takes connections on every interface, but tells peers none of them: "
                "set cluster.advertise_host to a name or address at which the other machines reach this one"
            )
        self._advertise_host = advertise_host
        self._digest = digest
        self._wake = wake
        self._clock = clock or RealClock()
        self._engine = TransferEngine(
            listen=listen,
            transports=tuple(transports),
            secret=secret,
            incarnation=self.incarnation,
            settings=transfer or TransferSettings(),
            check_hello=self._check_hello,
        )
        self._memory = KVMemory(self._engine)
        self._words: Words | None = None
        self._lock = threading.RLock()
        self._source = SourceHandoffs(self.incarnation, self.settings, _new_word)
        self._target_table: TargetHandoffs | None = None
        self._targets: dict[HandoffId, Target] = {}
        self._heads: dict[HandoffId, range] = {}  # of open handoffs to another slice: what digests are of
        self._released: deque[Released] = deque()
        self._outcomes: deque[Outcome] = deque()
        self._loop = NodeLoop(self._clock)
        self._channels = Channels(self._engine, on_message=self._on_message, on_lost=self._on_lost)
        self._pulls = Pulls(
            self._engine, self._channels, self._memory, self._loop, self._targets, report=self._target_event
        )
        self._beat_s: float | None = None
        self._serving = True
        self._closed = False

    # Life ------------------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """What peers connect to, `tcp://host:port` with the port as really bound; valid after `start`."""
        if self._advertise_host is None:
            return self._engine.address
        host = f"[{self._advertise_host}]" if ":" in self._advertise_host else self._advertise_host
        return f"tcp://{host}:{self._engine.address.rpartition(':')[2]}"

    def allocate(self, nbytes: int) -> Memory:
        """uint8 [nbytes] of shared memory for KV blocks, zeroed; the next region of the layout."""
        return self._memory.allocate(nbytes)

    def register(self, buffer: Any) -> int:
        """Register KV memory that exists (numpy, torch CPU or CUDA, contiguous); returns its region index."""
        return self._memory.register(buffer)

    def start(self, layout: KVLayout) -> None:
        """Bind, and serve from now on. `layout` counts regions in the order of `allocate` and `register`.

        Raises: ConfigError if the port is taken (it names the process), or beyond loopback without a secret, or for the
            digest `sum` of GPU memory without the cuda transport.
        """
        self.layout = layout
        self._words = self._memory.make_words(self.settings.num_slots)
        self._target_table = TargetHandoffs(self.incarnation, self.settings, len(layout.layers))
        self._engine.hello = hellos.encode(
            NodeHello(
                instance_id=self.instance_id,
                fingerprint=self.fingerprint,
                layout=layout,
                regions=tuple(r.region_id for r in self._memory.regions),
                words_region=self._words.region.region_id,
                digest=self._digest,
            )
        )
        if self._digest == "sum" and not self._memory.digests("sum", layout, range(len(layout.layers)), [0]):
            # Not left unchecked silently. It is also what makes a GPU ready to take sums, in seconds.
            raise ConfigError(
                "the digest `sum` of GPU memory needs the cuda transport, which does not work here: `kvferry doctor` "
                "says why; or set the digest to none"
            )
        self._loop.start()
        self._loop.run(self._engine.start())

    def close(self) -> None:
        """Stop serving: peers see this incarnation gone. Blocks are no longer written when this returns. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._loop.close(self._engine.close)
        self._memory.regions.clear()
        self._words = None

    # The source's side -----------------------------------------------------------------------------------------

    def offer(
        self, ticket: HandoffTicket, prompt_digest: bytes, num_blocks: int, *, target: tuple[int, int] | None = None
    ) -> None:
        """A prefill request is admitted: its lease starts now. `released` will name it exactly once.

        Args:
            target: rank and tensor-parallel size of the target, where they may differ from this rank's.
        """
        with self._lock:
            if target is not None and (heads := heads_to_check(self._require_layout(), *target)) is not None:
                self._heads[ticket.handoff] = heads
            self._source_event(Offered(ticket, prompt_digest, num_blocks))

    def publish(self, handoff: HandoffId, layers: range, first_block: int, block_ids: Sequence[int]) -> None:
        """The prompt's blocks `first_block` onwards are complete in `layers`: the kernel that wrote them has ended.

        A handoff that is closed, or not known, is ignored: the target may have gone meanwhile.
        """
        digest = b""
        if self.layout is not None:
            try:
                heads = self._heads.get(handoff)
                digest = self._memory.digests(self._digest, self.layout, layers, block_ids, heads)
            except TransportError as error:
                _log.error("handoff %s cannot be published: %s", handoff, error)
                self.fail(handoff, error.message)
                return
        self._source_event(Published(handoff, Run.of(layers, first_block, block_ids, digest)))

    def seal(self, handoff: HandoffId) -> None:
        """Everything is published."""
        self._source_event(Sealed(handoff))

    def revoke(self, handoff: HandoffId, reason: str = "preempted") -> None:
        """Take the blocks back; the request will be computed and published again. When this returns they are free."""
        self._source_event(Preempted(handoff, reason))

    def fail(self, handoff: HandoffId, why: str) -> None:
        """The prefill failed: the target hears of it at once, with this sentence."""
        self._source_event(Failed(handoff, why))

    def relieve(self, count: int, reason: str = "other requests needed the room") -> int:
        """Take back up to `count` handoffs' blocks for good, the least useful first; returns how many."""
        with self._lock:
            chosen = self._source.pressure_order()[:count]
            for handoff in chosen:
                self._source_event(Revoked(handoff, reason))
        return len(chosen)

    def released(self) -> list[Released]:
        """What may be freed since the last call; each offered handoff exactly once."""
        return _drain(self._released)

    # The target's side -----------------------------------------------------------------------------------------

    def expect(self, ticket: HandoffTicket, prompt_digest: bytes) -> None:
        """The request waits for room here; the source keeps its blocks meanwhile. `drop_select` or `cancel` follows.

        Should the handoff end before, `outcomes` tells it as usual, and `drop_select` is not called any more.
        """
        self._target_event(Queued(ticket, prompt_digest))

    def drop_select(
        self, ticket: HandoffTicket, prompt_digest: bytes, first_block: int, block_ids: Sequence[int]
    ) -> None:
        """Pull the prompt's blocks `first_block` onwards into own blocks `block_ids`; `outcomes` tells the end.

        Until then the blocks belong to the node. Without block ids the source is only told to let go.
        """
        ids = np.asarray(block_ids, dtype=np.int64)
        with self._lock:
            self._targets.setdefault(ticket.handoff, Target(Incarnation(ticket.source.incarnation), first_block, ids))
            self._target_event(Selected(ticket, prompt_digest, first_block, len(ids)))

    def outcomes(self) -> list[Outcome]:
        """The handoffs that ended here since the last call; nothing writes into their blocks any more."""
        return _drain(self._outcomes)

    # Both sides ------------------------------------------------------------------------------------------------

    def cancel(self, handoff: HandoffId, reason: str, *, side: Side, remaining_s: float = 0.0) -> None:
        """The request is aborted on this side. Ends in `released` or `outcomes` as usual; unknown ids stay out."""
        event = Cancelled(handoff, reason, remaining_s)
        if side == "source":
            self._source_event(event)
        else:
            self._target_event(event)

    def beat(self) -> None:
        """The serving loop turned. Once called, it must be called again at least every two leases, or peers are told
        nothing any more: an engine that hangs must not hold theirs."""
        self._beat_s = self._clock.now_s()

    def views(self) -> list[HandoffView]:
        """Every open handoff with its stage, age, deadline and peer."""
        now_s = self._clock.now_s()
        with self._lock:
            views = list(self._source.views(now_s))
            return views + (list(self._target_table.views(now_s)) if self._target_table else [])

    def check_integrity(self) -> None:
        """Raises: AssertionError if a table contradicts itself (a bug)."""
        with self._lock:
            self._source.check_integrity()
            if self._target_table:
                self._target_table.check_integrity()

    # Events and actions ----------------------------------------------------------------------------------------

    def _source_event(self, event: SourceEvent) -> None:
        with self._lock:
            if not self._closed:
                self._carry_out(self._source.handle(event, self._clock.now_s()))

    def _target_event(self, event: TargetEvent) -> None:
        with self._lock:
            if self._target_table is None:
                raise RuntimeError("the node must be started before it can take requests")
            if not self._closed:
                self._carry_out(self._target_table.handle(event, self._clock.now_s()))

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case StoreWord(slot, word):
                    self._require_words().store(slot, word)
                case ZeroWord(slot):
                    self._require_words().store(slot, Word(0))
                case Send(peer, message):
                    self._loop.call(self._channels.send, peer, encode(message))
                case ReleaseBlocks(handoff, _, reason, cause):
                    if reason is not ReleaseReason.PREEMPTED:
                        self._heads.pop(handoff, None)
                        if reason not in (ReleaseReason.ACKED, ReleaseReason.CANCELLED):
                            _log.info("handoff %s: its blocks were let go (%s): %s", handoff, reason, cause)
                        self._released.append(Released(handoff, reason, cause, self._clock.now_s()))
                        self._wake()
                case Connect():
                    self._loop.call(self._loop.spawn, self._connect(action))
                case StartRead():
                    self._loop.call(self._pulls.start, action, self._require_layout())
                case StopReads(handoff):
                    self._loop.call(self._pulls.stop, handoff)
                case Quarantine(_, peer):
                    self._loop.call(self._channels.close, peer)
                case Ended(handoff, outcome):
                    self._targets.pop(handoff, None)
                    self._outcomes.append(outcome)
                    self._wake()
                case Refused(handoff, side, reason):
                    self._refuse(handoff, side, reason)
        self._loop.call(self._arm_timer)

    def _refuse(self, handoff: HandoffId, side: Side, reason: str) -> None:
        """A second request under one id: the first one's end will speak for a `duplicate`, nobody for the others."""
        why = REFUSED[reason]
        _log.warning("handoff %s refused at the %s: %s", handoff, side, why)
        if reason == "duplicate":
            return
        if side == "source":
            self._heads.pop(handoff, None)
            self._released.append(Released(handoff, ReleaseReason.FAILED, why, self._clock.now_s()))
        else:
            self._targets.pop(handoff, None)
            outcome = Outcome(handoff, TerminalState.RECOMPUTED, Stage.RESERVING, f"refused_{reason}", why)
            self._outcomes.append(outcome)
        self._wake()

    # On the loop's thread ----------------------------------------------------------------------------------------

    def _on_lost(self, peer: Peer, error: KVError) -> None:
        with self._lock:
            if not self._closed:
                name = hellos.decode(peer.hello).instance_id
                _log.info("the connection to %s at %s was lost: %s", name, peer.address, error.message)
                self._source_event(PeerLost(peer.incarnation, error.cause, error.message))
                self._target_event(PeerLost(peer.incarnation, error.cause, error.message))

    def _on_message(self, peer: Incarnation, message: Message) -> None:
        if isinstance(message, State | Gone):
            self._target_event(Received(peer, message))
        else:
            self._source_event(Received(peer, message))

    def _check_hello(self, payload: bytes) -> None:
        self.fingerprint.require_equal(hellos.decode(payload).fingerprint)

    async def _connect(self, wanted: Connect) -> None:
        self._target_event(await self._channels.connect(wanted))

    # Timers ------------------------------------------------------------------------------------------------------

    def _arm_timer(self) -> None:
        if self._closed:
            return
        with self._lock:
            times = [self._source.next_timer_s(), self._target_table.next_timer_s() if self._target_table else None]
        at_s = min((t for t in times if t is not None), default=None)
        self._loop.arm(at_s, self._tick)

    def _tick(self, due_s: float) -> None:
        now_s = self._clock.now_s()
        lag_s = now_s - due_s
        with self._lock:
            if lag_s > self.settings.lease_ttl_s / 2:
                # What peers said meanwhile still waits in the sockets: it counts before any timer does.
                self._source_event(Stalled(lag_s))
                self._target_event(Stalled(lag_s))
            self._watch_serving(now_s)
            self._source_event(Tick())
            self._target_event(Tick())

    def _watch_serving(self, now_s: float) -> None:
        serving = self._beat_s is None or now_s - self._beat_s < 2 * self.settings.lease_ttl_s
        if serving != self._serving:
            self._serving = serving
            if not serving:
                _log.error("the serving loop has not turned for %.1f s", now_s - (self._beat_s or now_s))
            self._source_event(Serving(serving))
            self._target_event(Serving(serving))

    def _require_words(self) -> Words:
        if self._words is None:
            raise RuntimeError("the node must be started before it can take requests")
        return self._words

    def _require_layout(self) -> KVLayout:
        if self.layout is None:
            raise RuntimeError("the node must be started before it can take requests")
        return self.layout


def _drain(queue: deque[Any]) -> list[Any]:
    items = []
    while queue:
        items.append(queue.popleft())
    return items


def _new_word() -> Word:
    return Word(secrets.randbits(63) | 1)
