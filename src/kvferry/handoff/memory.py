"""A rank's KV memory: its regions in the layout's order, and the words of its leases beside them."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvferry.handoff.digests import Memory
from kvferry.handoff.words import WORD_BYTES, CudaWords, HostWords, Words
from kvferry.layout import KVLayout
from kvferry.transfer import TransferEngine
from kvferry.transport.base import Region


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

    def on_host(self, layout: KVLayout, layers: range) -> bool:
        """Whether this process can look at the bytes of these layers, to take their digests."""
        return all(self.regions[layout.layers[layer].region].kind == "host" for layer in layers)

    def host_bytes(self) -> dict[int, Memory]:
        """Each host region's index and its bytes."""
        return {i: _as_bytes(r.buffer) for i, r in enumerate(self.regions) if r.kind == "host"}


def _as_bytes(buffer: Any) -> Memory:
    """A region's buffer as uint8 [nbytes]: numpy, or a torch CPU tensor of any dtype."""
    if not isinstance(buffer, np.ndarray):
        import torch

        buffer = buffer.view(-1).view(torch.uint8).numpy()
    return buffer.reshape(-1).view(np.uint8)  # type: ignore[no-any-return]
