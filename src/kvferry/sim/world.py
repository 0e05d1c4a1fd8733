"""The simulated world: a virtual clock, an event queue, processes that crash and stop, and what was found wrong.

One seed is one world. Everything random comes from the seed's generator, in one order, so that a seed always gives
the same run: to replay a failure needs the seed and the commit, nothing else.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec

from kvferry.protocol.lease import HandoffSettings
from kvferry.types import Incarnation


class Violation(msgspec.Struct, frozen=True):
    """One broken invariant (`I1` to `I10`, or `bug` for an exception) and where it was seen."""

    seed: int
    invariant: str
    at_s: float
    what: str


class Broken(Exception):
    """Raised where an invariant is found broken; ends the run of this seed."""

    def __init__(self, invariant: str, what: str) -> None:
        super().__init__(f"{invariant}: {what}")
        self.invariant, self.what = invariant, what


class Plan(msgspec.Struct, frozen=True):
    """What a seed does to its cluster. Probabilities are per message, per read or per second, as named; seconds."""

    num_prefill: int
    num_decode: int
    num_requests: int
    prefill_blocks: int
    decode_blocks: int
    num_slots: int
    deadline_s: float
    drop: float
    duplicate: float
    late: float
    late_s: float
    slow_read: float
    slow_read_s: float
    stuck_drain: float
    corrupt: float
    digests: bool
    served_reads: bool
    num_crashes: int
    num_stops: int
    num_partitions: int
    num_preemptions: int
    num_aborts: int
    prompt_mismatch: float
    crash_on_read: float
    num_hangs: int
    num_broken: int
    prefill_failure: float
    recompute: bool


SETTINGS = HandoffSettings(
    lease_ttl_s=1.0,
    heartbeat_s=0.25,
    stall_grace_s=0.05,
    drain_s=0.5,
    ack_repeats=2,
    ack_interval_s=0.2,
    max_per_peer=2,
)
NUM_LAYERS = 2
LIMIT_S = 60.0


def draw_plan(rng: random.Random, *, digests: bool | None = None) -> Plan:
    """A plan for one seed: mostly some faults of some kinds, sometimes all of them, sometimes none."""
    calm = rng.random() < 0.1

    def some(chance: float, value: Callable[[], float]) -> float:
        return value() if not calm and rng.random() < chance else 0.0

    drawn = rng.random() < 0.25
    with_digests = drawn if digests is None else digests
    return Plan(
        num_prefill=rng.choice((1, 1, 2)),
        num_decode=rng.choice((1, 1, 2)),
        num_requests=rng.choice((2, 3, 4, 6, 8)),
        prefill_blocks=rng.choice((4, 6, 8)),
        decode_blocks=rng.choice((4, 6, 8)),
        num_slots=rng.choice((2, 3, 4)),
        deadline_s=rng.choice((2.5, 3.5, 5.0)),
        drop=some(0.5, lambda: rng.uniform(0.0, 0.3)),
        duplicate=some(0.6, lambda: rng.uniform(0.0, 0.4)),
        late=some(0.6, lambda: rng.uniform(0.0, 0.4)),
        late_s=rng.choice((0.2, 1.0, 2.0)),
        slow_read=some(0.7, lambda: rng.uniform(0.1, 0.9)),
        slow_read_s=rng.choice((0.3, 1.0, 2.5)),
        stuck_drain=some(0.3, lambda: 0.3),
        corrupt=some(0.3, lambda: 0.1) * with_digests,  # nothing else can catch it
        digests=with_digests,
        served_reads=rng.random() < 0.3,
        num_crashes=int(some(0.4, lambda: rng.choice((1, 1, 2, 3)))),
        num_stops=int(some(0.5, lambda: rng.choice((1, 2, 3)))),
        num_partitions=int(some(0.4, lambda: rng.choice((1, 2)))),
        num_preemptions=int(some(0.6, lambda: rng.choice((1, 2, 4, 6)))),
        num_aborts=int(some(0.3, lambda: rng.choice((1, 2)))),
        prompt_mismatch=some(0.1, lambda: 0.3),
        crash_on_read=some(0.15, lambda: rng.choice((0.05, 0.2))),
        num_hangs=int(some(0.1, lambda: 1)),
        num_broken=int(some(0.2, lambda: rng.choice((1, 3)))),
        prefill_failure=some(0.1, lambda: 0.15),
        recompute=rng.random() < 0.85,
    )


class World:
    """The clock, the queue and the findings of one seed."""

    def __init__(self, seed: int, plan: Plan, rng: random.Random, *, trace: bool = False) -> None:
        self.seed = seed
        self.plan = plan
        self.rng = rng
        self.now_s = 0.0
        self.trace: list[str] | None = [] if trace else None
        self.processes: dict[Incarnation, Process] = {}
        self.counts: Counter[str] = Counter()
        self.num_steps = 0
        self.worst_terminal_s = 0.0
        self.worst_overrun_s = 0.0
        self.accepted: dict[str, int] = {}  # handoff -> the word under which its target took the bytes
        self.published: dict[tuple[str, int], dict[tuple[int, int], object]] = {}  # (handoff, word) -> (layer, block)
        self.word_order: dict[tuple[str, int], int] = {}
        self._queue: list[tuple[float, int, Process | None, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def at(self, delay_s: float, call: Callable[..., None], *args: Any) -> None:
        """Let something happen that no process does: faults, and bytes on their way."""
        self._count += 1
        heapq.heappush(self._queue, (self.now_s + delay_s, self._count, None, 0, call, args))

    def post(self, process: Process, delay_s: float, call: Callable[..., None], *args: Any) -> None:
        """Let `process` do something later; it won't if it crashes before, and waits while it is stopped."""
        self._count += 1
        heapq.heappush(self._queue, (self.now_s + delay_s, self._count, process, process.epoch, call, args))

    def run(self) -> None:
        """Let everything happen that will. Raises: Broken."""
        queue = self._queue
        while queue:
            self.now_s, _, process, epoch, call, args = heapq.heappop(queue)
            if self.now_s > LIMIT_S:
                raise Broken("I9", f"still busy after {LIMIT_S} s")
            if process is not None:
                if process.epoch != epoch:
                    continue
                if process.stopped:
                    process.deferred.append((call, args))
                    continue
            self.num_steps += 1
            call(*args)

    def log(self, who: str, what: str) -> None:
        """Add a line to the story. Callers build `what` only if `trace` is on."""
        if self.trace is not None:
            self.trace.append(f"{self.now_s:9.4f} {who:8} {what}")


class Process:
    """One process of the cluster: it can crash, come back as another incarnation, and be stopped like by SIGSTOP."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.epoch = 0
        self.alive = True
        self.stopped = False
        self.stopped_since_s = 0.0
        self.stopped_total_s = 0.0
        self.deferred: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self.incarnation = Incarnation(0)
        self.clock_offset_s = 0.0
        self.start()

    def start(self) -> None:
        """Be born, or born again: a new incarnation, whose clock starts anywhere."""
        rng = self.world.rng
        self.alive = True
        self.incarnation = Incarnation(rng.getrandbits(63) | 1)
        self.clock_offset_s = rng.uniform(0.0, 1000.0)
        self.world.processes[self.incarnation] = self

    def local_s(self) -> float:
        """This process's own monotonic clock."""
        return self.world.now_s + self.clock_offset_s

    def post(self, delay_s: float, call: Callable[..., None], *args: Any) -> None:
        self.world.post(self, delay_s, call, *args)

    def crash(self) -> None:
        """Die at once. What was scheduled here never happens."""
        self.world.counts["crashes"] += 1
        self.world.log(self.name, "crashes")
        self.alive = False
        self.stopped = False
        self.deferred.clear()
        self.epoch += 1
        del self.world.processes[self.incarnation]

    def stop(self) -> None:
        """Freeze until `resume`; what comes in meanwhile waits in its sockets."""
        if self.alive and not self.stopped:
            self.world.counts["stops"] += 1
            self.world.log(self.name, "is stopped")
            self.stopped = True
            self.stopped_since_s = self.world.now_s

    def resume(self) -> None:
        """Go on. What waited is read before any timer fires."""
        if not self.stopped:
            return
        self.stopped = False
        lag_s = self.world.now_s - self.stopped_since_s
        self.stopped_total_s += lag_s
        self.world.log(self.name, f"goes on after {lag_s:.3f} s")
        waiting, self.deferred = self.deferred, []
        self.resumed(lag_s)
        for call, args in waiting:
            self.post(0.0, call, *args)

    def resumed(self, lag_s: float) -> None:
        """What this process does first after a stop."""
