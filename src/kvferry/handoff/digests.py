"""Digests of published blocks: 8 bytes for each, over some layers. Two kinds, of which the source says which it gives.

`xxh3` is for host memory. `sum` joins the checksums that a GPU takes while it copies (`kvferry.transport.checksum`), of
host memory too. One digest a block, so that a target that needs only some of the published blocks can check just those.
Where both sides' blocks look alike (`digests_fit`) a digest is of the whole block. Between other tensor-parallel slices
it is of the heads that both ranks have, in an order that no layout changes (`head_vectors`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import xxhash

from kvferry.layout import KVLayout, Offsets, block_offsets, shared_heads
from kvferry.transport.checksum import Sums, odd_factors

Memory = npt.NDArray[np.uint8]
DigestKind = Literal["none", "xxh3", "sum"]
DIGEST_BYTES = 8


def block_digests(
    memory: Mapping[int, Memory],
    layout: KVLayout,
    layers: range,
    block_ids: Sequence[int] | Offsets,
    heads: range | None = None,
) -> bytes:
    """xxh3-64 of each block over `layers`, 8 bytes for each of `block_ids`, joined.

    Args:
        memory: the layout's region index to uint8 [region bytes], host memory.
        heads: only these heads of each block, counted over all ranks; None: whole blocks.
    """
    ids = np.asarray(block_ids, dtype=np.int64)
    states = [xxhash.xxh3_64() for _ in range(len(ids))]
    for layer in layers:
        region = memory[layout.layers[layer].region]
        for state, at in zip(states, block_offsets(layout, layer, ids).tolist(), strict=True):
            block = region[at : at + layout.block_bytes]
            for piece in [block.data] if heads is None else _parts_of(block, layout, heads):
                state.update(piece)
    return b"".join(state.digest() for state in states)


def _parts_of(block: Memory, layout: KVLayout, heads: range) -> list[memoryview]:
    """uint8 [num_heads, block_size, vector_bytes] for each part of a block."""
    grid = layout.grid
    assert grid is not None, "only a block with a grid has heads"
    first = (heads.start - layout.tp_rank * layout.num_kv_heads) * grid.head_stride
    shape = (len(heads), layout.block_size, grid.vector_bytes)
    strides = (grid.head_stride, grid.token_stride, 1)
    views = [np.lib.stride_tricks.as_strided(block[part + first :], shape, strides) for part in grid.part_offsets]
    return [np.ascontiguousarray(view).data for view in views]


def joined_sums(sums: Sums, layers: Sequence[int], num_pieces: int = 1) -> bytes:
    """The `sum` digests of blocks, 8 bytes each, joined.

    Args:
        sums: int64 [len(layers) * num_blocks * num_pieces], layer after layer in the order of `layers`, of each all
            blocks, of each all pieces.
    """
    # An odd number for each layer and each piece, so that those which change places are found too.
    factors = np.array([xxhash.xxh3_64_intdigest(b"%d" % layer) | 1 for layer in layers], dtype=np.uint64)
    of_pieces = sums.view(np.uint64).reshape(len(layers), -1, num_pieces) * odd_factors(num_pieces)
    of_blocks = of_pieces.sum(axis=2, dtype=np.uint64) * factors[:, None]
    digests: npt.NDArray[np.uint64] = of_blocks.sum(axis=0, dtype=np.uint64).astype("<u8")
    return digests.tobytes()


def digests_fit(source: KVLayout, target: KVLayout) -> bool:
    """Whether a block's bytes are the same on both sides, so that its digest is."""
    slices = (source.tp_rank, source.tp_size) == (target.tp_rank, target.tp_size)
    return slices and (source.block_bytes, source.grid, source.opaque) == (
        target.block_bytes,
        target.grid,
        target.opaque,
    )


def heads_to_check(source: KVLayout, rank: int, size: int) -> range | None:
    """The heads that digests for the target's rank `rank` of `size` are of; None: they are of whole blocks.

    Source and target come to the same by this: the source knows the target's slice, not its layout.
    """
    num_heads = source.num_kv_heads * source.tp_size
    if (rank, size) == (source.tp_rank, source.tp_size) or source.grid is None or num_heads % size:
        return None
    return shared_heads(source, rank, size)


def first_difference(expected: bytes, seen: bytes) -> int | None:
    """The index of the first block whose digest differs, or None."""
    pairs = zip(_split(expected), _split(seen), strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), None)


def _split(digests: bytes) -> list[bytes]:
    return [digests[i : i + DIGEST_BYTES] for i in range(0, len(digests), DIGEST_BYTES)]
