"""A prefill instance: the real source table, around it a model of an engine."""

from __future__ import annotations

from collections import deque
from typing import Any

from kvferry.protocol.events import (
    Action,
    Cancelled,
    Failed,
    Offered,
    Preempted,
    Published,
    Refused,
    ReleaseBlocks,
    ReleaseReason,
    Revoked,
    Sealed,
    Send,
    StoreWord,
    ZeroWord,
)
from kvferry.protocol.messages import Run
from kvferry.protocol.source import SourceHandoffs
from kvferry.sim.instance import SLACK_S, Instance
from kvferry.sim.world import NUM_LAYERS, SETTINGS, Broken
from kvferry.types import HandoffId, HandoffTicket


class PrefillJob:
    """One prefill request in the engine of P."""

    def __init__(self, ticket: HandoffTicket, num_blocks: int, digest: bytes, *, by_layer: bool) -> None:
        self.ticket, self.num_blocks, self.digest = ticket, num_blocks, digest
        everything, half = range(num_blocks), num_blocks // 2
        if by_layer:
            self.steps = [(range(layer, layer + 1), everything) for layer in range(NUM_LAYERS)]
        else:
            self.steps = [(range(NUM_LAYERS), everything[:half]), (range(NUM_LAYERS), everything[half:])]
        self.blocks: list[int] = []
        self.generation = 0
        self.word = 0
        self.offered_s = 0.0
        self.mark = 0.0  # how long the process had been stopped in all, when this was offered
        self.offered = False
        self.sealed = False

    @property
    def owner(self) -> object:
        return (self.ticket.handoff, self.generation)


class Prefill(Instance):
    """A prefill instance: computes prompts in steps, publishes each, and lets its blocks go when told to."""

    table: SourceHandoffs

    def start(self) -> None:
        super().start()
        self.table = self.rules.source_table(self.incarnation, self.world)
        self.jobs: dict[HandoffId, PrefillJob] = {}
        self.queue: deque[PrefillJob] = deque()
        self.offered: dict[HandoffId, None] = {}
        self.leases: dict[tuple[HandoffId, int], None] = {}  # open ones

    # The router's requests

    def prefill(self, ticket: HandoffTicket, num_blocks: int, digest: bytes) -> None:
        handoff = ticket.handoff
        if handoff in self.jobs or (self.world.rng.random() < 0.5 and self.table.knows(handoff)):
            return
        job = PrefillJob(ticket, num_blocks, digest, by_layer=self.world.rng.random() < 0.6)
        self.jobs[handoff] = job
        self.queue.append(job)
        self.post(ticket.remaining_s, self._drop_queued, job)
        self._pump()

    def cancel(self, handoff: HandoffId, remaining_s: float) -> None:
        """The router closed its connection."""
        job = self.jobs.get(handoff)
        if job is not None and not job.offered:
            self._drop_queued(job)
        self.feed(Cancelled(handoff, "aborted", remaining_s))

    def _drop_queued(self, job: PrefillJob) -> None:
        if job in self.queue and not job.offered:
            self.queue.remove(job)
            del self.jobs[job.ticket.handoff]

    # The engine

    def _pump(self) -> None:
        while self.queue and len(self.memory.free) >= self.queue[0].num_blocks:
            job = self.queue.popleft()
            job.blocks = self.memory.take(job.num_blocks, job.owner)
            if not job.offered:
                handoff = job.ticket.handoff
                job.offered, job.offered_s, job.mark = True, self.local_s(), self.stopped_total_s
                self.feed(Offered(job.ticket, job.digest, job.num_blocks))
                if handoff not in self.jobs:
                    continue  # refused
            self._plan_step(job, 0)

    def _plan_step(self, job: PrefillJob, step: int) -> None:
        self.post(0.01 + self.world.rng.random() * 0.15, self._compute, job, job.generation, step)

    def _compute(self, job: PrefillJob, generation: int, step: int) -> None:
        """One step is done: its kernel has completed, so its run is published (R5)."""
        if self.jobs.get(job.ticket.handoff) is not job or job.generation != generation:
            return
        if self.rules.publish_early:
            self.post(self.world.rng.random() * 0.1, self._write, job, generation, step)
        else:
            self._write(job, generation, step)
        if self.world.plan.prefill_failure and self.world.rng.random() < self.world.plan.prefill_failure:
            self.feed(Failed(job.ticket.handoff, "out_of_memory"))
            return
        layers, blocks = job.steps[step]
        run = Run.of(layers, blocks.start, job.blocks[blocks.start : blocks.stop])
        published = self.world.published.setdefault((job.ticket.handoff, job.word), {})
        for layer in layers:
            for index in blocks:
                published[(layer, index)] = (job.owner, layer, index)
        self.feed(Published(job.ticket.handoff, run))
        if step + 1 < len(job.steps):
            self._plan_step(job, step + 1)
        else:
            job.sealed = True
            self.feed(Sealed(job.ticket.handoff))

    def _write(self, job: PrefillJob, generation: int, step: int) -> None:
        if self.jobs.get(job.ticket.handoff) is not job or job.generation != generation:
            return
        layers, blocks = job.steps[step]
        for layer in layers:
            for index in blocks:
                self.memory.write(job.blocks[index], layer, (job.owner, layer, index), job.owner)

    def preempt(self) -> None:
        """Under pressure: take the blocks of a request that computes (or, rarely, one that is sealed)."""
        rng = self.world.rng
        jobs = [j for j in self.jobs.values() if j.blocks]
        if not jobs:
            return
        job = rng.choice(jobs)
        if job.sealed and rng.random() < 0.3:
            victims = self.table.pressure_order()
            if victims:
                self.feed(Revoked(victims[0]))
            return
        self.world.counts["preemptions"] += 1
        self.feed(Preempted(job.ticket.handoff))

    def _reuse(self, count: int) -> None:
        """Requests that are nobody's handoff take free blocks and overwrite them."""
        blocks = self.memory.take(min(count, len(self.memory.free)), "local")
        for block in blocks:
            for layer in range(NUM_LAYERS):
                self.memory.write(block, layer, "reused", "local")
        self.post(self.world.rng.random() * 0.2, self._end_reuse, blocks)

    def _end_reuse(self, blocks: list[int]) -> None:
        self.memory.give(blocks, "local")
        self._pump()

    # Actions

    def act(self, action: Action, event: Any) -> None:
        match action:
            case Send():
                self.send(action.peer, action.message)
            case StoreWord():
                self.memory.words[action.slot] = action.word
                handoff = event.ticket.handoff if isinstance(event, Offered) else event.handoff
                if isinstance(event, Offered):
                    if handoff in self.offered:
                        raise Broken("I5", f"{self.name}: {handoff} is prefilled again after it was closed (R11)")
                    self.offered[handoff] = None
                self.jobs[handoff].word = action.word
                self.leases[(handoff, action.word)] = None
                self.world.word_order[(handoff, action.word)] = len(self.world.word_order)
            case ZeroWord():
                self.memory.words[action.slot] = 0
            case ReleaseBlocks():
                self._release(action)
            case Refused():
                job = self.jobs.pop(action.handoff)
                self.memory.give(job.blocks, job.owner)
            case _:
                raise Broken("bug", f"{self.name}: a source cannot {action}")

    def _release(self, action: ReleaseBlocks) -> None:
        lease = (action.handoff, action.word)
        if lease not in self.leases:
            raise Broken("I5", f"{self.name}: the blocks of {lease} are freed twice (R8)")
        del self.leases[lease]
        if action.reason is ReleaseReason.ACKED and self.world.accepted.get(action.handoff) != action.word:
            raise Broken("I5", f"{self.name}: an ack freed the lease {lease}, which nobody acknowledged (R10)")
        self.world.counts[f"released_{action.reason}"] += 1
        job = self.jobs[action.handoff]
        if job in self.queue:
            self.queue.remove(job)
        if action.reason is ReleaseReason.PREEMPTED:
            self._free(job)
            job.generation += 1
            job.sealed = False
            self.queue.append(job)
            return
        bound_s = job.ticket.remaining_s + SETTINGS.lease_ttl_s + self.stopped_s_since(job.mark)
        if self.local_s() - job.offered_s > bound_s + SLACK_S:
            raise Broken("I7", f"{self.name}: {action.handoff} kept its blocks {self.local_s() - job.offered_s:.3f} s")
        # The engine learns of it at its next turn; until then it may go on to compute and publish.
        self.post(self.world.rng.choice((0.0, 0.0, 0.2)) * self.world.rng.random(), self._drop, job)

    def _drop(self, job: PrefillJob) -> None:
        """The engine has learned that this request is over."""
        del self.jobs[job.ticket.handoff]
        self._free(job)

    def _free(self, job: PrefillJob) -> None:
        """Give the blocks back; mostly somebody else uses them at once."""
        self.memory.give(job.blocks, job.owner)
        if self.world.rng.random() < 0.8:
            self.post(0.0, self._reuse, len(job.blocks))
        else:
            self.post(0.0, self._pump)
        job.blocks = []
