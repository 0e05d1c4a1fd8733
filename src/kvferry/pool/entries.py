"""The records of the index: a committed block, a slab that is being filled, a put."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

from kvferry.policy.eviction import Place
from kvferry.pool.epochs import Epoch
from kvferry.pool.keys import BlockSpace, Tier

Key = tuple[int, bytes]
"""The number of a block's space in its index, and its hash."""


@dataclass(slots=True, eq=False)
class Entry:
    """One committed block. `digest` is its xxh3-64. `slab` and `slot` say where it lies; `holds` keep its slab.
    `replica`: its bytes in the slab came from another node."""

    key: Key
    nbytes: int
    digest: int
    place: Place[Key]
    slab: int | None = None
    slot: int | None = None
    holds: int = 0
    pins: int = 0
    reuses: int = 0
    replica: bool = False
    removed: bool = False


@dataclass(slots=True)
class PendingBlock:
    """A slab that is being filled for a block; `cancelled` by a removal that overtook the put."""

    index: int
    key: Key
    slab: int
    place: Place[Key]
    cancelled: bool = False


class Put(NamedTuple):
    """What a put may fill: one slab for each block that is absent and has room. Ends by commit or abort, once.

    `epoch` is the space's at the beginning; a `replica` is dropped at its commit if it is another one then.
    """

    space: BlockSpace
    nbytes: int
    epoch: Epoch
    blocks: list[PendingBlock]
    duplicates: int
    refused: int
    replica: bool = False


@dataclass(slots=True)
class SpaceBooks:
    """What the index knows of one space."""

    number: int
    quota: int | None
    entries: dict[bytes, Entry] = field(default_factory=dict)
    pending: dict[bytes, PendingBlock] = field(default_factory=dict)
    # The fastest tier of each block, so that a lookup of thousands touches no entry.
    tiers: dict[bytes, Tier] = field(default_factory=dict)
    num_in_host: int = 0
    # Shared by the spaces of a namespace: their blocks in host memory, the one not used for longest first, which a
    # namespace at its quota gives up, whatever model it is of.
    recent: OrderedDict[Key, None] = field(default_factory=OrderedDict)
