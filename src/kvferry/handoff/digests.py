"""Digests of published blocks: 8 bytes for each, over some layers. Two kinds, of which the source says which it gives.

`xxh3` is for host memory. `sum` joins the checksums that a GPU takes while it copies (`kvferry.transport.checksum`), of
host memory too. One digest a block, so that a target that needs only some of the published blocks can check just those.
Both are equal on both sides where their blocks look alike (`digests_fit`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import xxhash

from kvferry.layout import KVLayout, Offsets, block_offsets
from kvferry.transport.checksum import Sums

Memory = npt.NDArray[np.uint8]
DigestKind = Literal["none", "xxh3", "sum"]
DIGEST_BYTES = 8


def block_digests(
    memory: Mapping[int, Memory], layout: KVLayout, layers: range, block_ids: Sequence[int] | Offsets
) -> bytes:
    """xxh3-64 of each block over `layers`, whole blocks, 8 bytes for each of `block_ids`, joined.

    Args:
        memory: the layout's region index to uint8 [region bytes], host memory.
    """
    ids = np.asarray(block_ids, dtype=np.int64)
    states = [xxhash.xxh3_64() for _ in range(len(ids))]
    for layer in layers:
        region = memory[layout.layers[layer].region].data
        for state, at in zip(states, block_offsets(layout, layer, ids).tolist(), strict=True):
            state.update(region[at : at + layout.block_bytes])
    return b"".join(state.digest() for state in states)


def joined_sums(sums: Sums, layers: Sequence[int]) -> bytes:
    """The `sum` digests of blocks, 8 bytes each, joined.

    Args:
        sums: int64 [len(layers) * num_blocks], layer after layer in the order of `layers`.
    """
    # An odd number for each layer, so that layers which change places are found too.
    factors = np.array([xxhash.xxh3_64_intdigest(b"%d" % layer) | 1 for layer in layers], dtype=np.uint64)
    of_blocks = sums.view(np.uint64).reshape(len(layers), -1) * factors[:, None]
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


def first_difference(expected: bytes, seen: bytes) -> int | None:
    """The index of the first block whose digest differs, or None."""
    pairs = zip(_split(expected), _split(seen), strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), None)


def _split(digests: bytes) -> list[bytes]:
    return [digests[i : i + DIGEST_BYTES] for i in range(0, len(digests), DIGEST_BYTES)]
