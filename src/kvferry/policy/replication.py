"""Which blocks deserve another copy on another node, and on which one. Pure.

A copy is worth it where one node's copy of a block is used often: it spares the network a crossing for each use, and
the block outlives its node. All hot blocks of one prompt go to the same node, as a get is served by one node: the one
that ranks first for the prompt's first block among those that live (rendezvous hashing), so that nodes agree without
talking, and one that comes or goes moves few prompts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar

Name = TypeVar("Name", bound=Hashable)
FORGOTTEN_BELOW = 0.5


class BlockHeat(NamedTuple, Generic[Name]):
    """One block in host memory here. `heat` are its uses, older ones counting less; `root` its prompt's first block;
    `holders` the addresses of other nodes that have it."""

    name: Name
    heat: float
    depth: int
    root: bytes
    holders: tuple[str, ...] = ()


class HeatTable(Generic[Name]):
    """Uses of blocks that fade: each `fade` halves what was counted before."""

    def __init__(self) -> None:
        self._heat: dict[Name, float] = {}

    def __len__(self) -> int:
        return len(self._heat)

    def use(self, names: Iterable[Name]) -> None:
        """These blocks served a request."""
        for name in names:
            self._heat[name] = self._heat.get(name, 0.0) + 1.0

    def fade(self) -> None:
        """A period is over."""
        self._heat = {name: heat / 2 for name, heat in self._heat.items() if heat >= 2 * FORGOTTEN_BELOW}

    def heat(self, name: Name) -> float:
        """Uses of the block, faded."""
        return self._heat.get(name, 0.0)

    def at_least(self, heat: float) -> list[Name]:
        """Blocks that are this hot, the hottest first."""
        found = [(-h, at, name) for at, (name, h) in enumerate(self._heat.items()) if h >= heat]
        return [name for _, _, name in sorted(found, key=lambda each: each[:2])]


def deserve_replica(
    blocks: Sequence[BlockHeat[Name]], *, least_heat: float, max_copies: int, limit: int
) -> list[BlockHeat[Name]]:
    """Blocks whose copy here is used often and that have fewer than `max_copies`; at most `limit`, hottest first.

    A block's uses spread over its copies, so that heat which stays high with two copies asks for a third.
    """
    hot = [block for block in blocks if block.heat >= least_heat and 1 + len(block.holders) < max_copies]
    return sorted(hot, key=_hottest_first)[:limit]


def leave_first(blocks: Sequence[BlockHeat[Name]]) -> list[BlockHeat[Name]]:
    """What a node that is drained hands on, and in which order: what was used again and no other node has.

    The hottest go first, and the beginning of a prompt before what follows it and is useless without it.
    """
    return sorted((block for block in blocks if block.heat > 0 and not block.holders), key=_hottest_first)


def choose_node(block: BlockHeat[Name], nodes: Sequence[str]) -> str | None:
    """The address of the node that takes the block: of those that do not have it, the one that ranks first for its
    prompt. None where all have it."""
    able = [node for node in nodes if node not in block.holders]
    return max(able, key=lambda node: hashlib.blake2b(block.root + node.encode(), digest_size=8).digest(), default=None)


def admit_replicas(
    wanted: int, *, num_slabs: int, num_free: int, num_replicas: int, num_coming: int, max_share: float
) -> int:
    """How many of `wanted` offered blocks a node takes.

    Copies of what others have may fill what is free, and beyond that `max_share` of its memory, those that are on their
    way counted in: they must not drive out what the node's own engines computed.
    """
    room = max(num_free, int(num_slabs * max_share) - num_replicas) - num_coming
    return max(0, min(wanted, room))


def _hottest_first(block: BlockHeat[Name]) -> tuple[float, int]:
    return -block.heat, block.depth
