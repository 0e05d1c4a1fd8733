"""From vLLM's KV tensors to a `KVLayout`: everything follows from their actual shapes and strides. No vLLM import.

What vLLM 0.26 to 0.32 gives for one layer, B manager blocks of N tokens, H heads of this rank, K and V packed side by
side into C = 2 x head size elements:

- (B, H, N, C), in memory as NHD or HND (FlashAttention, Triton), or LBHNC (0.32);
- the same on the CPU, but the inside of one head of a block is packed for the kernel: only whole heads can be copied;
- (B, N, C) for multi-head latent attention: one latent vector a token, the same on every rank.

Dimension 0 may count kernel blocks, several to a manager block. All layers may be views of one storage.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from kvferry.errors import CompatibilityError
from kvferry.layout import HeadGrid, KVLayout, LayerLayout

if TYPE_CHECKING:
    import torch


class Storage(NamedTuple):
    """One allocation that holds KV: `buffer` is all of it as a flat uint8 tensor."""

    address: int
    buffer: torch.Tensor


class Geometry(NamedTuple):
    """What vLLM's configuration says of the cache, for one rank."""

    num_blocks: int
    block_size: int
    tp_rank: int = 0
    tp_size: int = 1


def layer_order(names: Mapping[str, object]) -> list[str]:
    """Layer names by their numbers, so that both sides count them alike (`layers.2` before `layers.10`)."""
    return sorted(names, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])


def distinct_layers(kv_caches: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """In layer order, without layers that share another layer's cache."""
    seen: set[int] = set()
    kept = {}
    for name in layer_order(kv_caches):
        tensor = kv_caches[name]
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            kept[name] = tensor
    return kept


def storages(kv_caches: Mapping[str, torch.Tensor]) -> list[Storage]:
    """The allocations behind the tensors, each once, in layer order."""
    import torch

    found: dict[int, Storage] = {}
    for name in layer_order(kv_caches):
        tensor = kv_caches[name]
        address = tensor.untyped_storage().data_ptr()
        if address not in found:
            buffer = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
            found[address] = Storage(address, buffer)
    return list(found.values())


def layout_of(kv_caches: Mapping[str, torch.Tensor], geometry: Geometry, region_ids: Mapping[int, int]) -> KVLayout:
    """The layout of one rank's KV cache.

    Args:
        kv_caches: as `register_kv_caches` got them.
        region_ids: storage address -> id of the region that it was registered as.
    Raises:
        CompatibilityError: a tensor's shape or strides are none that can be copied by block; it names them.
    """
    layers = []
    shapes = set()
    for name, tensor in distinct_layers(kv_caches).items():
        one = _layer(name, tensor, geometry)
        shapes.add((one.block_bytes, one.num_heads, one.grid, one.opaque))
        storage = tensor.untyped_storage().data_ptr()
        layers.append(LayerLayout(region_ids[storage], tensor.data_ptr() - storage, one.block_stride))
    if len(shapes) != 1:
        raise CompatibilityError(
            f"the layers' KV blocks are of {len(shapes)} kinds ({sorted(map(str, shapes))}); all must be alike: "
            "models with several kinds of attention caches are not supported"
        )
    ((block_bytes, num_heads, grid, opaque),) = shapes
    replicated = num_heads is None
    return KVLayout(
        num_blocks=geometry.num_blocks,
        block_size=geometry.block_size,
        block_bytes=block_bytes,
        num_kv_heads=1 if num_heads is None else num_heads,
        layers=tuple(layers),
        grid=grid,
        opaque=opaque,
        tp_rank=0 if replicated else geometry.tp_rank,
        tp_size=1 if replicated else geometry.tp_size,
    )


def cpu_packing() -> str:
    """A name for how vLLM's CPU kernels pack the inside of a block; it depends on the processor's instructions."""
    import torch

    instructions = torch.backends.cpu.get_cpu_capability().lower()
    has_tiles = bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())
    return f"vllm-cpu-{instructions}{'-amx' if has_tiles else ''}"


class _Layer(NamedTuple):
    block_bytes: int
    block_stride: int
    num_heads: int | None  # None: not split over ranks
    grid: HeadGrid | None
    opaque: str


def _layer(name: str, tensor: torch.Tensor, geometry: Geometry) -> _Layer:
    size = tensor.element_size()
    shape, strides = tuple(tensor.shape), tuple(s * size for s in tensor.stride())
    per_block, rest = divmod(shape[0], geometry.num_blocks)
    seen = f"layer {name}: shape {shape}, strides {strides} bytes, {geometry.num_blocks} blocks"
    if rest or per_block < 1 or geometry.block_size % per_block or len(shape) not in (3, 4):
        raise CompatibilityError(
            f"{seen}; expected (blocks, heads, tokens, content) or (blocks, tokens, content): use an attention backend "
            "that packs K and V into one tensor, such as FlashAttention or Triton"
        )
    if len(shape) == 3:
        shape, strides = (shape[0], 1, *shape[1:]), (strides[0], 0, *strides[1:])
        num_heads = None
    else:
        num_heads = shape[1]
    kernel_block_bytes = shape[1] * shape[2] * shape[3] * size
    if shape[2] * per_block != geometry.block_size or not _is_dense(shape[1:], strides[1:], size):
        raise CompatibilityError(
            f"{seen}; expected {geometry.block_size // per_block} tokens in dimension 2 and no gaps inside a block: "
            "choose another KV cache layout (VLLM_KV_CACHE_LAYOUT)"
        )
    if per_block > 1 and strides[0] != kernel_block_bytes:
        raise CompatibilityError(
            f"{seen}; {per_block} kernel blocks make one block, but they do not lie side by side: set --block-size to "
            f"{geometry.block_size // per_block}"
        )
    block_bytes = kernel_block_bytes * per_block
    return _Layer(block_bytes, strides[0] * per_block, num_heads, *_inside(tensor, shape, strides, size, per_block))


def _inside(
    tensor: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...], size: int, per_block: int
) -> tuple[HeadGrid | None, str]:
    """Where heads lie in a block, and what is packed so that no finer part can be told apart."""
    _, heads, tokens, content = shape
    head_bytes = tokens * content * size
    if _is_packed(tensor):
        packing = cpu_packing()
        if per_block > 1 or (heads > 1 and strides[1] != head_bytes):
            return None, f"{packing}-{per_block}"
        # A head's part of a block is one packed run: cut it into equal pieces, which `plan_copy` joins again.
        return HeadGrid((0,), head_bytes, content * size, content * size), packing
    if strides[3] != size or (per_block > 1 and strides[2] * tokens != strides[0]):
        return None, f"strides-{strides[1:]}-{per_block}"
    return HeadGrid((0,), strides[1] if heads > 1 else content * size, strides[2], content * size), ""


def _is_packed(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...], size: int) -> bool:
    """Whether these dimensions fill one run of memory, in whatever order."""
    expected = size
    for stride, length in sorted((s, n) for s, n in zip(strides, shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= length
    return True
