"""A transformers `Cache` whose bytes lie in paged blocks, and which tells when a layer's KV is in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from kvferry.connector.transformers.attention import RowStates
from kvferry.connector.transformers.memory import KVMemory, Slots
from kvferry.errors import CompatibilityError


class RowSlots(NamedTuple):
    """Where one row of a forward pass, which is one sequence, reads and writes.

    The pass has the row's tokens from `num_past` on. `past` locates the tokens before them; `written` locates the
    pass's tokens [write_from, write_from + len(written)), the others are thrown away after the pass.
    """

    num_past: int
    past: Slots
    written: Slots
    write_from: int = 0


class PagedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's view of the paged memory, for the sequences whose pass is running."""

    is_sliding = False

    def __init__(self, layer: int, cache: PagedCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._layer = layer
        self._cache = cache
        self.is_initialized = True

    def update(  # type: ignore[override]
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[RowStates, RowStates]:
        """Write the pass's new KV into its blocks; return each row's past and new KV, as `paged_attention` takes it."""
        rows = self._cache.memory.rows[self._layer]
        self._require_fit(key_states, value_states, rows)
        keys: list[torch.Tensor | None] = []
        values: list[torch.Tensor | None] = []
        for i, slots in enumerate(self._cache.slots):
            if slots is None:
                keys.append(None)
                values.append(None)
                continue
            keys.append(_write_and_gather(rows, key_states[i], slots, slots.past.keys, slots.written.keys))
            values.append(_write_and_gather(rows, value_states[i], slots, slots.past.values, slots.written.values))
        self._cache.on_written(self._layer)
        return RowStates(keys), RowStates(values)

    def get_seq_length(self) -> int:
        return self._cache.num_past

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.num_past + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the arena is there before the first pass."""

    def _require_fit(self, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor) -> None:
        batch, num_heads, _, head_size = keys.shape
        expected = (len(self._cache.slots), *rows.shape[1:])
        if (batch, num_heads, head_size) != expected or values.shape != keys.shape:
            raise CompatibilityError(
                f"layer {self._layer} gives keys {list(keys.shape)} and values {list(values.shape)}, expected "
                f"[{expected[0]}, {expected[1]}, tokens, {expected[2]}] for both; this engine serves Llama-like "
                "decoders only"
            )


def _write_and_gather(
    rows: torch.Tensor, states: torch.Tensor, slots: RowSlots, past: torch.Tensor, written: torch.Tensor
) -> torch.Tensor:
    """Write `states` [num_kv_heads, tokens, head_size] to `written`; return them behind `past`, as one row."""
    new = states.transpose(0, 1)
    if len(written):
        rows.index_copy_(0, written, new[slots.write_from : slots.write_from + len(written)])
    full = torch.empty((slots.num_past + len(new), *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
    if slots.num_past:
        torch.index_select(rows, 0, past, out=full[: slots.num_past])
    full[slots.num_past :] = new
    return full.transpose(0, 1)[None]


class PagedCache(Cache):
    """All layers. `begin` points it at the next pass; `on_written(layer)` is called in order while the pass runs.

    On CUDA, `on_written` means that the copy is enqueued, not that it has happened: record an event there.
    """

    def __init__(self, memory: KVMemory) -> None:
        super().__init__(layers=[PagedLayer(i, self) for i in range(memory.geometry.num_layers)])
        self.memory = memory
        self.slots: Sequence[RowSlots | None] = ()
        self.on_written: Callable[[int], None] = lambda layer: None

    @property
    def num_past(self) -> int:
        """What the model's causal mask is made for; a pass of several rows has one token each and needs no mask."""
        only = self.slots[0] if len(self.slots) == 1 else None
        return only.num_past if only is not None else 0

    def begin(self, slots: Sequence[RowSlots | None], on_written: Callable[[int], None]) -> None:
        """The next pass has one row for each entry; an entry that is None is computed and thrown away."""
        self.slots, self.on_written = slots, on_written
