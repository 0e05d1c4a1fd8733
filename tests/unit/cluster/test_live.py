"""The live table, drawn without a terminal."""

from __future__ import annotations

import io

from rich.console import Console

from kvferry.cluster.live import Picture, _as_line, draw
from kvferry.cluster.router_view import EndedRequest, HandoffRow, InstanceRow, OpenRequest, Requests
from kvferry.types import TerminalState

ENDED = EndedRequest(
    "r-recomputed",
    TerminalState.RECOMPUTED,
    "waiting",
    "peer_gone",
    "the connection to prefill-0 was lost",
    prefill="prefill-0",
    decode="decode-0",
    stages={"queue": 0.0011, "prefill": 0.02},
    handoff_bytes=12345,
)


def drawn(picture: Picture, height: int = 40) -> str:
    out = io.StringIO()
    Console(file=out, width=160).print(draw(picture, "Ctrl-C ends all", height))
    return out.getvalue()


def instance(name: str, **more: object) -> InstanceRow:
    return InstanceRow(name, "decode", "http://x:1", "m", num_blocks=100, free_blocks=75, running=3, **more)  # type: ignore[arg-type]


def test_instances_and_requests_are_shown():
    requests = Requests([OpenRequest("r-open", "running", "waiting", 1.25, prefill="p", decode="d")], [ENDED])
    text = drawn(Picture("http://r:8000", [instance("decode-0")], requests))
    for part in ("http://r:8000", "decode-0", "25/100", "serving", "r-open", "waiting 1.2 s", "p → d", "Ctrl-C"):
        assert part in text, part
    for part in ("recomputed", " 1.1 ", " 20.0 ", "times in ms", "12,345", "waiting peer_gone"):
        assert part in text, part
    assert "r-recomputed recomputed: the connection to prefill-0 was lost\n" in text


def test_open_handoffs_show_both_sides_and_how_far_they_are():
    rows = [
        HandoffRow("decode-0", "ab" * 16, "target", "waiting", 8.0, 22.0, "prefill-0", "0 runs pulled of 0 known", 0.5),
        HandoffRow("prefill-0", "ab" * 16, "source", "open", 7.9, 22.1, "d1", "0 runs published"),
        HandoffRow("decode-0", "cd" * 16, "target", "pulling", 1.0, 29.0, "prefill-1", "3 runs pulled of 9 known"),
        HandoffRow("prefill-0", "ef" * 16, "source", "sealed", 0.5, 29.5, "d1", "9 runs published, not subscribed"),
    ]
    lines = drawn(Picture("http://r", [instance("decode-0")], Requests(handoffs=rows))).splitlines()
    both, lone, early = (
        next(x for x in lines if x.startswith(h)) for h in ("abababababab", "cdcdcdcdcdcd", "efefefefefef")
    )
    for part in ("prefill-0 open", "decode-0 waiting", "8.5 s", "21.5 s", "0 runs pulled of 0 known"):
        assert part in both, part
    assert "prefill-1 not known there" in lone and "decode-0 pulling" in lone
    assert "not subscribed" in early and "prefill-0 sealed" in early
    assert lines.index(both) < lines.index(lone)


def test_the_doctors_own_requests_are_not_shown():
    own = EndedRequest("r-probe", TerminalState.FAILED, decode="kvferry-doctor-1f-decode")
    text = drawn(Picture("http://r", [instance("decode-0")], Requests([], [ENDED, own])))
    assert "r-recomputed" in text and "r-probe" not in text


def test_trouble_is_shown():
    text = drawn(
        Picture(
            "http://r",
            [instance("a", stuck=True), instance("b", silent_s=2.6), instance("c", mismatches=["dtype [bf16]"])],
            trouble="no answer",
        )
    )
    assert "stuck" in text and "silent" in text and "does not fit: dtype [bf16]" in text and "no answer" in text


def test_the_table_stays_within_the_screen():
    recent = [ENDED] * 50
    for height in (15, 24, 60):
        handoffs = [HandoffRow("d", f"{i:032x}", "target", "waiting", 1.0, 2.0) for i in range(20)]
        for requests in (Requests([], recent), Requests([], recent, handoffs)):
            text = drawn(Picture("http://r", [instance(f"i{n}") for n in range(3)], requests), height)
            assert len(text.splitlines()) <= height
    assert "none yet" in drawn(Picture("http://r"))


def test_the_plain_line():
    assert _as_line(ENDED) == (
        "r-recomputed recomputed prefill-0->decode-0 queue=1.1ms prefill=20.0ms bytes=12345 waiting peer_gone: "
        "the connection to prefill-0 was lost"
    )
