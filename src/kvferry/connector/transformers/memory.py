"""The paged KV memory of one instance: one contiguous arena, and where each token's vectors lie in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import torch

from kvferry.layout import HeadGrid, KVLayout, LayerLayout


class KVGeometry(msgspec.Struct, frozen=True):
    """The sizes of a model's KV. `dtype` is torch's name of it, such as `float32`."""

    num_layers: int
    num_kv_heads: int
    head_size: int
    dtype: str
    block_size: int

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def vector_bytes(self) -> int:
        """One token's key (or value) of one head."""
        return self.head_size * self.torch_dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """One block of one layer: keys, then values, each [block_size, num_kv_heads, head_size]."""
        return 2 * self.block_size * self.num_kv_heads * self.vector_bytes

    def arena_bytes(self, num_blocks: int) -> int:
        return self.num_layers * num_blocks * self.block_bytes


class Slots(NamedTuple):
    """Rows of a layer's view (`KVMemory.rows`) for a run of tokens; int64 [num_tokens], on the arena's device."""

    keys: torch.Tensor
    values: torch.Tensor


class KVMemory:
    """`num_blocks` blocks for each layer in one arena: layer by layer, block by block."""

    def __init__(self, geometry: KVGeometry, num_blocks: int, arena: torch.Tensor) -> None:
        """Args: arena: uint8 [geometry.arena_bytes(num_blocks)], contiguous, host or CUDA."""
        if arena.dtype != torch.uint8 or arena.numel() != geometry.arena_bytes(num_blocks):
            raise ValueError(
                f"the arena has {arena.numel()} x {arena.dtype}, expected "
                f"{geometry.arena_bytes(num_blocks)} x torch.uint8"
            )
        self.geometry = geometry
        self.num_blocks = num_blocks
        self.arena = arena
        self.device = arena.device
        per_layer = arena.view(geometry.torch_dtype).view(
            geometry.num_layers, -1, geometry.num_kv_heads, geometry.head_size
        )
        self.rows: list[torch.Tensor] = list(per_layer.unbind(0))
        """For each layer [num_blocks * 2 * block_size, num_kv_heads, head_size]: one token's keys or values a row."""

    def slots(self, block_table: Sequence[int], start: int, stop: int) -> Slots:
        """Where the tokens [start, stop) of a sequence lie."""
        block_size = self.geometry.block_size
        positions = np.arange(start, stop, dtype=np.int64)
        blocks = np.asarray(block_table, dtype=np.int64)
        keys = blocks[positions // block_size] * (2 * block_size) + positions % block_size
        return Slots(torch.from_numpy(keys).to(self.device), torch.from_numpy(keys + block_size).to(self.device))

    def layout(self, region: int) -> KVLayout:
        """The arena as peers see it, once it is registered under `region`."""
        geometry = self.geometry
        layer_bytes = self.num_blocks * geometry.block_bytes
        return KVLayout(
            num_blocks=self.num_blocks,
            block_size=geometry.block_size,
            block_bytes=geometry.block_bytes,
            num_kv_heads=geometry.num_kv_heads,
            layers=tuple(
                LayerLayout(region=region, base=i * layer_bytes, block_stride=geometry.block_bytes)
                for i in range(geometry.num_layers)
            ),
            grid=HeadGrid(
                part_offsets=(0, geometry.block_bytes // 2),
                head_stride=geometry.vector_bytes,
                token_stride=geometry.num_kv_heads * geometry.vector_bytes,
                vector_bytes=geometry.vector_bytes,
            ),
        )
