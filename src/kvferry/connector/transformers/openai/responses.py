"""Answers in OpenAI's form: whole, and as chunks of a stream."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from kvferry.connector.transformers.detokenizer import Decoder
from kvferry.connector.transformers.openai.requests import Call
from kvferry.connector.transformers.params import RequestError
from kvferry.connector.transformers.sequence import Piece, TokenLogprob

DONE = b"data: [DONE]\n\n"


def error_body(error: RequestError) -> dict[str, Any]:
    """OpenAI's form of an error."""
    return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}}


def event_bytes(body: dict[str, Any]) -> bytes:
    """One server-sent event. Text is UTF-8 as it is, never escaped, and has no line break outside of JSON."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


class Choice:
    """One answer as its pieces come."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.pieces: list[Piece] = []
        self.num_sent = 0
        self.num_shown_chars = 0

    @property
    def finished(self) -> bool:
        return bool(self.pieces) and self.pieces[-1].finish_reason is not None

    @property
    def num_tokens(self) -> int:
        return sum(len(p.token_ids) for p in self.pieces)

    def take_unsent(self) -> Piece | None:
        """What to send now: everything since the last send, as soon as there is text or an end."""
        unsent = self.pieces[self.num_sent :]
        if not unsent or not (any(p.text for p in unsent) or unsent[-1].finish_reason):
            return None
        self.num_sent = len(self.pieces)
        return join(unsent)


def join(pieces: Sequence[Piece]) -> Piece:
    """Pieces of one answer as one."""
    return msgspec.structs.replace(
        pieces[-1],
        text="".join(p.text for p in pieces),
        token_ids=tuple(t for p in pieces for t in p.token_ids),
        logprobs=tuple(lp for p in pieces for lp in p.logprobs),
    )


class Writer:
    """Writes one call's bodies."""

    def __init__(self, call: Call, response_id: str, model: str, decoder: Decoder) -> None:
        self._call = call
        self._model = model
        self._decoder = decoder
        self._id = ("chatcmpl-" if call.chat else "cmpl-") + response_id
        self._created = int(time.time())

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        kind = "chat.completion" if self._call.chat else "text_completion"
        return {**self._head(kind), "choices": [self._choice(c) for c in choices], "usage": self.usage(choices)}

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """The first chunk of a chat's answer, which names the speaker; completions have none."""
        if not self._call.chat:
            return None
        entry = {
            "index": choice.index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        return self._chunk([entry])

    def chunk(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        """One chunk with what `piece` adds to the answer."""
        entry: dict[str, Any] = {"index": choice.index}
        if self._call.chat:
            entry["delta"] = {"content": piece.text} if piece.text else {}
        else:
            entry["text"] = piece.text
        entry["logprobs"] = self._logprobs(piece, choice.num_shown_chars)
        entry["finish_reason"] = piece.finish_reason
        entry["stop_reason"] = piece.stop_reason
        choice.num_shown_chars += len(piece.text)
        return self._chunk([self._with_tokens(entry, piece, choice)])

    def closing(self, choices: Sequence[Choice]) -> dict[str, Any] | None:
        """The last chunk, with the usage of the whole call, where the client asked for it."""
        return {**self._chunk([]), "usage": self.usage(choices)} if self._call.include_usage else None

    def usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        num_prompt = sum(len(p) for p in self._call.prompts)
        num_answer = sum(c.num_tokens for c in choices)
        firsts = [c.pieces[0] for c in choices[:: self._call.params.n] if c.pieces]
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_answer,
            "total_tokens": num_prompt + num_answer,
            "prompt_tokens_details": {"cached_tokens": sum(p.num_cached_tokens for p in firsts)},
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(self, entries: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._call.chat else "text_completion"
        return {**self._head(kind), "choices": entries}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        piece = join(choice.pieces)
        entry: dict[str, Any] = {"index": choice.index}
        if self._call.chat:
            entry["message"] = {"role": "assistant", "content": piece.text, "refusal": None}
        else:
            entry["text"] = piece.text
        entry["logprobs"] = self._logprobs(piece, 0)
        entry["finish_reason"] = piece.finish_reason
        entry["stop_reason"] = piece.stop_reason
        return self._with_tokens(entry, piece, choice, whole=True)

    def _with_tokens(
        self, entry: dict[str, Any], piece: Piece, choice: Choice, *, whole: bool = False
    ) -> dict[str, Any]:
        if self._call.return_token_ids:
            entry["token_ids"] = list(piece.token_ids)
            if whole:
                entry["prompt_token_ids"] = self._call.prompts[choice.index // self._call.params.n]
        return entry

    def _logprobs(self, piece: Piece, num_shown_chars: int) -> dict[str, Any] | None:
        if self._call.params.logprobs is None:
            return None
        if self._call.chat:
            return {"content": [self._chat_logprob(lp) for lp in piece.logprobs], "refusal": None}
        tokens = [self._token_text(lp.token_id) for lp in piece.logprobs]
        offsets, at = [], num_shown_chars
        for text in tokens:
            offsets.append(at)
            at += len(text)
        return {
            "tokens": tokens,
            "token_logprobs": [lp.logprob for lp in piece.logprobs],
            "top_logprobs": [
                {self._token_text(t): value for t, value in reversed([*lp.alternatives, (lp.token_id, lp.logprob)])}
                for lp in piece.logprobs
            ],
            "text_offset": offsets,
        }

    def _chat_logprob(self, drawn: TokenLogprob) -> dict[str, Any]:
        def entry(token_id: int, logprob: float) -> dict[str, Any]:
            text = self._token_text(token_id)
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        return {
            **entry(drawn.token_id, drawn.logprob),
            "top_logprobs": [entry(t, value) for t, value in drawn.alternatives],
        }

    def _token_text(self, token_id: int) -> str:
        """A token by itself; half a character shows as U+FFFD here, in OpenAI's field for it."""
        return self._decoder.decode([token_id], skip_special_tokens=False)
