"""Tokens to text while they come, never showing half a character."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
MAX_HELD_CHARS = 4
"""A UTF-8 character has at most four bytes, so a longer run of replacement characters is final in its front part."""

MAX_WINDOW_TOKENS = 64


class Decoder(Protocol):
    """The part of a tokenizer that this needs."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...


class Detokenizer:
    """One answer's text, piece by piece.

    A token may end inside a character; a decoder shows that as U+FFFD. Such an ending is held back until a later
    token completes it or `flush` says that none will. A short window of tokens is decoded again for each token, so
    that decoders which look at neighbours (spaces, runs of bytes) see them.
    """

    def __init__(self, decoder: Decoder, *, skip_special_tokens: bool = True) -> None:
        self._decoder = decoder
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []
        self._num_settled = 0
        self._shown = ""

    def feed(self, token_id: int) -> str:
        """The text that this token makes certain; often empty, never part of a character."""
        self._window.append(token_id)
        text = self._decode(self._window)
        num_held = 0
        while num_held < MAX_HELD_CHARS and text[len(text) - num_held - 1 : len(text) - num_held] == REPLACEMENT:
            num_held += 1
        certain = text[: len(text) - num_held]
        overlong = len(self._window) > MAX_WINDOW_TOKENS
        if not certain.startswith(self._shown) and not overlong:
            return ""
        piece = certain[len(self._shown) :]
        self._shown = certain
        if num_held == 0:
            self._restart(self._window[self._num_settled :], num_held=0)
            self._num_settled = len(self._window)
        elif overlong:
            # Only a run of bytes that form no text gets here; its front part will not change any more.
            self._restart(self._window[-2 * MAX_HELD_CHARS :], num_held)
            self._num_settled = 0
        return piece

    def flush(self) -> str:
        """The rest, at the end of the answer; an incomplete character shows as U+FFFD."""
        text = self._decode(self._window)
        piece = text[len(self._shown) :]
        self._shown = text
        return piece

    def _restart(self, window: list[int], num_held: int) -> None:
        """Go on with the last tokens only: all of their text is shown already but for `num_held` characters."""
        self._window = window
        text = self._decode(window)
        self._shown = text[: len(text) - num_held]

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._decoder.decode(tokens, skip_special_tokens=self._skip_special_tokens)
