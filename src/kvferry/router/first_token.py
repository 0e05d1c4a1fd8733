"""The prefill instance's token, streamed at once; the decode instance's own first token must be the same. Pure.

Both compute it from the same KV, so where nothing is drawn by chance, or both draw with the client's seed, the client
need not wait for the decode instance to say it again. It says it all the same, and is compared: what the client got
already is taken out of its stream, and another token ends the stream with an error. Only here are events decoded.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import msgspec

from kvferry.errors import IntegrityError
from kvferry.router.requests import ApiRequest

_UNFIT = frozenset(
    {
        "stop",
        "stop_token_ids",
        "tools",
        "functions",
        "response_format",
        "structured_outputs",
        "logprobs",
        "top_logprobs",
        "echo",
        "min_tokens",
        "return_token_ids",
        "suffix",
    }
)
"""What changes how the first token is chosen or written when one token is all that is asked for."""

_EVENT_END = re.compile(rb"\r?\n\r?\n")
_decoder = msgspec.json.Decoder(dict[str, Any])


def may_stream(request: ApiRequest) -> bool:
    """Whether both instances must come to the same first token, and write it in the same way."""
    fields = request.fields
    if not request.stream or any(
        bytes(fields[name]) not in (b"null", b"[]", b"false") for name in _UNFIT & set(fields)
    ):
        return False
    try:
        options = msgspec.json.decode(fields.get("stream_options", msgspec.Raw(b"null")), type=dict[str, Any] | None)
        temperature = msgspec.json.decode(fields.get("temperature", msgspec.Raw(b"1")), type=float | None)
    except msgspec.MsgspecError:
        return False  # the instance will say what is wrong with it
    is_seeded = bytes(fields.get("seed", msgspec.Raw(b"null"))) != b"null"
    return (temperature == 0 or is_seeded) and not (options or {}).get("continuous_usage_stats")


class FirstToken(NamedTuple):
    """What the token reads, and the events that tell the client of it."""

    text: str
    events: bytes


class FirstTokenReader:
    """Finds the token in the prefill instance's stream. `feed` takes whole events."""

    def __init__(self) -> None:
        self.over = False
        self._before: list[bytes] = []

    def feed(self, events: bytes) -> FirstToken | None:
        """The token, once; None before, and for ever where it cannot be told from these events."""
        for event in _split(events):
            if self.over:
                return None
            chunk = _chunk_of(event)
            if chunk is None:
                continue
            choice = _only_choice(chunk)
            text = None if choice is None else _text_of(choice)
            if choice is None or text is None or choice.get("finish_reason") not in (None, "length"):
                self.over = True
            elif text == "" and choice.get("finish_reason") is None:
                self._before.append(event)  # a chat's role
            else:
                self.over = True
                # Half a character is written otherwise once the other half is there.
                if text and "\ufffd" not in text:
                    choice["finish_reason"] = None
                    return FirstToken(text, b"".join([*self._before, _event_of(chunk)]))
        return None


class Splice:
    """Joins the decode instance's stream to a first token that the client has. `done` once all of it was seen again."""

    def __init__(self, first: FirstToken) -> None:
        self._first, self._rest = first.text, first.text

    @property
    def done(self) -> bool:
        return not self._rest

    def feed(self, events: bytes) -> bytes:
        """What of these whole events is news to the client.

        Raises: IntegrityError: the decode instance begins otherwise.
        """
        out = []
        for event in _split(events):
            chunk = None if self.done else _chunk_of(event)
            choice = None if chunk is None else _only_choice(chunk)
            if chunk is None or choice is None:
                out.append(event)
                continue
            text = _text_of(choice)
            if text is None or not (text.startswith(self._rest) or self._rest.startswith(text)):
                raise self._differs(text)
            self._rest, news = self._rest[len(text) :], text[len(self._rest) :]
            ends = choice.get("finish_reason") is not None
            if ends and not self.done:
                raise self._differs(text)
            if news or ends:
                _set_text(choice, news)
                out.append(_event_of(chunk))
        return b"".join(out)

    def _differs(self, text: str | None) -> IntegrityError:
        return IntegrityError(
            f"the decode instance begins with {text!r} where the prefill instance's token, which the client has, reads "
            f"{self._first!r}: their numbers differ; start the router without --stream-first-token"
        )


def _split(events: bytes) -> list[bytes]:
    """Whole events, each with its blank line; what follows the last one is an event too."""
    ends = [match.end() for match in _EVENT_END.finditer(events)]
    starts = [0, *ends]
    return [part for a, b in zip(starts, [*ends, len(events)], strict=True) if (part := events[a:b])]


def _chunk_of(event: bytes) -> dict[str, Any] | None:
    """The JSON of a data event with choices; None for comments, errors and `[DONE]`."""
    if not event.startswith(b"data:"):
        return None
    try:
        chunk = _decoder.decode(event[5:])
    except msgspec.MsgspecError:
        return None
    return chunk if chunk.get("choices") else None


def _only_choice(chunk: dict[str, Any]) -> dict[str, Any] | None:
    choices = chunk["choices"]
    return choices[0] if isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], dict) else None


def _text_of(choice: dict[str, Any]) -> str | None:
    """The choice's text; None where it says something else, such as a tool call or a thought."""
    if "delta" not in choice:
        text = choice.get("text")
        return text if isinstance(text, str) else None
    delta = choice["delta"]
    if any(value for name, value in delta.items() if name not in ("role", "content")):
        return None
    return delta.get("content") or ""


def _set_text(choice: dict[str, Any], text: str) -> None:
    if "delta" in choice:
        choice["delta"]["content"] = text
    else:
        choice["text"] = text


def _event_of(chunk: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"
