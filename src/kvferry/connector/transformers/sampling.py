"""From logits to one token."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch

from kvferry.connector.transformers.params import SamplingParams
from kvferry.connector.transformers.sequence import TokenLogprob

_MASKED = float("-inf")


class Sampler:
    """Draws one answer's tokens. Its random numbers are its own, so company does not change what it draws."""

    def __init__(self, params: SamplingParams, index: int, eos_token_ids: frozenset[int]) -> None:
        self._params = params
        self._eos = eos_token_ids
        seed = secrets.randbits(63) if params.seed is None else params.seed
        self._generator = torch.Generator().manual_seed((seed + index) % 2**63)

    def draw(self, logits: torch.Tensor, tokens: Sequence[int], num_prompt: int) -> TokenLogprob:
        """The next token.

        Args:
            logits: float32 [vocab_size], CPU.
            tokens: prompt and answer so far.
        Returns: the token with its log-probability before temperature and filters, as OpenAI's API tells it.
        """
        params = self._params
        adjusted = self._adjust(logits, tokens, num_prompt)
        if params.greedy:
            token = int(adjusted.argmax())
        else:
            weights = self._filter(torch.softmax(adjusted / params.temperature, dim=-1))
            token = int(torch.multinomial(weights, 1, generator=self._generator))
        if params.logprobs is None:
            return TokenLogprob(token, 0.0)
        logprobs = torch.log_softmax(adjusted, dim=-1)
        top = torch.topk(logprobs, min(params.logprobs, len(logprobs)))
        alternatives = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return TokenLogprob(token, float(logprobs[token]), alternatives)

    def _adjust(self, logits: torch.Tensor, tokens: Sequence[int], num_prompt: int) -> torch.Tensor:
        """Penalties, bias, and no end before `min_tokens`."""
        params = self._params
        adjusted = logits.clone()
        if params.repetition_penalty != 1.0:
            seen = torch.tensor(sorted(set(tokens)))
            values = adjusted[seen]
            adjusted[seen] = torch.where(
                values > 0, values / params.repetition_penalty, values * params.repetition_penalty
            )
        if params.presence_penalty or params.frequency_penalty:
            counts = torch.bincount(torch.tensor(tokens[num_prompt:], dtype=torch.int64), minlength=len(adjusted))
            adjusted -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
        for token, bias in params.logit_bias.items():
            adjusted[token] += bias
        if len(tokens) - num_prompt < params.min_tokens:
            adjusted[sorted({*self._eos, *params.stop_token_ids})] = _MASKED
        return adjusted

    def _filter(self, weights: torch.Tensor) -> torch.Tensor:
        """Keep the likeliest tokens: top_k, min_p, then the smallest set whose probability reaches top_p."""
        params = self._params
        if params.top_k and params.top_k < len(weights):
            weights = torch.where(weights < torch.topk(weights, params.top_k).values[-1], 0.0, weights)
        if params.min_p > 0:
            weights = torch.where(weights < params.min_p * weights.max(), 0.0, weights)
        if params.top_p < 1:
            ordered, order = torch.sort(weights / weights.sum(), descending=True, stable=True)
            before = torch.cumsum(ordered, dim=-1) - ordered
            weights = weights.clone()
            weights[order[before >= params.top_p]] = 0.0
        return weights
