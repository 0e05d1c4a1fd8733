"""Server-sent events at every split."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.router import streaming
from kvferry.router.streaming import EventStream

EVENTS = 'data: {"text":"ü世🚢"}\n\n: a comment\n\ndata: {"text":"data: [DONE]"}\n\n'.encode()
DONE = b"data: [DONE]\n\n"


def run(pieces: list[bytes]) -> tuple[bytes, bytes, EventStream]:
    stream = EventStream()
    out = b"".join(stream.feed(piece) for piece in pieces)
    return out, stream.rest(), stream


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r"])
def test_done_is_found_at_every_split(end: bytes) -> None:
    events = EVENTS.replace(b"\n\n", end)
    done = DONE.replace(b"\n\n", end)
    whole = events + done
    for at in range(len(whole) + 1):
        out, rest, stream = run([whole[:at], whole[at:]])
        assert (out, rest) == (events, done), at
        assert stream.done and not stream.failed


@given(st.lists(st.integers(0, len(EVENTS + DONE)), max_size=12))
def test_any_split_gives_the_same_bytes(cuts: list[int]) -> None:
    whole = EVENTS + DONE
    edges = [0, *sorted(cuts), len(whole)]
    out, rest, _ = run([whole[a:b] for a, b in itertools.pairwise(edges)])
    assert (out, rest) == (EVENTS, DONE)


@given(st.lists(st.binary(max_size=40)))
def test_no_byte_is_lost_or_moved(pieces: list[bytes]) -> None:
    out, rest, _ = run(pieces)
    assert out + rest == b"".join(pieces)


def test_every_byte_alone() -> None:
    whole = EVENTS + DONE
    out, rest, _ = run([whole[i : i + 1] for i in range(len(whole))])
    assert (out, rest) == (EVENTS, DONE)


def test_only_whole_events_go_out() -> None:
    stream = EventStream()
    assert stream.feed(b"data: a\n\ndata: b") == b"data: a\n\n"
    assert not stream.mid_event
    assert stream.feed(b"c\n") == b""
    assert stream.feed(b"\ndata: d") == b"data: bc\n\n"
    assert stream.rest() == b"data: d"


def test_done_without_a_space_and_text_that_only_looks_like_it() -> None:
    assert run([b"data:[DONE]\n\n"])[:2] == (b"", b"data:[DONE]\n\n")
    text = b'data: {"text":"\\ndata: [DONE]"}\n\nxdata: [DONE]\n\n'
    out, rest, stream = run([text])
    assert (out, rest, stream.done) == (text, b"", False)


def test_an_event_beyond_all_bounds_is_not_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "MAX_EVENT_BYTES", 10)
    stream = EventStream()
    assert stream.feed(b"data: 0123456789") == b"data: 0123456789"
    assert stream.mid_event
    # Still mid-line: this is text of the long event.
    assert stream.feed(b"data: [DONE]\n\n") == b"data: [DONE]\n\n"
    assert not stream.done and not stream.mid_event
    assert stream.feed(DONE) == b"" and stream.done


@pytest.mark.parametrize("event", [b'data: {"error": {}}\n\n', b'data:{"error":{}}\n\n', b'data: { "error": {}}\n\n'])
def test_an_error_event_is_seen_at_every_split(event: bytes) -> None:
    whole = b"data: x\n\n" + event + DONE
    for at in range(len(whole) + 1):
        assert run([whole[:at], whole[at:]])[2].failed, at


def test_the_word_error_in_a_text_is_none() -> None:
    assert not run([b'data: {"text":"{\\"error\\"", "x":{"error": 1}}\n\n' + DONE])[2].failed
