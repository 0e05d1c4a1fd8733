"""Whether an engine's blocks lie in GPU memory, and what carries them then. Imported without CUDA, too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvferry.errors import ConfigError
from kvferry.pool.parts import BlockPart, block_bytes
from kvferry.transport.base import Region

if TYPE_CHECKING:
    from kvferry.pool.device import DeviceBlocks


def gpu_of(buffers: Mapping[int, Any]) -> int | None:
    """The GPU in whose memory all buffers lie; None for host memory. Raises: ConfigError for a mixture."""
    found = {_place(buffer) for buffer in buffers.values()}
    if len(found) > 1 or any(not place.startswith(("cpu", "cuda:")) for place in found):
        raise ConfigError(
            f"KV blocks lie in {', '.join(sorted(found))}, and a pool takes those of host memory, or of one GPU: "
            "start without a pool"
        )
    return next((int(place.removeprefix("cuda:")) for place in found if place != "cpu"), None)


def _place(buffer: Any) -> str:
    """`cpu`, or such as `cuda:1`."""
    device = getattr(buffer, "device", None)
    kind = getattr(device, "type", "cpu")
    return "cpu" if kind == "cpu" else f"{kind}:{getattr(device, 'index', None) or 0}"


def open_device(
    gpu: int,
    parts: Sequence[BlockPart],
    regions: Mapping[int, Region],
    allocate: Callable[[int], Region],
    staging_bytes: int,
) -> DeviceBlocks:
    """What carries the blocks of a GPU.

    Args:
        parts: what a block consists of.
        regions: those of the parts, by id.
        allocate: gives the shared memory of the pieces that they come and go through, `staging_bytes` in all.
    Raises: ConfigError where a package is missing; KVError where the GPU or the system refuses.
    """
    try:
        from kvferry.pool.device import NUM_PIECES, DeviceBlocks
    except ImportError as error:
        raise ConfigError(
            f"the KV cache lies in GPU memory, so the pool needs cuda-bindings and triton ({error}): install them"
        ) from error
    piece_blocks = max(1, staging_bytes // NUM_PIECES // block_bytes(parts))
    return DeviceBlocks(gpu, parts, regions, allocate(NUM_PIECES * piece_blocks * block_bytes(parts)), piece_blocks)
