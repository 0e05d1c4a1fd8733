"""A rank's KV memory: its regions in the layout's order, and the words of its leases beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvferry.handoff.digests import DigestKind, Memory, block_digests, joined_sums
from kvferry.handoff.words import WORD_BYTES, CudaWords, HostWords, Words
from kvferry.layout import KVLayout, Offsets, block_offsets, head_vectors, layers_by_regions
from kvferry.transfer import TransferEngine
from kvferry.transport.base import Region
from kvferry.transport.checksum import Sums, sums_of_blocks

SUM_WITHIN_S = 10.0
"""The GPU takes the sums of some blocks in milliseconds, unless a kernel must be compiled first, or it hangs."""


class KVMemory:
    """Registered with `engine`, which must outlive it."""

    def __init__(self, engine: TransferEngine) -> None:
        self._engine = engine
        self.regions: list[Region] = []

    def allocate(self, nbytes: int) -> Memory:
        """uint8 [nbytes] of shared memory, zeroed; the next region of the layout."""
        region = self._engine.allocate(nbytes)
        self.regions.append(region)
        return region.buffer  # type: ignore[no-any-return]

    def register(self, buffer: Any) -> int:
        """Memory that exists (numpy, torch CPU or CUDA, contiguous); returns its region index."""
        self.regions.append(self._engine.register(buffer))
        return len(self.regions) - 1

    def make_words(self, num_slots: int) -> Words:
        """A word table of `num_slots` zeros that lives and dies with these regions (R4)."""
        cuda = next((r for r in self.regions if r.kind == "cuda"), None)
        if cuda is None:
            return HostWords(self._engine.allocate(num_slots * WORD_BYTES))
        import torch

        tensor = torch.zeros(num_slots, dtype=torch.int64, device=f"cuda:{cuda.device}")
        return CudaWords(tensor, self._engine.register(tensor))

    def digests(
        self,
        kind: DigestKind,
        layout: KVLayout,
        layers: range,
        block_ids: Sequence[int] | Offsets,
        heads: range | None = None,
    ) -> bytes:
        """The digests of these blocks as they are now; empty where this process cannot take any of this kind. Blocks.

        Args:
            heads: only these heads, counted over all ranks; None: whole blocks.
        Raises: TransportError, TransferTimeout: the GPU did not take them.
        """
        if kind == "xxh3" and self._on_host(layout, layers):
            return block_digests(self._host_bytes(), layout, layers, block_ids, heads)
        return self._sum_digests(layout, layers, block_ids, heads) if kind == "sum" else b""

    def _sum_digests(
        self, layout: KVLayout, layers: range, block_ids: Sequence[int] | Offsets, heads: range | None
    ) -> bytes:
        pieces, nbytes = np.zeros(1, dtype=np.int64), layout.block_bytes
        if heads is not None and layout.grid is not None:
            pieces, nbytes = head_vectors(layout, layout.grid, heads), layout.grid.vector_bytes
        order: list[int] = []
        sums: list[Sums] = []
        for (region, _), group in layers_by_regions(layout, layout, layers).items():
            blocks = np.concatenate([block_offsets(layout, layer, block_ids) for layer in group])
            found = self._sums(self.regions[region], (blocks[:, None] + pieces).ravel(), nbytes)
            if found is None:
                return b""
            order += group
            sums.append(found)
        return joined_sums(np.concatenate(sums), order, len(pieces))

    def _sums(self, region: Region, offsets: Offsets, nbytes: int) -> Sums | None:
        if region.kind == "host":
            return sums_of_blocks(_as_bytes(region.buffer), offsets, nbytes)
        return self._engine.sums(region, offsets, nbytes, deadline_s=SUM_WITHIN_S)

    def _on_host(self, layout: KVLayout, layers: range) -> bool:
        return all(self.regions[layout.layers[layer].region].kind == "host" for layer in layers)

    def _host_bytes(self) -> dict[int, Memory]:
        return {i: _as_bytes(r.buffer) for i, r in enumerate(self.regions) if r.kind == "host"}


def _as_bytes(buffer: Any) -> Memory:
    """A region's buffer as uint8 [nbytes]: numpy, or a torch CPU tensor of any dtype."""
    if not isinstance(buffer, np.ndarray):
        import torch

        buffer = buffer.view(-1).view(torch.uint8).numpy()
    return buffer.reshape(-1).view(np.uint8)  # type: ignore[no-any-return]
