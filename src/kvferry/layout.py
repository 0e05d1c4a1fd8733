"""KV geometry: what two instances must agree on, where a block lies, and how one layout maps to another. Pure.

A *fingerprint* must be equal on both sides. A *layout* (strides, order inside a block, tensor-parallel slice) may
differ where `plan_copy` can map one to the other.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from kvferry.errors import CompatibilityError

Offsets = npt.NDArray[np.int64]
PROTOCOL_VERSION = 3


class Fingerprint(msgspec.Struct, frozen=True):
    """What must be equal on both sides before the first byte moves. `num_kv_heads` is the total over all ranks;
    `kv_groups` names the groups of layers that have block tables of their own, where there are several."""

    model: str
    dtype: str
    block_size: int
    num_layers: int
    num_kv_heads: int
    head_size: int
    revision: str = ""
    adapter: str = ""
    kv_groups: str = ""
    hash_algorithm: str = "sha256-chain-v1"
    protocol_version: int = PROTOCOL_VERSION

    def digest(self) -> bytes:
        """32 bytes that identify this fingerprint."""
        return hashlib.sha256(msgspec.json.encode(self)).digest()

    def require_equal(self, other: Fingerprint, *, peer: str | None = None) -> None:
        """Raises: CompatibilityError, which names every field that differs with both values."""
        pairs = [(f, getattr(self, f), getattr(other, f)) for f in self.__struct_fields__]
        seen = [f"{f}: here {a!r}, there {b!r}" for f, a, b in pairs if a != b]
        if seen:
            raise CompatibilityError(
                f"the two sides differ in {'; '.join(seen)}. They must be equal: start both with the same model, "
                "revision, adapter, dtype, block size and kvferry version",
                peer=peer,
                stage="connect",
            )


class HeadGrid(msgspec.Struct, frozen=True):
    """Where each head vector lies inside a block: part p (K, then V), head h, token t starts at
    `part_offsets[p] + h * head_stride + t * token_stride` and is `vector_bytes` long."""

    part_offsets: tuple[int, ...]
    head_stride: int
    token_stride: int
    vector_bytes: int


class LayerLayout(msgspec.Struct, frozen=True):
    """Block b of this layer lies in `region` at `base + b * block_stride`, `block_bytes` long."""

    region: int
    base: int
    block_stride: int


class KVLayout(msgspec.Struct, frozen=True):
    """One rank's KV cache. `opaque` names a packing that only its owner understands; it must be equal on both sides.

    With a `grid` the head slices of a block can be told apart (of a packed block too, where each head's bytes lie
    together); without one only whole blocks can be copied, between equal ranks.
    """

    num_blocks: int
    block_size: int
    block_bytes: int
    num_kv_heads: int
    layers: tuple[LayerLayout, ...]
    grid: HeadGrid | None = None
    opaque: str = ""
    tp_rank: int = 0
    tp_size: int = 1


class BlockCopy(NamedTuple):
    """One list of equal runs to copy: `nbytes` each, from `source_offsets[i]` to `target_offsets[i]`."""

    source_region: int
    target_region: int
    source_offsets: Offsets
    target_offsets: Offsets
    nbytes: int


def block_offsets(layout: KVLayout, layer: int, block_ids: Sequence[int] | Offsets) -> Offsets:
    """int64 [num_blocks]: byte offsets of these blocks in the layer's region."""
    where = layout.layers[layer]
    return np.asarray(block_ids, dtype=np.int64) * where.block_stride + where.base


def overlapping_ranks(target_rank: int, target_size: int, source_size: int) -> range:
    """The source ranks whose heads the target rank needs, where ranks hold consecutive, equal head slices.

    Raises: CompatibilityError if neither size divides the other.
    """
    if source_size >= target_size and source_size % target_size == 0:
        per = source_size // target_size
        return range(target_rank * per, (target_rank + 1) * per)
    if target_size % source_size == 0:
        first = target_rank // (target_size // source_size)
        return range(first, first + 1)
    raise CompatibilityError(
        f"tensor-parallel sizes {source_size} (source) and {target_size} (target) do not map to one another: "
        "one must be a multiple of the other"
    )


def plan_copy(
    source: KVLayout,
    target: KVLayout,
    layers: range,
    source_block_ids: Sequence[int] | Offsets,
    target_block_ids: Sequence[int] | Offsets,
) -> list[BlockCopy]:
    """The copies that bring `source_block_ids` of the source rank into `target_block_ids` of the target rank.

    Where both sides' blocks look alike, a copy is a whole block; where the head slices or the order inside a block
    differ, it is the longest run that is contiguous on both sides. Layers in one region pair are merged, so that one
    call of the transfer engine moves them all.

    Raises: CompatibilityError, naming what does not fit.
    """
    source_ids = np.asarray(source_block_ids, dtype=np.int64)
    target_ids = np.asarray(target_block_ids, dtype=np.int64)
    if source_ids.shape != target_ids.shape:
        raise CompatibilityError(f"{source_ids.size} source blocks cannot fill {target_ids.size} target blocks")
    _require_in_range(source_ids, source, "source")
    _require_in_range(target_ids, target, "target")
    if source.block_size != target.block_size or len(source.layers) != len(target.layers):
        raise CompatibilityError(
            f"source has {len(source.layers)} layers of {source.block_size}-token blocks, "
            f"target {len(target.layers)} of {target.block_size}: both must be equal"
        )
    inner_source, inner_target, nbytes = _inner_offsets(source, target)
    by_regions = layers_by_regions(source, target, layers)
    # Where each layer is a region of its own, all of them have the same offsets: computed once, and one array, so that
    # whoever checks them does so once.
    source_at = functools.cache(lambda places: _offsets_of(places, source_ids, inner_source))
    target_at = functools.cache(lambda places: _offsets_of(places, target_ids, inner_target))
    return [
        BlockCopy(*regions, source_at(_places(source, group)), target_at(_places(target, group)), nbytes)
        for regions, group in by_regions.items()
    ]


def shared_heads(layout: KVLayout, rank: int, size: int) -> range:
    """The heads of this rank that rank `rank` of `size` has too, counted over all ranks; empty where there are none."""
    first, other = layout.tp_rank * layout.num_kv_heads, layout.num_kv_heads * layout.tp_size // size
    return range(max(first, rank * other), min(first + layout.num_kv_heads, (rank + 1) * other))


def head_vectors(layout: KVLayout, grid: HeadGrid, heads: range) -> Offsets:
    """int64 [num_parts * num_heads * block_size]: where each vector of these heads starts inside a block: part by part,
    head by head, token by token, however the layout has them.

    Args:
        heads: of this rank's, counted over all ranks.
    """
    parts = np.asarray(grid.part_offsets, dtype=np.int64)
    rows = np.arange(heads.start, heads.stop) - layout.tp_rank * layout.num_kv_heads
    vectors: Offsets = (
        parts[:, None, None]
        + (rows * grid.head_stride)[None, :, None]
        + (np.arange(layout.block_size) * grid.token_stride)[None, None, :]
    )
    return vectors.ravel()


def layers_by_regions(source: KVLayout, target: KVLayout, layers: range) -> dict[tuple[int, int], list[int]]:
    """The layers of each copy of `plan_copy`, by (source region, target region): its offsets are layer after layer, of
    each all blocks."""
    found: dict[tuple[int, int], list[int]] = {}
    for layer in layers:
        found.setdefault((source.layers[layer].region, target.layers[layer].region), []).append(layer)
    return found


def _places(layout: KVLayout, layers: list[int]) -> tuple[tuple[int, int], ...]:
    return tuple((layout.layers[layer].base, layout.layers[layer].block_stride) for layer in layers)


def _offsets_of(places: tuple[tuple[int, int], ...], block_ids: Offsets, inner: Offsets) -> Offsets:
    """int64 [num_layers * num_blocks * num_runs] for layers that begin at `base` with `stride` from block to block."""
    bases, strides = np.asarray(places, dtype=np.int64).T
    at: Offsets = bases[:, None, None] + strides[:, None, None] * block_ids[None, :, None] + inner[None, None, :]
    return at.ravel()


def _require_in_range(ids: Offsets, layout: KVLayout, side: Literal["source", "target"]) -> None:
    if ids.size and (ids.min() < 0 or ids.max() >= layout.num_blocks):
        raise CompatibilityError(
            f"{side} block ids run from {ids.min()} to {ids.max()}, but it has blocks 0 to {layout.num_blocks - 1}"
        )


def _inner_offsets(source: KVLayout, target: KVLayout) -> tuple[Offsets, Offsets, int]:
    """Offsets inside a block on both sides and the run length, covering the heads that both ranks hold."""
    whole = np.zeros(1, dtype=np.int64)
    same_slice = (source.tp_rank, source.tp_size) == (target.tp_rank, target.tp_size)
    alike = source.block_bytes == target.block_bytes and source.grid == target.grid
    if same_slice and alike and source.opaque == target.opaque:
        return whole, whole, source.block_bytes
    if source.grid is None or target.grid is None or source.opaque != target.opaque:
        raise CompatibilityError(
            f"blocks are packed as {source.opaque or 'rows'} on rank {source.tp_rank}/{source.tp_size} and as "
            f"{target.opaque or 'rows'} on rank {target.tp_rank}/{target.tp_size}: packed blocks can only be copied "
            "whole between equal ranks; use the same tensor-parallel size and attention backend on both sides"
        )
    s_grid, t_grid = source.grid, target.grid
    if s_grid.vector_bytes != t_grid.vector_bytes or len(s_grid.part_offsets) != len(t_grid.part_offsets):
        raise CompatibilityError(
            f"a head vector has {s_grid.vector_bytes} bytes in {len(s_grid.part_offsets)} parts at the source, "
            f"{t_grid.vector_bytes} in {len(t_grid.part_offsets)} at the target: both must be equal"
        )
    if source.num_kv_heads * source.tp_size != target.num_kv_heads * target.tp_size:
        # Fewer heads than ranks: vLLM repeats each head on several ranks.
        raise CompatibilityError(
            f"{source.num_kv_heads} heads on {source.tp_size} ranks and {target.num_kv_heads} on {target.tp_size} "
            "are not slices of the same heads"
        )
    heads = shared_heads(source, target.tp_rank, target.tp_size)
    if not heads:
        raise CompatibilityError(f"ranks {source.tp_rank} and {target.tp_rank} share no head")
    vectors = head_vectors(source, s_grid, heads), head_vectors(target, t_grid, heads)
    return _merge_runs(*vectors, s_grid.vector_bytes)


def _merge_runs(source: Offsets, target: Offsets, nbytes: int) -> tuple[Offsets, Offsets, int]:
    """Join neighbours that are contiguous on both sides into equal runs, as long as all runs stay of one length."""
    order = np.argsort(source, kind="stable")
    source, target = source[order], target[order]
    breaks = np.flatnonzero((np.diff(source) != nbytes) | (np.diff(target) != nbytes)) + 1
    starts = np.concatenate(([0], breaks))
    run = int(np.gcd.reduce(np.diff(np.concatenate((starts, [source.size])))))
    return source[::run], target[::run], nbytes * run
