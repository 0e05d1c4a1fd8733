"""Namespace epochs: which removals a node has heard of. Pure.

Each removal of blocks gives its space a new epoch, a random number, in the directory and on every node that hears of
it. A node knows the epochs that it went through. So it sees from the directory's current one whether it missed a
removal: then it forgets the whole space, as it can't know which blocks were meant. A copy that travels between nodes
is taken only where both are in the same epoch, from its first byte to its commit.

Numbers that count would not do: a directory that was lost and begins anew would give the same ones again.
"""

from __future__ import annotations

import secrets
from typing import Literal, NewType

import msgspec

from kvferry.pool.keys import BlockSpace

Epoch = NewType("Epoch", int)
FIRST = Epoch(0)
"""Of a space of which nothing was ever removed."""
REMEMBERED = 64


def new_epoch() -> Epoch:
    """A fresh one: 63 random bits, never `FIRST`."""
    return Epoch(secrets.randbits(63) | 1)


class Epochs:
    """The epochs that a node went through, by space, the current one last; each with the one that it follows."""

    def __init__(self) -> None:
        self._known: dict[BlockSpace, dict[Epoch, Epoch]] = {}
        # The directory, by the number that it was born with, that last agreed to all of this; and where it did not yet.
        self.agreed_with = FIRST
        self.own: set[BlockSpace] = set()

    def current(self, space: BlockSpace) -> Epoch:
        """The last one that the node entered."""
        known = self._known.get(space)
        return next(reversed(known)) if known else FIRST

    def all(self) -> dict[BlockSpace, Epoch]:
        """The current epoch of each space in which something was removed."""
        return {space: self.current(space) for space in self._known}

    def knows(self, space: BlockSpace, epoch: Epoch) -> bool:
        """Whether the node went through this epoch, so that it missed nothing up to it. Old ones are forgotten, which
        reads as not known."""
        known = self._known.get(space, {})
        return epoch in known or (epoch == FIRST and len(known) < REMEMBERED)

    def enter(self, space: BlockSpace, epoch: Epoch, previous: Epoch, *, emptied: bool = False) -> None:
        """The node heard of the removal that began this epoch; nothing new where it had heard of it before.

        It becomes the current one if it follows the current one, or all of the space was forgotten (`emptied`). One
        that comes late, or that began from a directory that was lost and knew less, does not.
        """
        known = self._known.setdefault(space, {})
        if epoch in known:
            return
        if emptied or previous == self.current(space):
            known[epoch] = previous
        else:
            self._known[space] = known = {epoch: previous, **known}
        if len(known) > REMEMBERED:
            del known[next(iter(known))]

    def descends(self, space: BlockSpace, later: Epoch, earlier: Epoch) -> bool:
        """Whether `later` is `earlier`, or follows it, as far as this node knows."""
        known, at = self._known.get(space, {}), later
        while at != earlier and known.get(at, FIRST) != FIRST:
            at = known[at]
        return at == earlier

    def compare(self, space: BlockSpace, theirs: Epoch) -> Literal["same", "ahead", "forked", "missed"]:
        """How this node stands to the directory's epoch.

        Either it missed a removal; or the directory was lost meanwhile: then the node is `ahead` of it, or `forked`
        where removals began from what it knew before it heard of this node's.
        """
        mine = self.current(space)
        if theirs == mine:
            return "same"
        if theirs == FIRST or self.descends(space, mine, theirs):
            return "ahead"
        return "forked" if self.knows(space, theirs) else "missed"

    def may_be_alone(self, space: BlockSpace, directory: Epoch) -> bool:
        """Whether this node may have heard of removals that nodes in the directory's epoch have not: it has not agreed
        on all of its own with this very directory."""
        return self.current(space) != FIRST and (directory != self.agreed_with or space in self.own)

    def agreed(self, directory: Epoch) -> None:
        """The directory knows all that this node knows."""
        self.agreed_with = directory
        self.own.clear()

    def encode(self) -> bytes:
        """For a file that outlives the node."""
        known = [(space, list(known.items())) for space, known in self._known.items()]
        return msgspec.msgpack.encode((self.agreed_with, list(self.own), known))

    @classmethod
    def decode(cls, saved: bytes) -> Epochs:
        """What `encode` gave. Raises: msgspec.MsgspecError."""
        epochs = cls()
        epochs.agreed_with, own, found = msgspec.msgpack.decode(
            saved, type=tuple[Epoch, list[BlockSpace], list[tuple[BlockSpace, list[tuple[Epoch, Epoch]]]]]
        )
        epochs.own = set(own)
        epochs._known = {space: dict(known) for space, known in found if known}
        return epochs
