"""The handoff, run: both machines of `protocol` over the transfer engine, for one rank of one instance.

The engine's serving thread calls the methods; none of them waits. A thread of the node's own runs the event loop with
the transfer engine, the channels to peers and the timers. The machines are called under one lock, from both threads,
and their actions are carried out under it too: when `revoke` returns, the lease's word is zero, and the engine may
reuse the blocks at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvferry.addresses import host_of, is_wildcard
from kvferry.clock import Clock, RealClock
from kvferry.errors import (
    CompatibilityError,
    ConfigError,
    KVError,
    PeerGone,
    TransferTimeout,
    TransferUnfinished,
    WireError,
)
from kvferry.handoff.digests import Memory, block_digests
from kvferry.handoff.reading import NodeHello, PullPlan, check_digests, plan_pull
from kvferry.handoff.words import WORD_BYTES, CudaWords, HostWords, Words
from kvferry.layout import Fingerprint, KVLayout
from kvferry.protocol.events import (
    Action,
    Cancelled,
    Connect,
    Connected,
    ConnectFailed,
    Ended,
    Failed,
    Offered,
    PeerLost,
    Preempted,
    Published,
    Quarantine,
    Queued,
    ReadCompleted,
    ReadFailed,
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
from kvferry.transport.base import Region
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
from kvferry.wire import Codec, require_secret

READ_PRIORITY = 10
UNFINISHED_POLL_S = 0.05
CLOSE_TIMEOUT_S = 5.0
_log = logging.getLogger("kvferry.handoff")
_codec: Codec[Message] = Codec(Message)
_hello_codec: Codec[NodeHello] = Codec(NodeHello)


class Released(NamedTuple):
    """The source's blocks of `handoff` may be reused, and why. `cause` says more where there is more to say."""

    handoff: HandoffId
    reason: ReleaseReason
    cause: str | None = None


class Target(NamedTuple):
    """Own blocks for the prompt's blocks `first_block` onwards, and the source that they come from."""

    source: Incarnation
    first_block: int
    block_ids: npt.NDArray[np.int64]


class HandoffNode:
    """Both sides of the handoff for one rank. Thread-safe; no method but `start` and `close` waits.

    Life: construct, `allocate` or `register` the KV memory, `start(layout)`, use, `close`.

    Args:
        fingerprint: must equal the peer's; a difference ends the handoff with an error that names both values.
        advertise_host: what peers connect to, where it is not the bound address; a wildcard (0.0.0.0) requires it.
        incarnation: where several ranks share one; else a fresh one is drawn.
        wake: called, on any thread, when `outcomes` or `released` has something new.
        digest: publish an xxh3 digest of each block (host memory only).
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
        digest: bool = True,
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
        self._engine.on_message = self._on_message
        self._engine.on_peer = self._on_peer
        self._engine.on_peer_lost = self._on_peer_lost
        self._regions: list[Region] = []
        self._words: Words | None = None
        self._lock = threading.RLock()
        self._source = SourceHandoffs(self.incarnation, self.settings, _new_word)
        self._target_table: TargetHandoffs | None = None
        self._targets: dict[HandoffId, Target] = {}
        self._peers: dict[Incarnation, list[Peer]] = {}
        self._reads: dict[HandoffId, set[asyncio.Task[Any]]] = {}
        self._connecting: dict[tuple[str, int], asyncio.Task[Peer]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._released: deque[Released] = deque()
        self._outcomes: deque[Outcome] = deque()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name="kvferry-handoff", daemon=True)
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at_s: float | None = None
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
        region = self._engine.allocate(nbytes)
        self._regions.append(region)
        return region.buffer  # type: ignore[no-any-return]

    def register(self, buffer: Any) -> int:
        """Register KV memory that exists (numpy, torch CPU or CUDA, contiguous); returns its region index."""
        self._regions.append(self._engine.register(buffer))
        return len(self._regions) - 1

    def start(self, layout: KVLayout) -> None:
        """Bind, and serve from now on. `layout` counts regions in the order of `allocate` and `register`.

        Raises: ConfigError if the port is taken (it names the process), or beyond loopback without a secret.
        """
        self.layout = layout
        self._words = self._make_words()
        self._target_table = TargetHandoffs(self.incarnation, self.settings, len(layout.layers))
        self._engine.hello = _hello_codec.encode(
            NodeHello(
                instance_id=self.instance_id,
                fingerprint=self.fingerprint,
                layout=layout,
                regions=tuple(r.region_id for r in self._regions),
                words_region=self._words.region.region_id,
            )
        )
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._engine.start(), self._loop).result()

    def close(self) -> None:
        """Stop serving: peers see this incarnation gone. Blocks are no longer written when this returns. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result(CLOSE_TIMEOUT_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(CLOSE_TIMEOUT_S)
        if not self._loop.is_running():
            self._loop.close()
        self._regions.clear()
        self._words = None

    # The source's side -----------------------------------------------------------------------------------------

    def offer(self, ticket: HandoffTicket, prompt_digest: bytes, num_blocks: int) -> None:
        """A prefill request is admitted: its lease starts now. `released` will name it exactly once."""
        self._source_event(Offered(ticket, prompt_digest, num_blocks))

    def publish(self, handoff: HandoffId, layers: range, first_block: int, block_ids: Sequence[int]) -> None:
        """The prompt's blocks `first_block` onwards are complete in `layers`: the kernel that wrote them has ended.

        A handoff that is closed, or not known, is ignored: the target may have gone meanwhile.
        """
        digest = b""
        if self._digest and self.layout is not None and self._on_host(self.layout, layers):
            digest = block_digests(self._host_memory(), self.layout, layers, block_ids)
        self._source_event(Published(handoff, Run.of(layers, first_block, block_ids, digest)))

    def seal(self, handoff: HandoffId) -> None:
        """Everything is published."""
        self._source_event(Sealed(handoff))

    def revoke(self, handoff: HandoffId, reason: str = "preempted") -> None:
        """Take the blocks back; the request will be computed and published again. When this returns they are free."""
        self._source_event(Preempted(handoff, reason))

    def fail(self, handoff: HandoffId, cause: str) -> None:
        """The prefill failed: the target hears of it at once."""
        self._source_event(Failed(handoff, cause))

    def relieve(self, count: int, reason: str = "pressure") -> int:
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
                    self._on_loop(self._send, peer, _codec.encode(message))
                case ReleaseBlocks(handoff, _, reason, cause):
                    if reason is not ReleaseReason.PREEMPTED:
                        self._released.append(Released(handoff, reason, cause))
                        self._wake()
                case Connect():
                    self._on_loop(self._spawn, self._connect(action))
                case StartRead():
                    self._on_loop(self._start_read, action)
                case StopReads(handoff):
                    self._on_loop(self._stop_reads, handoff)
                case Quarantine(_, peer):
                    self._on_loop(self._close_links, peer)
                case Ended(handoff, outcome):
                    self._targets.pop(handoff, None)
                    self._outcomes.append(outcome)
                    self._wake()
                case Refused(handoff, side, reason):
                    self._refuse(handoff, side, reason)
        self._on_loop(self._arm_timer)

    def _refuse(self, handoff: HandoffId, side: Side, reason: str) -> None:
        """A second request under one id: the first one's end will speak for a `duplicate`, nobody for the others."""
        _log.warning("handoff %s refused at the %s: %s", handoff, side, reason)
        if reason == "duplicate":
            return
        if side == "source":
            self._released.append(Released(handoff, ReleaseReason.FAILED, reason))
        else:
            self._targets.pop(handoff, None)
            outcome = Outcome(handoff, TerminalState.RECOMPUTED, Stage.RESERVING, f"refused_{reason}")
            self._outcomes.append(outcome)
        self._wake()

    def _on_loop(self, call: Callable[..., object], *args: Any) -> None:
        """Run `call` on the loop's thread, after everything that was put there before."""
        try:
            self._loop.call_soon_threadsafe(call, *args)
        except RuntimeError:
            # The loop has ended: this node is closed, and its peers see that.
            for arg in args:
                if asyncio.iscoroutine(arg):
                    arg.close()

    # On the loop's thread ----------------------------------------------------------------------------------------

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _shut_down(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._engine.close()

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _send(self, incarnation: Incarnation, payload: bytes) -> None:
        for peer in self._peers.get(incarnation, ()):
            try:
                peer.send(payload)
                return
            except KVError as error:
                _log.debug("cannot send to %s: %s", peer.name, error)

    def _on_peer(self, peer: Peer) -> None:
        self._peers.setdefault(peer.incarnation, []).append(peer)

    def _on_peer_lost(self, peer: Peer, error: KVError) -> None:
        channels = [p for p in self._peers.get(peer.incarnation, ()) if p is not peer]
        if channels:
            self._peers[peer.incarnation] = channels
            return
        self._peers.pop(peer.incarnation, None)
        with self._lock:
            if not self._closed:
                _log.info("peer %s is gone: %s", peer.name, error)
                self._source_event(PeerLost(peer.incarnation, error.cause))
                self._target_event(PeerLost(peer.incarnation, error.cause))

    def _on_message(self, peer: Peer, payload: bytes) -> None:
        try:
            message = _codec.decode(payload)
        except WireError as error:
            _log.warning("closing the channel to %s: %s", peer.name, error)
            peer.close()
            return
        event = Received(peer.incarnation, message)
        if isinstance(message, State | Gone):
            self._target_event(event)
        else:
            self._source_event(event)

    def _check_hello(self, payload: bytes) -> None:
        self.fingerprint.require_equal(_hello_codec.decode(payload).fingerprint)

    async def _connect(self, wanted: Connect) -> None:
        try:
            async with asyncio.timeout(max(0.0, wanted.deadline_s)):
                peer = await self._channel(wanted)
        except TimeoutError:
            where = ", ".join(wanted.source.addresses)
            detail = f"no channel to {wanted.source.instance_id} at {where} within {wanted.deadline_s:.1f} s"
            self._target_event(ConnectFailed(wanted.handoff, TransferTimeout("").cause, detail))
        except KVError as error:
            self._target_event(ConnectFailed(wanted.handoff, error.cause, error.message))
        else:
            if peer.lost is not None:
                # Lost between the channel's return and this turn of the loop: its PeerLost came before this handoff
                # was connected, and nobody would say it again before the lease ends.
                self._target_event(ConnectFailed(wanted.handoff, peer.lost.cause, peer.lost.message))
                return
            self._target_event(Connected(wanted.handoff, peer.incarnation))

    async def _channel(self, wanted: Connect) -> Peer:
        """An open channel to the source, shared by all its handoffs."""
        source = wanted.source
        for peer in self._peers.get(Incarnation(source.incarnation), ()):
            if peer.lost is None:
                return peer
        if not source.addresses:
            raise CompatibilityError(f"the prefill instance {source.instance_id} told no handoff listener")
        key = (source.addresses[0], source.incarnation)
        if key not in self._connecting:
            attempt = self._engine.connect(source.addresses[0], deadline_s=wanted.deadline_s)
            self._connecting[key] = self._loop.create_task(attempt)
            self._connecting[key].add_done_callback(lambda _: self._connecting.pop(key, None))
        return await asyncio.shield(self._connecting[key])

    def _start_read(self, wanted: StartRead) -> None:
        reads = self._reads.setdefault(wanted.handoff, set())
        task = self._spawn(self._read(wanted))
        reads.add(task)

        def ended(task: asyncio.Task[Any]) -> None:
            reads.discard(task)
            if not reads:
                self._reads.pop(wanted.handoff, None)
            self._report_read(wanted, task)

        task.add_done_callback(ended)

    def _report_read(self, wanted: StartRead, task: asyncio.Task[Any]) -> None:
        """Exactly one event for each read, whatever ended it."""
        if self._closed:
            return
        if task.cancelled():
            self._target_event(ReadFailed(wanted.handoff, wanted.read_id, "handoff_aborted"))
            return
        error = task.exception()
        if error is None:
            nbytes, transport = task.result()
            self._target_event(ReadCompleted(wanted.handoff, wanted.read_id, nbytes, transport))
        elif isinstance(error, KVError):
            self._target_event(ReadFailed(wanted.handoff, wanted.read_id, error.cause, error.message))
        else:
            _log.error("a read of handoff %s ended in a bug", wanted.handoff, exc_info=error)
            self._target_event(ReadFailed(wanted.handoff, wanted.read_id, "internal_error", repr(error)))

    async def _read(self, wanted: StartRead) -> tuple[int, str | None]:
        target = self._targets.get(wanted.handoff)
        if target is None or self.layout is None:
            raise TransferTimeout("the handoff ended before its read began")
        peer = next((p for p in self._peers.get(target.source, ()) if p.lost is None), None)
        if peer is None:
            raise PeerGone("no channel to the source is open", stage="pulling")
        plan = plan_pull(
            wanted, _hello_codec.decode(peer.hello), peer.regions, self._regions, self.layout,
            target.first_block, target.block_ids,
        )  # fmt: skip
        if not plan.blocks:
            return 0, None
        try:
            done = await self._engine.read(
                peer, plan.blocks, guard=plan.guard, deadline_s=wanted.deadline_s, priority=READ_PRIORITY
            )
        except TransferUnfinished as error:
            _log.error("handoff %s keeps its blocks aside: %s", wanted.handoff, error)
            await self._until_over(error)
            raise
        if plan.digests and self._on_host(self.layout, plan.layers):
            await self._loop.run_in_executor(None, self._verify, plan)
        return done.nbytes, done.transport

    async def _until_over(self, read: TransferUnfinished) -> None:
        """Until nothing can land any more (R7), also when cancelled: till then the read counts as under way."""
        while not self._closed and not read.is_over():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(UNFINISHED_POLL_S)

    def _verify(self, plan: PullPlan) -> None:
        assert self.layout is not None
        check_digests(plan, self._host_memory(), self.layout)

    def _stop_reads(self, handoff: HandoffId) -> None:
        for task in list(self._reads.get(handoff, ())):
            task.cancel()

    def _close_links(self, incarnation: Incarnation) -> None:
        for peer in list(self._peers.get(incarnation, ())):
            peer.close()

    # Timers ------------------------------------------------------------------------------------------------------

    def _arm_timer(self) -> None:
        if self._closed:
            return
        with self._lock:
            times = [self._source.next_timer_s(), self._target_table.next_timer_s() if self._target_table else None]
        at_s = min((t for t in times if t is not None), default=None)
        if at_s == self._timer_at_s:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_at_s = None, at_s
        if at_s is not None:
            self._timer = self._loop.call_later(max(0.0, at_s - self._clock.now_s()), self._tick, at_s)

    def _tick(self, due_s: float) -> None:
        self._timer, self._timer_at_s = None, None
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

    # Memory ------------------------------------------------------------------------------------------------------

    def _make_words(self) -> Words:
        cuda = next((r for r in self._regions if r.kind == "cuda"), None)
        nbytes = self.settings.num_slots * WORD_BYTES
        if cuda is None:
            return HostWords(self._engine.allocate(nbytes))
        import torch

        tensor = torch.zeros(self.settings.num_slots, dtype=torch.int64, device=f"cuda:{cuda.device}")
        return CudaWords(tensor, self._engine.register(tensor))

    def _require_words(self) -> Words:
        if self._words is None:
            raise RuntimeError("the node must be started before it can take requests")
        return self._words

    def _on_host(self, layout: KVLayout, layers: range) -> bool:
        return all(self._regions[layout.layers[layer].region].kind == "host" for layer in layers)

    def _host_memory(self) -> dict[int, Memory]:
        return {i: _as_bytes(r.buffer) for i, r in enumerate(self._regions) if r.kind == "host"}


def _as_bytes(buffer: Any) -> Memory:
    """A region's buffer as uint8 [nbytes]: numpy, or a torch CPU tensor of any dtype."""
    if not isinstance(buffer, np.ndarray):
        import torch

        buffer = buffer.view(-1).view(torch.uint8).numpy()
    return buffer.reshape(-1).view(np.uint8)  # type: ignore[no-any-return]


def _drain(queue: deque[Any]) -> list[Any]:
    items = []
    while queue:
        items.append(queue.popleft())
    return items


def _new_word() -> Word:
    return Word(secrets.randbits(63) | 1)
