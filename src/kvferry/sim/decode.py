"""A decode instance: the real target table, around it a model of an engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from kvferry.protocol.events import (
    Action,
    Cancelled,
    Connect,
    Connected,
    ConnectFailed,
    Ended,
    Quarantine,
    Queued,
    ReadCompleted,
    ReadFailed,
    Refused,
    Selected,
    Send,
    StartRead,
    StopReads,
)
from kvferry.protocol.messages import Ack
from kvferry.protocol.target import TargetHandoffs
from kvferry.sim.instance import SLACK_S, Instance
from kvferry.sim.network import Read
from kvferry.sim.prefill import Prefill
from kvferry.sim.world import NUM_LAYERS, SETTINGS, Broken
from kvferry.types import HandoffId, HandoffTicket, Incarnation, Outcome, TerminalState


class DecodeJob:
    """One decode request in the engine of D."""

    def __init__(self, ticket: HandoffTicket, num_blocks: int, first_block: int, digest: bytes) -> None:
        self.ticket, self.num_blocks, self.first_block, self.digest = ticket, num_blocks, first_block, digest
        self.blocks: list[int] = []
        self.reserved = False
        self.known_s: float | None = None  # since when the protocol knows of it
        self.mark = 0.0
        self.drained = False
        self.outcome: Outcome | None = None


class Decode(Instance):
    """A decode instance. Blocks belong to (handoff, "pull") until the handoff has ended, then to (handoff, "use")."""

    table: TargetHandoffs
    prefills: dict[str, Prefill]
    strike: Callable[[Instance], None]  # how a fault kills an instance

    def start(self) -> None:
        super().start()
        self.table = self.rules.target_table(self.incarnation, self.world)
        self.jobs: dict[HandoffId, DecodeJob] = {}
        self.queue: deque[DecodeJob] = deque()
        self.reads: dict[int, Read] = {}
        self.progress: dict[HandoffId, tuple[int, int, int]] = {}
        self.ended: dict[HandoffId, None] = {}

    # The router's requests

    def decode(self, ticket: HandoffTicket, num_blocks: int, first_block: int, digest: bytes) -> None:
        known = self.world.rng.random() < 0.5 and self.table.knows(ticket.handoff)
        if ticket.handoff in self.jobs or known:
            return
        job = DecodeJob(ticket, num_blocks, first_block, digest)
        self.jobs[ticket.handoff] = job
        self.queue.append(job)
        self._pump()
        if not job.reserved and self.world.rng.random() < 0.7:
            self._introduce(job)
            self.feed(Queued(ticket, digest))

    def cancel(self, handoff: HandoffId, remaining_s: float) -> None:
        """The router closed its connection."""
        job = self.jobs.get(handoff)
        if job is not None and job.known_s is None:
            self.queue.remove(job)
            del self.jobs[handoff]
        elif job is not None and job.outcome is not None:
            self._leave(job)
            return
        self.feed(Cancelled(handoff, "client_gone", remaining_s))

    # The engine

    def _pump(self) -> None:
        while self.queue and len(self.memory.free) >= self.queue[0].num_blocks:
            job = self.queue.popleft()
            handoff = job.ticket.handoff
            job.blocks = self.memory.take(job.num_blocks, (handoff, "pull"))
            job.reserved = True
            if job.outcome is not None:
                self._use(job)
                continue
            self._introduce(job)
            self.feed(Selected(job.ticket, job.digest, job.first_block, job.num_blocks))

    def _introduce(self, job: DecodeJob) -> None:
        if job.known_s is None:
            job.known_s, job.mark = self.local_s(), self.stopped_total_s

    def _use(self, job: DecodeJob) -> None:
        """The handoff is over: recompute the prompt if need be, then decode. Nothing else may write these blocks."""
        handoff, outcome = job.ticket.handoff, job.outcome
        assert outcome is not None
        self.memory.pass_on(job.blocks, (handoff, "pull"), (handoff, "use"))
        rng = self.world.rng
        if outcome.state is TerminalState.RECOMPUTED:
            for block in job.blocks:
                for layer in range(NUM_LAYERS):
                    self.memory.write(block, layer, (handoff, "own"), (handoff, "use"))
            self.post(0.05 + rng.random() * 0.2, self._stream, job, 0)
        else:
            self.post(0.005, self._stream, job, 0)

    def _stream(self, job: DecodeJob, chunk: int) -> None:
        if self.jobs.get(job.ticket.handoff) is not job:
            return
        final = chunk == 2
        self.router.hear(self, job.ticket.handoff, job.outcome, final)
        if final:
            self._leave(job)
        else:
            self.post(0.01 + self.world.rng.random() * 0.1, self._stream, job, chunk + 1)

    def _leave(self, job: DecodeJob) -> None:
        """Free what the request held."""
        handoff = job.ticket.handoff
        del self.jobs[handoff]
        if job in self.queue:
            self.queue.remove(job)
        self.memory.give(job.blocks, (handoff, "use"))
        self.post(0.0, self._pump)

    # Actions

    def act(self, action: Action, event: Any) -> None:
        match action:
            case Send():
                if isinstance(action.message, Ack) and action.message.handoff in self.jobs:
                    self.world.accepted[action.message.handoff] = action.message.word
                self.send(action.peer, action.message)
            case Connect():
                self._connect(action)
            case StartRead():
                self._start_read(action)
            case StopReads():
                self.jobs[action.handoff].drained = True
                for read in [r for r in self.reads.values() if r.handoff == action.handoff]:
                    read.stop()
            case Quarantine():
                for read in [r for r in self.reads.values() if r.handoff == action.handoff]:
                    self.world.at(self.world.rng.random() * 0.5, read.end, "handoff_aborted")
            case Ended():
                self._end(action.handoff, action.outcome)
            case Refused():
                job = self.jobs.pop(action.handoff)
                if job in self.queue:
                    self.queue.remove(job)
                self.memory.give(job.blocks, (action.handoff, "pull"))
            case _:
                raise Broken("bug", f"{self.name}: a target cannot {action}")

    def _connect(self, action: Connect) -> None:
        owner = self.prefills[action.source.instance_id]
        delay_s = 0.001 + self.world.rng.random() * 0.005
        if not owner.alive:
            self.post(delay_s, self.feed, ConnectFailed(action.handoff, "peer_gone"))
        elif owner.stopped or self.network.cut_s(self, owner):
            self.post(action.deadline_s, self.feed, ConnectFailed(action.handoff, "transfer_timeout"))
        else:
            self.met[owner.incarnation] = None
            owner.met[self.incarnation] = None
            self.post(delay_s, self.feed, Connected(action.handoff, owner.incarnation))

    def _start_read(self, action: StartRead) -> None:
        job = self.jobs[action.handoff]
        owner = self.prefills[job.ticket.source.instance_id]
        run = action.run
        cells = []
        for block, source_block in enumerate(memoryview(run.packed_ids).cast("q"), run.first_block):
            index = block - job.first_block
            if 0 <= index < len(job.blocks):
                cells += [(source_block, layer, job.blocks[index], block) for layer in run.layers]
        if self.world.plan.crash_on_read and self.world.rng.random() < self.world.plan.crash_on_read:
            self.world.at(self.world.rng.random() * 0.1, self.strike, owner)
        self.reads[action.read_id] = Read(
            self.world,
            self.network,
            reader=self,
            owner=owner,
            owner_incarnation=Incarnation(job.ticket.source.incarnation),
            source=owner.memory,
            target=self.memory,
            action=action,
            cells=cells,
            done=self._read_done,
            word_first=self.rules.word_first,
        )

    def _read_done(self, read: Read, cause: str | None) -> None:
        del self.reads[read.read_id]
        if cause is None:
            self.feed(ReadCompleted(read.handoff, read.read_id, 1))
        else:
            self.feed(ReadFailed(read.handoff, read.read_id, cause))

    def _end(self, handoff: HandoffId, outcome: Outcome) -> None:
        job = self.jobs[handoff]
        if handoff in self.ended:
            raise Broken("I5", f"{self.name}: {handoff} ended a second time")
        self.ended[handoff] = None
        job.outcome = outcome
        self.world.counts[outcome.state] += 1
        self._check_in_time(job)
        if outcome.state is TerminalState.DELIVERED:
            self._check_bytes(job)
        if outcome.state is TerminalState.ABORTED:
            self.memory.pass_on(job.blocks, (handoff, "pull"), (handoff, "use"))
            self._leave(job)
        elif job.reserved:
            self._use(job)
        elif outcome.state is TerminalState.FAILED:
            self.queue.remove(job)
            self._use(job)

    # What is checked

    def _check_in_time(self, job: DecodeJob) -> None:
        """I7: over by deadline + lease; only reads that did not stop may take longer, and are counted."""
        assert job.known_s is not None
        took_s = self.local_s() - job.known_s
        over_s = took_s - job.ticket.remaining_s - self.stopped_s_since(job.mark)
        if over_s > SETTINGS.lease_ttl_s + SLACK_S:
            if not job.drained:
                raise Broken("I7", f"{self.name}: {job.ticket.handoff} ended {over_s:.3f} s after its deadline")
            self.world.counts["long_drains"] += 1
            return
        self.world.worst_terminal_s = max(self.world.worst_terminal_s, took_s)
        self.world.worst_overrun_s = max(self.world.worst_overrun_s, over_s)

    def _check_bytes(self, job: DecodeJob) -> None:
        """I2: what was accepted is what was published under the word that was acknowledged."""
        handoff = job.ticket.handoff
        self.world.counts["pulled"] += bool(job.blocks)
        published = self.world.published.get((handoff, self.world.accepted.get(handoff, 0)), {})
        for block, own in enumerate(job.blocks, job.first_block):
            for layer, tag in enumerate(self.memory.cells[own]):
                if tag is None or published.get((layer, block)) != tag:
                    raise Broken(
                        "I2",
                        f"{self.name}: accepted {tag} for layer {layer} of block {block} of {handoff}, published "
                        f"was {published.get((layer, block))}",
                    )

    def check(self) -> None:
        super().check()
        for handoff in self.jobs:
            progress = self.table.progress(handoff)
            if progress is None or not progress[0]:
                continue
            now = (self.world.word_order[(handoff, progress[0])], progress[1], progress[2])
            if now < self.progress.get(handoff, now):
                raise Broken("I4", f"{self.name}: {handoff} went back from {self.progress[handoff]} to {now}")
            self.progress[handoff] = now
