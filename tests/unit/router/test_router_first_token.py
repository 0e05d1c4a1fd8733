"""The prefill instance's token as the begin of a stream: whose streams, and what is made of decode's."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvferry.errors import IntegrityError
from kvferry.router.first_token import FirstToken, FirstTokenReader, Splice, may_stream
from kvferry.router.requests import parse

ROLE = {"role": "assistant", "content": ""}


def event(text: str | None = None, *, delta: dict[str, Any] | None = None, finish: str | None = None) -> bytes:
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
    choice |= {"delta": delta} if delta is not None else {"text": text}
    return b"data: " + json.dumps({"id": "c", "choices": [choice]}, separators=(",", ":")).encode() + b"\n\n"


def texts(events: bytes) -> list[str]:
    chunks = [json.loads(e[6:]) for e in events.split(b"\n\n") if e.startswith(b"data: {")]
    return [c["choices"][0].get("text", c["choices"][0].get("delta", {}).get("content")) for c in chunks]


def asked(**fields: Any) -> bool:
    body = {"model": "m", "prompt": "a", "stream": True, **fields}
    return may_stream(parse("/v1/completions", json.dumps(body).encode()))


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 0.0, "stop": None}, {"seed": 7}])
def test_greedy_and_seeded_streams_begin_with_it(fields: dict[str, Any]) -> None:
    assert asked(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.7},
        {"temperature": "cold"},
        {"temperature": None},
        {"seed": None},
        {"temperature": 0, "stream": False},
        {"temperature": 0, "stop": ["x"]},
        {"temperature": 0, "logprobs": 1},
        {"temperature": 0, "min_tokens": 3},
        {"temperature": 0, "echo": True},
        {"temperature": 0, "stream_options": {"continuous_usage_stats": True}},
    ],
)
def test_others_wait_for_decode(fields: dict[str, Any]) -> None:
    assert not asked(**fields)


def test_the_token_is_told_as_if_more_came() -> None:
    first = FirstTokenReader().feed(event(" fer", finish="length"))
    assert first is not None and first.text == " fer"
    assert json.loads(first.events[6:])["choices"][0]["finish_reason"] is None


def test_a_chats_role_goes_before_it() -> None:
    reader = FirstTokenReader()
    assert reader.feed(event(delta=ROLE)) is None
    first = reader.feed(event(delta={"content": "A"}, finish="length"))
    assert first is not None and texts(first.events) == ["", "A"]


@pytest.mark.parametrize(
    "events",
    [
        event("", finish="stop"),
        event("x", finish="stop"),
        event("", finish="length"),
        event("\ufffd", finish="length"),
        event(delta={"tool_calls": [{}]}),
        event(delta={"reasoning_content": "hm"}),
        b'data: {"choices":[{"text":"a"},{"text":"b"}]}\n\n',
        b'data: {"error":{"message":"no"}}\n\n' + b"data: [DONE]\n\n",
        b": kvferry-outcome x\n\n",
        b"data: {\n\n",
    ],
)
def test_what_is_no_plain_token_is_left_to_decode(events: bytes) -> None:
    reader = FirstTokenReader()
    assert reader.feed(events) is None


def test_after_one_that_is_no_token_none_is_looked_for() -> None:
    reader = FirstTokenReader()
    reader.feed(event("", finish="length"))
    assert reader.over and reader.feed(event("late")) is None


def splice(text: str) -> Splice:
    return Splice(FirstToken(text, b""))


def test_the_same_token_is_taken_out_and_the_rest_is_untouched() -> None:
    join, rest = splice(" fer"), event("ry") + event("", finish="stop") + b"data: [DONE]\n\n"
    assert join.feed(event(" fer") + rest) == rest
    assert join.done
    assert join.feed(rest) == rest


def test_decode_may_say_it_in_pieces_or_with_more() -> None:
    join = splice("ferry")
    assert join.feed(event("fer")) == b"" and not join.done
    assert texts(join.feed(event("ry boat"))) == [" boat"]


def test_a_chats_role_is_told_once() -> None:
    join = splice("A")
    assert join.feed(event(delta=ROLE) + event(delta={"content": "A"})) == b""
    assert texts(join.feed(event(delta={"content": "B"}))) == ["B"]


def test_an_answer_of_this_one_token_still_ends() -> None:
    out = splice("A").feed(event("A", finish="length"))
    assert json.loads(out[6:])["choices"][0] == {"index": 0, "finish_reason": "length", "text": ""}


def test_comments_and_errors_go_through() -> None:
    other = b": a comment\n\n" + b'data: {"error":{"message":"no"}}\n\n'
    assert splice("A").feed(other) == other


@pytest.mark.parametrize(
    "events", [event("B"), event("", finish="stop"), event("f", finish="length"), event(delta={"tool_calls": [{}]})]
)
def test_another_token_is_an_error(events: bytes) -> None:
    with pytest.raises(IntegrityError, match="'ferry'"):
        splice("ferry").feed(events)
