"""What the nodes of a pool say to one another, over the same connections as clients."""

from __future__ import annotations

import msgspec

from kvferry.pool.keys import BlockSpace
from kvferry.pool.messages import Message
from kvferry.pool.parts import Size


class Forget(Message, frozen=True):
    """Blocks were removed (all of the space for None), after epoch `previous`; epoch `epoch` begins. Answered by
    Counted."""

    space: BlockSpace
    hashes: list[bytes] | None
    previous: int
    epoch: int


class OfferedBlock(msgspec.Struct, frozen=True, array_like=True):
    """A block of the offering node: its place in its prompt, where it lies in the arena, its xxh3-64."""

    block_hash: bytes
    nbytes: Size
    depth: Size
    num_blocks: Size
    parent: bytes | None
    offset: Size
    digest: int


class Offer(Message, frozen=True):
    """Take copies of these blocks out of my arena, which I keep as they are as long as the word stands; of no use
    unless you are in the same epoch."""

    space: BlockSpace
    epoch: int
    blocks: list[OfferedBlock]
    arena: Size
    word_offset: Size
    word: int


class Taken(Message, frozen=True):
    """To Offer: which of the blocks the node has now, in host memory. It reads no more of the other's arena."""

    there: list[bool]


NodeRequest = Forget | Offer
