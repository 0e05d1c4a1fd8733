"""What others may know of an engine, as one value."""

from __future__ import annotations

import msgspec


class EngineSnapshot(msgspec.Struct, frozen=True):
    """The engine as it was at the end of a step. Totals count from the start."""

    step: int = 0
    num_blocks: int = 0
    free_blocks: int = 0
    held_blocks: int = 0
    cached_blocks: int = 0
    running: int = 0
    waiting: int = 0
    parked: int = 0
    draining: int = 0
    handoffs: int = 0
    prompt_tokens: int = 0
    computed_prompt_tokens: int = 0
    reused_prompt_tokens: int = 0
    generated_tokens: int = 0
    pooled_prompt_tokens: int = 0
    pool_transfers: int = 0
