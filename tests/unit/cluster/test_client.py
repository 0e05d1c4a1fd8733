"""The streaming client, line by line."""

from __future__ import annotations

import time

import pytest

from kvferry.cluster.client import Answer, _take_line
from kvferry.errors import WireError


def taken(*lines: str) -> tuple[Answer, list[str]]:
    answer, shown = Answer("r"), []
    for line in lines:
        _take_line(answer, line, time.monotonic(), shown.append)
    return answer, shown


def test_completion_and_chat_chunks_add_up():
    answer, shown = taken(
        'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}',
        "",
        'data: {"choices":[{"delta":{"content":"静"},"token_ids":[1,2,3]}]}',
        'data: {"choices":[{"text":"🚢","token_ids":[4],"finish_reason":"length"}]}',
        'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":4,"total_tokens":13}}',
        ": kvferry-outcome delivered; bytes=8192",
        "data: [DONE]",
    )
    assert (answer.text, answer.token_ids, shown) == ("静🚢", [1, 2, 3, 4], ["静", "🚢"])
    assert (answer.num_prompt_tokens, answer.finish_reason) == (9, "length")
    assert answer.outcome == "delivered; bytes=8192"
    assert answer.ttft_s is not None and answer.error is None


def test_an_error_event_is_the_answers_error():
    answer, _ = taken('data: {"error":{"message":"the decode instance has died","code":502}}')
    assert answer.error == "the decode instance has died"


def test_a_line_that_is_no_event_is_refused():
    with pytest.raises(WireError, match="no event"):
        taken("<html>")


def test_other_comments_are_skipped():
    answer, shown = taken(": ping")
    assert (answer.text, answer.outcome, shown) == ("", None, [])
