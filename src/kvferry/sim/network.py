"""A network that loses, delays, doubles, reorders and partitions; and reads that copy memory bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvferry.protocol.events import StartRead
from kvferry.sim.world import Broken, Process, World
from kvferry.types import Incarnation

Tag = object
"""What a cell holds: a value that names the computation that wrote it."""


class Network:
    """Messages between processes. An edge that is cut holds or loses what is sent over it."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._cut_until: dict[tuple[str, str], float] = {}

    def cut(self, a: Process, b: Process, seconds: float) -> None:
        """Partition the edge between two processes."""
        self._world.counts["partitions"] += 1
        self._world.log("network", f"{a.name} and {b.name} cannot reach each other for {seconds:.3f} s")
        until_s = self._world.now_s + seconds
        self._cut_until[(a.name, b.name)] = self._cut_until[(b.name, a.name)] = until_s

    def cut_s(self, a: Process, b: Process) -> float:
        """For how long from now this edge stays cut; 0 if it is whole."""
        return max(0.0, self._cut_until.get((a.name, b.name), 0.0) - self._world.now_s)

    def send(self, source: Process, target: Process, call: Callable[..., None], *args: Any) -> None:
        """Deliver never, once or twice, now or late. A target that has crashed since gets nothing."""
        plan, rng = self._world.plan, self._world.rng
        cut_s = self.cut_s(source, target)
        if cut_s:
            if rng.random() < 0.5:  # what TCP sends again once the path is back
                self._world.post(target, cut_s + rng.uniform(0.0, 0.1), call, *args)
            return
        if plan.drop and rng.random() < plan.drop:
            self._world.counts["dropped"] += 1
            return
        self._world.post(target, self._delay_s(), call, *args)
        if plan.duplicate and rng.random() < plan.duplicate:
            self._world.counts["duplicated"] += 1
            self._world.post(target, self._delay_s(), call, *args)

    def request(self, target: Process, call: Callable[..., None], *args: Any) -> None:
        """The router's HTTP request: to whatever process runs at that address when it arrives."""
        plan, rng = self._world.plan, self._world.rng
        if plan.drop and rng.random() < plan.drop / 2:
            self._world.counts["dropped"] += 1
            return
        self._world.at(self._delay_s(), self._arrive, target, call, args)
        if plan.duplicate and rng.random() < plan.duplicate:
            self._world.counts["duplicated"] += 1
            self._world.at(self._delay_s(), self._arrive, target, call, args)

    def _arrive(self, target: Process, call: Callable[..., None], args: tuple[Any, ...]) -> None:
        if target.alive:
            self._world.post(target, 0.0, call, *args)

    def _delay_s(self) -> float:
        plan, rng = self._world.plan, self._world.rng
        if plan.late and rng.random() < plan.late:
            self._world.counts["late"] += 1
            return rng.random() * plan.late_s
        return 0.0005 + rng.random() * 0.004


class Memory:
    """One instance's KV memory and its word table. It is the machine's: a crash of the process only frees it.

    Cell [block][layer] holds a tag. `owner[block]` is who uses the block now, None if it is free.
    """

    def __init__(self, name: str, num_blocks: int, num_layers: int, num_slots: int) -> None:
        self.name = name
        self.num_blocks = num_blocks
        self.cells: list[list[Tag]] = [[None] * num_layers for _ in range(num_blocks)]
        self.words = [0] * num_slots
        self.owner: list[object] = [None] * num_blocks
        self.free: list[int] = list(range(num_blocks))

    def take(self, count: int, owner: object) -> list[int]:
        """Allocate blocks; the caller has looked that there are enough."""
        blocks = [self.free.pop() for _ in range(count)]
        for block in blocks:
            if self.owner[block] is not None:
                raise Broken("I1", f"{self.name}: block {block} was free and belonged to {self.owner[block]}")
            self.owner[block] = owner
        return blocks

    def give(self, blocks: list[int], owner: object) -> None:
        """Free blocks that `owner` holds."""
        for block in blocks:
            if self.owner[block] != owner:
                raise Broken("I1", f"{self.name}: {owner} frees block {block}, which belongs to {self.owner[block]}")
            self.owner[block] = None
        self.free.extend(blocks)

    def pass_on(self, blocks: list[int], owner: object, new_owner: object) -> None:
        """Use blocks for something else from now on."""
        for block in blocks:
            if self.owner[block] != owner:
                raise Broken("I3", f"{self.name}: {owner} uses block {block}, which belongs to {self.owner[block]}")
            self.owner[block] = new_owner

    def write(self, block: int, layer: int, tag: Tag, owner: object) -> None:
        """Store a cell; only its owner may (I3)."""
        if self.owner[block] != owner:
            raise Broken("I3", f"{self.name}: {owner} writes block {block}, which belongs to {self.owner[block]}")
        self.cells[block][layer] = tag

    def check(self) -> None:
        """I1: every block is free or owned, never both, never neither."""
        owned = self.num_blocks - self.owner.count(None)
        if len(self.free) + owned != self.num_blocks:
            raise Broken("I1", f"{self.name}: {len(self.free)} free and {owned} owned of {self.num_blocks} blocks")

    def freed_by_crash(self, *, words_survive: bool) -> None:
        """The process died: its memory is anybody's now, and so is the word table, which lies in it (R4)."""
        for row in self.cells:
            row[:] = ["freed"] * len(row)
        if not words_survive:
            self.words = [0] * len(self.words)
        self.owner = [None] * self.num_blocks
        self.free = list(range(self.num_blocks))


class Read:
    """One read under way: cells are copied in a few steps; then the word is loaded; then the reader hears of it."""

    def __init__(
        self,
        world: World,
        network: Network,
        *,
        reader: Process,
        owner: Process,
        owner_incarnation: Incarnation,
        source: Memory,
        target: Memory,
        action: StartRead,
        cells: list[tuple[int, int, int, int]],
        done: Callable[[Read, str | None], None],
        word_first: bool,
    ) -> None:
        self.handoff, self.read_id = action.handoff, action.read_id
        self._world, self._network = world, network
        self._reader, self._owner, self._owner_incarnation = reader, owner, owner_incarnation
        self._epoch = reader.epoch
        self._source, self._target = source, target
        self._word, self._slot = action.word, action.slot
        self._cells = cells  # (source block, layer, target block, prompt block)
        self._done = done
        self._word_first = word_first
        self._word_was_right = source.words[action.slot] == action.word
        self._intact = True
        self._over = False
        self._outlives_owner = world.rng.random() < 0.6
        plan, rng = world.plan, world.rng
        slow = plan.slow_read and rng.random() < plan.slow_read
        self._step_s = rng.random() * (plan.slow_read_s if slow else 0.02) / 2
        rng.shuffle(cells)
        self._corrupt = bool(plan.corrupt) and rng.random() < plan.corrupt
        world.at(rng.random() * 0.002, self._step)

    def _step(self) -> None:
        """Copy a part of what is left, or finish."""
        world = self._world
        if self._over or self._reader.epoch != self._epoch:
            return
        wait_s = self._network.cut_s(self._reader, self._owner)
        if self._owner.stopped and world.plan.served_reads:
            wait_s = max(wait_s, 0.05)
        if wait_s:
            world.at(wait_s, self._step)
            return
        owner_lives = self._owner.alive and self._owner.incarnation == self._owner_incarnation
        if not owner_lives and (world.plan.served_reads or not self._outlives_owner):
            self.end("peer_gone")
            return
        for _ in range((len(self._cells) + 1) // 2 or 1):
            if not self._cells:
                break
            source_block, layer, target_block, block = self._cells.pop()
            tag = self._source.cells[source_block][layer]
            if self._corrupt:
                tag, self._corrupt = "corrupt", False
                world.counts["corrupted"] += 1
            self._target.write(target_block, layer, tag, (self.handoff, "pull"))
            published = world.published.get((self.handoff, self._word), {})
            self._intact = self._intact and published.get((layer, block)) == tag
        if self._cells:
            world.at(self._step_s, self._step)
        else:
            world.at(self._step_s * 0.2, self._finish)

    def _finish(self) -> None:
        if self._over or self._reader.epoch != self._epoch:
            return
        if not (self._word_was_right if self._word_first else self._source.words[self._slot] == self._word):
            self.end("lease_expired")
        elif self._world.plan.digests and not self._intact:
            self.end("integrity_error")
        else:
            self.end(None)

    def stop(self) -> None:
        """Ask the read to stop; most do soon, some hang."""
        plan, rng = self._world.plan, self._world.rng
        stuck = plan.stuck_drain and rng.random() < plan.stuck_drain
        self._world.at(rng.random() * (4.0 if stuck else 0.02), self.end, "handoff_aborted")

    def end(self, cause: str | None) -> None:
        """No further byte lands; tell the reader, once."""
        if not self._over:
            self._over = True
            if self._reader.epoch == self._epoch:
                self._reader.post(0.0, self._done, self, cause)
