"""What the router reads in a request, and what it sends to the legs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.router.errors import BadRequest
from kvferry.router.requests import ApiRequest, decode_body, merge_answers, parse, prefill_body
from kvferry.types import HandoffId, HandoffTicket, InstanceRef, ticket_from_params

TICKET = HandoffTicket(
    HandoffId("ab" * 16), "target", InstanceRef("p", 1, ("tcp://h:1",)), InstanceRef("d", 2), 30.0, 1
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def completion(**fields: Any) -> ApiRequest:
    return parse("/v1/completions", json.dumps(fields).encode())


@given(
    st.dictionaries(st.text(), VALUES, max_size=5).filter(
        lambda d: not {"stream", "model", "n", "prompt", "kv_transfer_params"} & d.keys()
    ),
    st.booleans(),
)
def test_decode_gets_the_client_s_object_and_the_ticket(fields: dict[str, Any], ascii_only: bool) -> None:
    raw = json.dumps(fields, ensure_ascii=ascii_only).encode("utf-8", "replace")
    request = parse("/v1/chat/completions", raw)
    sent = json.loads(decode_body(request, TICKET))
    assert ticket_from_params(sent.pop("kv_transfer_params")) == TICKET
    assert sent == json.loads(raw)
    assert decode_body(request, None) == raw


def test_prefill_computes_one_token_of_the_same_prompt() -> None:
    body = {
        "messages": [{"role": "user", "content": "ü"}],
        "tools": [{"type": "function"}],
        "max_completion_tokens": 50,
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": 3,
        "min_tokens": 7,
        "seed": 3,
    }
    request = parse("/v1/chat/completions", json.dumps(body).encode())
    sent = json.loads(prefill_body(request, TICKET))
    del sent["kv_transfer_params"]
    assert sent == {
        "messages": body["messages"],
        "tools": body["tools"],
        "seed": 3,
        "max_tokens": 1,
        "max_completion_tokens": 1,
        "stream": False,
    }


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, ""),
        ({"n": 1, "best_of": 1}, ""),
        ({"n": None, "best_of": None}, ""),
        ({"n": 2}, "n_above_one"),
        ({"best_of": 4}, "n_above_one"),
        ({"echo": True}, ""),
        ({"echo": True, "logprobs": 0}, "prompt_logprobs"),
        ({"echo": False, "logprobs": 2}, ""),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"use_beam_search": True}, "beam_search"),
        ({"prompt": ["a", "b"], "stream": True}, "many_prompts_streamed"),
        ({"prompt": ["a"], "stream": True}, ""),
        ({"prompt": ["a", "b"], "n": 2}, "n_above_one"),
    ],
)
def test_what_one_instance_must_do_alone(fields: dict[str, Any], reason: str) -> None:
    request = completion(**{"prompt": "a", **fields})
    assert request.direct_reason == reason and request.prompts == ()


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a", []),
        ([1, 2, 3], []),
        ([], []),
        (["a"], []),
        ([[1, 2]], []),
        (["a", "b"], ["a", "b"]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (["a", [3]], ["a", [3]]),
        (None, []),
        (7, []),
    ],
)
def test_prompts_that_are_split(prompt: Any, parts: list[Any]) -> None:
    request = completion(prompt=prompt, temperature=0.5)
    assert [json.loads(bytes(p)) for p in request.prompts] == parts
    for part, raw in zip(parts, request.prompts, strict=True):
        sub = request.part(raw)
        assert json.loads(decode_body(sub, None)) == {"prompt": part, "temperature": 0.5}


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"[]", b'"a"', b"{", b'{"a":1}}', b'{"a":01}', b"\xff", b'{"stream":1}', b'{"n":"2"}', b"[" * 9999],
)
def test_bad_bodies(body: bytes) -> None:
    with pytest.raises(BadRequest):
        parse("/v1/completions", body)


def test_a_client_cannot_send_a_ticket_however_it_is_spelt() -> None:
    for body in (b'{"kv_transfer_params":null}', b'{"kv_transfer_param\\u0073":{}}'):
        with pytest.raises(BadRequest, match="set by the router"):
            parse("/v1/completions", body)


def test_too_many_prompts() -> None:
    with pytest.raises(BadRequest, match="at most 1024"):
        completion(prompt=["a"] * 1025)


def test_merging_keeps_order_and_sums_usage() -> None:
    def answer(text: str, tokens: int) -> bytes:
        usage = {"prompt_tokens": tokens, "prompt_tokens_details": {"cached_tokens": 0}}
        return json.dumps({"id": text, "choices": [{"index": 0, "text": text}], "usage": usage}).encode()

    merged = json.loads(merge_answers([answer("é", 2), answer("b", 5)]))
    assert merged["choices"] == [{"index": 0, "text": "é"}, {"index": 1, "text": "b"}]
    assert merged["id"] == "é" and merged["usage"]["prompt_tokens"] == 7
