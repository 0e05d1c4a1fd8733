"""Attention over sequences of different lengths, one after another, inside one batched forward pass.

The linear layers see a batch of fixed size; each sequence's attention sees its own keys and values only. So nothing
is padded to the longest sequence, and a sequence's result does not depend on the others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

PAGED_ATTENTION = "kvferry_paged"
"""The name under which transformers knows `paged_attention`."""


class RowStates(NamedTuple):
    """Keys, or values, of each row of the batch: [1, num_kv_heads, tokens, head_size]; None where the row is empty."""

    rows: list[torch.Tensor | None]


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: Any,
    value: Any,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function.

    Args:
        query: [batch, num_heads, tokens, head_size].
        key, value: `RowStates` from a `PagedCache`, plain tensors from any other cache.
    Returns: [batch, tokens, num_heads, head_size]; zeros in rows that are empty.
    """
    if not isinstance(key, RowStates):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None and len(key.rows) > 1:
        raise ValueError("a batch of several sequences takes no attention mask: each row has a length of its own")
    batch, num_heads, num_tokens, head_size = query.shape
    out = query.new_zeros((batch, num_tokens, num_heads, head_size))
    for i, (k, v) in enumerate(zip(key.rows, value.rows, strict=True)):
        if k is not None:
            out[i : i + 1] = sdpa_attention_forward(module, query[i : i + 1], k, v, attention_mask, **kwargs)[0]
    return out, None


AttentionInterface.register(PAGED_ATTENTION, paged_attention)
AttentionMaskInterface.register(PAGED_ATTENTION, sdpa_mask)
