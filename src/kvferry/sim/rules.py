"""The rules R1 to R11 as switches: each mutant breaks one of them, to show that the checker finds it.

A rule of the tables is broken by overriding the one method that keeps it; a rule of transports, engines and routers
by a flag that their models read. Production code knows nothing of this.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import msgspec

from kvferry.errors import ConfigError
from kvferry.protocol.events import Action, ZeroWord
from kvferry.protocol.lease import HandoffSettings, Lease
from kvferry.protocol.records import SourceRecord, TargetRecord
from kvferry.protocol.source import SourceHandoffs
from kvferry.protocol.target import TargetHandoffs
from kvferry.sim.world import NUM_LAYERS, SETTINGS, World
from kvferry.types import Incarnation, Word

RULES = {
    "R1": "the word is zeroed before any block of the lease is reused",
    "R2": "the reader loads the word after its last read completed",
    "R3": "a word never repeats, also across restarts",
    "R4": "the word lives and dies with the bytes",
    "R5": "publish only after the kernel that wrote the blocks has completed",
    "R6": "a new word discards progress",
    "R7": "the target drains its own reads before it frees, retries or recomputes",
    "R8": "blocks are freed only by claiming the lease, once",
    "R9": "the router forwards the current attempt only",
    "R10": "the ack carries the word",
    "R11": "closed handoffs leave a tombstone until deadline + lease",
}


class Rules:
    """Which rules hold, and what to build accordingly."""

    def __init__(self, off: Iterable[str] = ()) -> None:
        self.off = frozenset(off)
        unknown = sorted(self.off - set(RULES))
        if unknown:
            raise ConfigError(f"--rules-off: {', '.join(unknown)} is no rule; the rules are {', '.join(RULES)}")
        self.word_first = "R2" in self.off
        self.words_survive = "R4" in self.off
        self.publish_early = "R5" in self.off
        self.forward_all = "R9" in self.off

    def transform(self, actions: list[Action]) -> list[Action]:
        """What the instance really carries out."""
        if "R1" in self.off:
            return [a for a in actions if not isinstance(a, ZeroWord)]
        return actions

    def source_table(self, incarnation: Incarnation, world: World) -> SourceHandoffs:
        """A source table for a process that starts now."""
        count = itertools.count()
        rng = world.rng

        def nonce() -> Word:
            # Broken: a counter of few bits, which wraps, and starts again with the process.
            return Word(1 + next(count) % 3 if "R3" in self.off else rng.getrandbits(63) | 1)

        settings = msgspec.structs.replace(SETTINGS, num_slots=world.plan.num_slots)
        if not self.off & {"R8", "R10", "R11"}:
            return SourceHandoffs(incarnation, settings, nonce)
        return _BrokenSource(incarnation, settings, nonce, self.off)

    def target_table(self, incarnation: Incarnation, world: World) -> TargetHandoffs:
        """A target table for a process that starts now."""
        settings = msgspec.structs.replace(SETTINGS, recompute_on_failure=world.plan.recompute)
        if not self.off & {"R6", "R7", "R11"}:
            return TargetHandoffs(incarnation, settings, NUM_LAYERS)
        return _BrokenTarget(incarnation, settings, NUM_LAYERS, self.off)


class _BrokenSource(SourceHandoffs):
    def __init__(
        self, incarnation: Incarnation, settings: HandoffSettings, new_word: Callable[[], Word], off: frozenset[str]
    ) -> None:
        super().__init__(incarnation, settings, new_word)
        self._off = off

    def _claim(self, lease: Lease) -> bool:
        return super()._claim(lease) or "R8" in self._off

    def _names_lease(self, record: SourceRecord, word: Word) -> bool:
        return super()._names_lease(record, word) or "R10" in self._off

    def _entomb(self, record: SourceRecord) -> None:
        if "R11" in self._off:
            self._forget(record)
        else:
            super()._entomb(record)


class _BrokenTarget(TargetHandoffs):
    def __init__(
        self, incarnation: Incarnation, settings: HandoffSettings, num_layers: int, off: frozenset[str]
    ) -> None:
        super().__init__(incarnation, settings, num_layers)
        self._off = off

    def _discard(self, record: TargetRecord, now_s: float) -> list[Action]:
        return [] if "R6" in self._off else super()._discard(record, now_s)

    def _reads_pending(self, record: TargetRecord) -> bool:
        return super()._reads_pending(record) and "R7" not in self._off

    def _entomb(self, record: TargetRecord) -> None:
        if "R11" in self._off:
            self._forget(record)
        else:
            super()._entomb(record)
