"""One answer being written: draws its tokens, turns them into text, knows when it ends."""

from __future__ import annotations

import torch

from kvferry.connector.transformers.detokenizer import Decoder, Detokenizer
from kvferry.connector.transformers.sampling import Sampler
from kvferry.connector.transformers.sequence import FinishReason, Piece, Sequence
from kvferry.connector.transformers.stopping import StopStrings


class Answer:
    """Everything of one answer but its KV."""

    def __init__(self, sequence: Sequence, decoder: Decoder, eos_token_ids: frozenset[int]) -> None:
        params = sequence.params
        self._sequence = sequence
        self._ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_token_ids)
        self._eos = eos_token_ids
        self._sampler = Sampler(params, sequence.index, eos_token_ids)
        self._detokenizer = Detokenizer(decoder, skip_special_tokens=params.skip_special_tokens)
        self._stops = StopStrings(params.stop, include=params.include_stop)

    def extend(self, logits: torch.Tensor) -> Piece:
        """Draw one token, append it to the sequence, and return what may be shown.

        Args: logits: float32 [vocab_size], CPU.
        """
        sequence, params = self._sequence, self._sequence.params
        drawn = self._sampler.draw(logits, sequence.tokens, sequence.num_prompt)
        token = drawn.token_id
        sequence.tokens.append(token)
        finish: FinishReason | None = None
        reason: str | int | None = None
        text = ""
        if token in self._ends and sequence.num_generated >= params.min_tokens:
            finish, reason = "stop", None if token in self._eos else token
        else:
            text, reason = self._stops.feed(self._detokenizer.feed(token))
            if reason is not None:
                finish = "stop"
            elif sequence.num_generated >= params.max_tokens:
                finish = "length"
        if finish is not None and not isinstance(reason, str):
            rest, found = self._stops.feed(self._detokenizer.flush())
            text += rest
            if found is None:
                text += self._stops.flush()
            else:
                finish, reason = "stop", found
        return Piece(
            index=sequence.index,
            text=text,
            token_ids=(token,),
            logprobs=(drawn,) if params.logprobs is not None else (),
            finish_reason=finish,
            stop_reason=reason,
            num_cached_tokens=sequence.num_cached,
        )
