"""What clients and a pool node say to one another, over the transfer engine's authenticated connections.

The bytes of blocks never travel in messages: the node pulls what is put from the client's registered memory, and the
client reads what it gets from the node's arena. Each request carries an id that its reply repeats.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from kvferry.pool.keys import BlockSpace, Tier
from kvferry.pool.parts import BlockPart, Size


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of all: `id` pairs a reply with its request."""

    id: int


class Exists(Message, frozen=True):
    """Which of these blocks are there?"""

    space: BlockSpace
    hashes: list[bytes]


class PutBlocks(Message, frozen=True):
    """Pull these blocks, each in these parts at its place, from my memory, as long as the word stands.

    The blocks are number `first` onwards of a prompt of `length` blocks.
    """

    space: BlockSpace
    hashes: list[bytes]
    parts: Annotated[list[BlockPart], Meta(max_length=4096)]
    places: list[Size]
    words_region: Size
    word_offset: Size
    word: int
    first: Size
    length: Size


class GetBlocks(Message, frozen=True):
    """Lease me these blocks; with `prefix`, those before the first miss only. Blocks of another size are misses."""

    space: BlockSpace
    hashes: list[bytes]
    nbytes: Size
    prefix: bool


class Release(Message, frozen=True):
    """My reads under this lease (its id) have ended. No reply."""


class Pin(Message, frozen=True):
    """Keep these blocks in host memory until I unpin them or am gone."""

    space: BlockSpace
    hashes: list[bytes]


class Unpin(Message, frozen=True):
    """Take back one pin of mine for each of these blocks."""

    space: BlockSpace
    hashes: list[bytes]


class Remove(Message, frozen=True):
    """Forget these blocks; all of the space for None."""

    space: BlockSpace
    hashes: list[bytes] | None


class Prefetch(Message, frozen=True):
    """I may ask for these blocks soon: bring those that are on disk into host memory."""

    space: BlockSpace
    hashes: list[bytes]


class Drain(Message, frozen=True):
    """Take no more puts, copy hot blocks to other nodes for at most `deadline_s`, then leave the directory. Repeated,
    it asks how far that is."""

    deadline_s: Annotated[float, Meta(gt=0, le=86400)]


class AskStat(Message, frozen=True):
    """How are you?"""


class AskSpaces(Message, frozen=True):
    """Which spaces are there on all nodes of your directory?"""


class AskBlocks(Message, frozen=True):
    """Which blocks of this namespace served most? At most `limit`."""

    namespace: str
    limit: Annotated[int, Meta(gt=0, le=10000)]


Request = (
    Exists | PutBlocks | GetBlocks | Release | Pin | Unpin | Remove | Prefetch | Drain | AskStat | AskSpaces | AskBlocks
)


class Tiers(Message, frozen=True):
    """To Exists: the fastest tier of each block."""

    tiers: list[Tier | None]


class PutDone(Message, frozen=True):
    """To PutBlocks: the node reads no more of the client's memory."""

    stored: int
    duplicates: int
    refused: int


class Leased(Message, frozen=True):
    """To GetBlocks: the lease `id` guards these blocks by its word. `offsets` and `digests` (xxh3-64) of the found."""

    found: list[bool]
    arena: int
    offsets: list[int]
    digests: list[int]
    word_offset: int
    word: int
    from_disk: int


class Counted(Message, frozen=True):
    """To Pin, Unpin, Remove and Prefetch: how many blocks it concerned."""

    count: int


class SpaceStat(msgspec.Struct, frozen=True):
    """One space of a node."""

    fingerprint: str
    namespace: str
    blocks: int
    host_bytes: int


class NamespaceStat(msgspec.Struct, frozen=True):
    """One namespace of a node, over all its models: what it holds, and blocks and bytes since the start."""

    namespace: str
    host_bytes: int
    quota_bytes: int | None
    got_host: int
    got_disk: int
    missed: int
    stored: int
    duplicates: int
    refused: int
    bytes_in: int
    bytes_out: int


class BlockStat(msgspec.Struct, frozen=True):
    """One block of a node. `reuses`: how often it served; `copy`: its bytes came from another node."""

    fingerprint: str
    block_hash: str
    tier: Tier
    nbytes: int
    depth: int
    reuses: int
    pins: int
    copy: bool


class Blocks(Message, frozen=True):
    """To AskBlocks: the ones that served most first."""

    blocks: list[BlockStat]


class DrainState(Message, frozen=True):
    """To Drain: of `hot` blocks `copied` are on other nodes. Once `ended` says why it is over, `left` are not."""

    hot: int
    copied: int
    left: int
    ended: str


class Spaces(Message, frozen=True):
    """To AskSpaces: each space once, over all nodes."""

    spaces: list[SpaceStat]


class NodeStat(Message, frozen=True):
    """To AskStat: figures since the start. `state` is serving, draining or drained; `latencies_ms` holds
    quantiles by name."""

    address: str
    num_slabs: int
    free_slabs: int
    slab_bytes: int
    disk_slots: int
    blocks_on_disk: int
    disk_queued_bytes: int
    leases: int
    replicas: int
    state: str
    counts: dict[str, int]
    latencies_ms: dict[str, float]
    namespaces: list[NamespaceStat]
    spaces: list[SpaceStat]


class Failed(Message, frozen=True):
    """To any request: it was refused, and nothing was done."""

    cause: str
    message: str


Reply = Tiers | PutDone | Leased | Counted | Spaces | Blocks | DrainState | NodeStat | Failed
