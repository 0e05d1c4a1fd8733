"""The word table: one 8-byte word for each lease, in memory that lives and dies with the blocks it guards (R4)."""

from __future__ import annotations

from typing import Any, Protocol

from kvferry.transport.base import Region
from kvferry.transport.memory import WordTable
from kvferry.types import Word

WORD_BYTES = 8


class Words(Protocol):
    """Where a source keeps its words. Both calls return only when every reader can see the new value (T3)."""

    region: Region

    def store(self, slot: int, word: Word) -> None: ...


class HostWords:
    """Words next to host memory: the region is shared memory of the same process as the blocks."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self._table = WordTable(region)

    def store(self, slot: int, word: Word) -> None:
        self._table.store(slot * WORD_BYTES, word)


class CudaWords:
    """Words in GPU memory, for blocks in GPU memory: a process that dies takes both with it.

    Args:
        tensor: torch int64 [num_slots], CUDA, zeros.
        region: its registration.
    """

    def __init__(self, tensor: Any, region: Region) -> None:
        import torch

        self.region = region
        self._tensor = tensor
        self._stream: Any = torch.cuda.Stream(device=tensor.device)  # type: ignore[no-untyped-call]
        self._torch = torch

    def store(self, slot: int, word: Word) -> None:
        # A stream of its own: the store must not wait behind the model's kernels, nor they behind it.
        with self._torch.cuda.stream(self._stream):
            self._tensor[slot : slot + 1].fill_(word)
        self._stream.synchronize()
