"""Detokenizer and stop strings, over a decoder whose tokens are bytes."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.connector.transformers.detokenizer import Detokenizer
from kvferry.connector.transformers.stopping import StopStrings


class ByteDecoder:
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return bytes(token_ids).decode(errors="replace")


class ByteFallbackDecoder:
    """As sentencepiece does: a run of bytes that is no UTF-8 as a whole shows one U+FFFD a byte."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        try:
            return bytes(token_ids).decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(token_ids)


@pytest.mark.parametrize("text", ["plain", "naïve façade", "你好，世界", "👋🏽🌍", "a你👋b", "e\u0301", "\ufffd real"])
@pytest.mark.parametrize("decoder", [ByteDecoder(), ByteFallbackDecoder()])
def test_every_piece_is_whole_characters_and_together_they_are_the_text(text: str, decoder: ByteDecoder) -> None:
    detokenizer = Detokenizer(decoder)
    pieces = [detokenizer.feed(b) for b in text.encode()]
    assert "".join(pieces) + detokenizer.flush() == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in p for p in pieces)
        assert "".join(pieces) == text


def test_a_character_shows_as_soon_as_its_last_byte_is_there() -> None:
    detokenizer = Detokenizer(ByteDecoder())
    assert [detokenizer.feed(b) for b in "é👋".encode()] == ["", "é", "", "", "", "👋"]


def test_an_incomplete_end_shows_only_at_flush() -> None:
    detokenizer = Detokenizer(ByteDecoder())
    assert [detokenizer.feed(b) for b in b"ok\xf0\x9f"] == ["o", "k", "", ""]
    assert detokenizer.flush() == "\ufffd"


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=300))
def test_any_bytes_give_the_text_that_decoding_them_at_once_gives(data: bytes) -> None:
    detokenizer = Detokenizer(ByteDecoder())
    assert "".join(detokenizer.feed(b) for b in data) + detokenizer.flush() == data.decode(errors="replace")


def test_the_window_stays_small_on_endless_garbage() -> None:
    sizes = []

    class Measuring(ByteDecoder):
        def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
            sizes.append(len(token_ids))
            return super().decode(token_ids, skip_special_tokens=skip_special_tokens)

    detokenizer = Detokenizer(Measuring())
    text = "".join(detokenizer.feed(0x80) for _ in range(1000)) + detokenizer.flush()
    assert text == "\ufffd" * 1000
    assert max(sizes) <= 66


def split_feed(stops: StopStrings, pieces: Sequence[str]) -> tuple[str, str | None]:
    shown = ""
    for piece in pieces:
        text, found = stops.feed(piece)
        shown += text
        if found is not None:
            return shown, found
    return shown + stops.flush(), None


def test_a_stop_string_is_found_at_every_split() -> None:
    text = "one two STOP three"
    for i in range(len(text)):
        for j in range(i, len(text)):
            pieces = (text[:i], text[i:j], text[j:])
            assert split_feed(StopStrings(("STOP",)), pieces) == ("one two ", "STOP")
            assert split_feed(StopStrings(("STOP",), include=True), pieces) == ("one two STOP", "STOP")


def test_a_beginning_that_does_not_become_a_stop_string_is_shown_after_all() -> None:
    stops = StopStrings(("<end>",))
    assert stops.feed("a <en") == ("a ", None)
    assert stops.feed("emy> ") == ("<enemy> ", None)
    assert stops.feed("<e") == ("", None)
    assert stops.flush() == "<e"


def test_the_earliest_of_several_wins_and_the_longest_at_one_place() -> None:
    assert split_feed(StopStrings(("b", "abc", "ab")), ["xabcd"]) == ("x", "abc")
