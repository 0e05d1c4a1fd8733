"""Fault search: run seeds, each a small cluster with its own faults, and collect what broke."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor

import msgspec

from kvferry.errors import InvalidTransition
from kvferry.protocol.events import Serving
from kvferry.sim.decode import Decode
from kvferry.sim.instance import Instance
from kvferry.sim.network import Memory, Network
from kvferry.sim.prefill import Prefill
from kvferry.sim.router import Router
from kvferry.sim.rules import Rules
from kvferry.sim.world import NUM_LAYERS, Broken, Plan, Violation, World, draw_plan


class SeedResult(msgspec.Struct, frozen=True):
    """What one seed gave. `story` is empty unless it was asked for."""

    seed: int
    violation: Violation | None
    plan: Plan
    num_steps: int
    worst_terminal_s: float
    worst_overrun_s: float
    counts: dict[str, int]
    story: tuple[str, ...] = ()


class Report(msgspec.Struct, frozen=True):
    """What a range of seeds gave.

    Attributes:
        worst_terminal_s: the longest time from a target's reservation to its terminal state.
        worst_overrun_s: the longest time past the deadline (a lease is allowed), stops of the target not counted.
        counts: outcomes, faults and other events, summed up.
    """

    runs: int
    violations: tuple[Violation, ...]
    worst_terminal_s: float
    worst_overrun_s: float
    long_drains: int
    delivered: int
    steps: int
    duration_s: float
    rules_off: tuple[str, ...]
    counts: dict[str, int]


def run_seed(seed: int, rules: Rules | None = None, *, trace: bool = False, digests: bool | None = None) -> SeedResult:
    """Run one seed until it is quiet or an invariant is broken.

    `digests` overrides what the seed draws. With a broken rule they are off: they would hide what the rule lets
    through, and the rules must hold without them.
    """
    rules = rules or Rules()
    rng = random.Random(seed)
    plan = draw_plan(rng, digests=False if rules.off else digests)
    world = World(seed, plan, rng, trace=trace)
    violation = None
    try:
        cluster = _Cluster(world, rules)
        world.run()
        cluster.check_quiet()
    except Broken as broken:
        violation = Violation(seed, broken.invariant, world.now_s, broken.what)
    except (InvalidTransition, LookupError, ValueError, TypeError, AttributeError, AssertionError) as error:
        violation = Violation(seed, "bug", world.now_s, f"{type(error).__name__}: {error}")
    return SeedResult(
        seed,
        violation,
        plan,
        world.num_steps,
        world.worst_terminal_s,
        world.worst_overrun_s,
        dict(world.counts),
        tuple(world.trace or ()),
    )


def run_seeds(seeds: Sequence[int], rules_off: Iterable[str] = (), *, num_processes: int = 1) -> Report:
    """Run all seeds and sum up; I10 is broken if 100 seeds or more hand no block over."""
    start_s = time.monotonic()
    rules_off = tuple(rules_off)
    Rules(rules_off)  # refuse unknown names here, not in a worker
    chunks = [seeds[i : i + 250] for i in range(0, len(seeds), 250)]
    if num_processes > 1 and len(chunks) > 1:
        with ProcessPoolExecutor(num_processes) as pool:
            parts = list(pool.map(_run_chunk, chunks, [rules_off] * len(chunks)))
    else:
        parts = [_run_chunk(chunk, rules_off) for chunk in chunks]
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(part.counts)
    violations = [v for part in parts for v in part.violations]
    if len(seeds) >= 100 and not counts["pulled"]:
        violations.append(Violation(seeds[0], "I10", 0.0, f"none of {len(seeds)} seeds handed blocks over"))
    return Report(
        runs=len(seeds),
        violations=tuple(violations),
        worst_terminal_s=max((p.worst_terminal_s for p in parts), default=0.0),
        worst_overrun_s=max((p.worst_overrun_s for p in parts), default=0.0),
        long_drains=counts["long_drains"],
        delivered=counts["delivered"],
        steps=sum(p.steps for p in parts),
        duration_s=time.monotonic() - start_s,
        rules_off=rules_off,
        counts=dict(sorted(counts.items())),
    )


def seeds_until_caught(rule: str, limit: int, *, first_seed: int = 0) -> SeedResult | None:
    """The first seed that breaks an invariant with `rule` switched off; None if `limit` seeds don't."""
    rules = Rules([rule])
    for seed in range(first_seed, first_seed + limit):
        result = run_seed(seed, rules)
        if result.violation is not None:
            return result
    return None


class _Part(msgspec.Struct):
    violations: list[Violation]
    worst_terminal_s: float
    worst_overrun_s: float
    steps: int
    counts: dict[str, int]


def _run_chunk(seeds: Sequence[int], rules_off: tuple[str, ...]) -> _Part:
    rules = Rules(rules_off)
    counts: Counter[str] = Counter()
    part = _Part([], 0.0, 0.0, 0, counts)
    for seed in seeds:
        result = run_seed(seed, rules)
        if result.violation is not None:
            part.violations.append(result.violation)
        part.worst_terminal_s = max(part.worst_terminal_s, result.worst_terminal_s)
        part.worst_overrun_s = max(part.worst_overrun_s, result.worst_overrun_s)
        part.steps += result.num_steps
        counts.update(result.counts)
    part.counts = dict(counts)
    return part


class _Cluster:
    """The processes of one seed, and what is done to them."""

    def __init__(self, world: World, rules: Rules) -> None:
        plan = world.plan
        self._world = world
        self._network = network = Network(world)
        self._prefills = [
            Prefill(world, f"P{i}", network, rules, Memory(f"P{i}", plan.prefill_blocks, NUM_LAYERS, plan.num_slots))
            for i in range(plan.num_prefill)
        ]
        self._decodes = [
            Decode(world, f"D{i}", network, rules, Memory(f"D{i}", plan.decode_blocks, NUM_LAYERS, 1))
            for i in range(plan.num_decode)
        ]
        self._instances: list[Instance] = [*self._prefills, *self._decodes]
        self._router = Router(world, network, rules, self._prefills, self._decodes)
        for decode in self._decodes:
            decode.prefills = {p.name: p for p in self._prefills}
            decode.strike = self._crash
        for instance in self._instances:
            instance.router = self._router
        self._schedule()

    def _schedule(self) -> None:
        world, rng, plan = self._world, self._world.rng, self._world.plan
        until_s = rng.choice((1.0, 2.0, 4.0))
        for i in range(plan.num_requests):
            world.at(rng.random() * until_s / 2, self._router.arrive, f"request{i}")
        for _ in range(plan.num_crashes):
            instances = self._prefills if rng.random() < 0.6 else self._decodes
            world.at(rng.random() * until_s, self._crash, rng.choice(instances))
        for _ in range(plan.num_stops):
            world.at(rng.random() * until_s, self._stop, rng.choice(self._instances))
        for _ in range(plan.num_partitions):
            world.at(rng.random() * until_s, self._cut, rng.choice(self._prefills), rng.choice(self._decodes))
        for _ in range(plan.num_preemptions):
            world.post(rng.choice(self._prefills), rng.random() * until_s, self._preempt, rng.choice(self._prefills))
        for _ in range(plan.num_hangs):
            world.at(rng.random() * until_s, self._hang, rng.choice(self._instances))
        for _ in range(plan.num_broken):
            world.at(rng.random() * until_s, self._router.lost, rng.choice(self._decodes))
        for _ in range(plan.num_aborts):
            world.at(rng.random() * until_s, self._abort)

    def _crash(self, instance: Instance) -> None:
        if instance.alive:
            instance.crash()
            rng = self._world.rng
            self._world.at(rng.choice((0.02, 0.8)) * rng.random(), self._restart, instance)
            if rng.random() < 0.7:
                self._world.at(rng.random() * 0.05, self._router.lost, instance)

    def _restart(self, instance: Instance) -> None:
        self._world.log(instance.name, "starts again")
        instance.start()

    def _stop(self, instance: Instance) -> None:
        if instance.alive and not instance.stopped:
            instance.stop()
            self._world.at(0.1 + self._world.rng.random() * 2.5, instance.resume)

    def _cut(self, prefill: Prefill, decode: Decode) -> None:
        rng = self._world.rng
        self._network.cut(prefill, decode, 0.1 + rng.random() * 2.5)
        if rng.random() < 0.3:  # the connection breaks too
            for here, there in ((prefill, decode), (decode, prefill)):
                if there.incarnation in here.met:
                    here.post(rng.random() * 0.5, here.lost, there.incarnation)

    def _preempt(self, prefill: Prefill) -> None:
        if prefill.alive and not prefill.stopped:
            prefill.preempt()

    def _hang(self, instance: Instance) -> None:
        """Its serving loop hangs, while its other threads go on."""
        if instance.alive:
            self._world.counts["hangs"] += 1
            instance.post(0.0, instance.feed, Serving(False))
            instance.post(0.5 + self._world.rng.random() * 2.0, instance.feed, Serving(True))

    def _abort(self) -> None:
        if self._router.requests:
            self._router.abort(self._world.rng.choice(self._router.requests))

    def check_quiet(self) -> None:
        """Nothing will happen any more: everything must have ended and been given back (I1, I7, I8, I9)."""
        for request in self._router.requests:
            if request.end is None:
                raise Broken("I9", f"{request.name} waits for ever")
        for instance in self._instances:
            memory = instance.memory
            if len(memory.free) != memory.num_blocks:
                raise Broken("I1", f"{instance.name}: {memory.num_blocks - len(memory.free)} blocks are never freed")
            if len(instance.table):
                raise Broken("I8", f"{instance.name}: {len(instance.table)} handoffs are kept for ever")
