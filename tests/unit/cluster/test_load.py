"""The figures of a run of `kvferry load`, computed from answers with known times."""

from __future__ import annotations

import io

from rich.console import Console

from kvferry.cluster.arrivals import Load
from kvferry.cluster.client import Answer
from kvferry.cluster.load import Spread, is_good, measure, print_measured


def answer(ttft_s: float, gap_s: float, tokens: int, outcome: str = "delivered; bytes=1") -> Answer:
    arrivals = [ttft_s + gap_s * i for i in range(tokens)]
    return Answer("r", "x", [1] * tokens, 5, "length", outcome, ttft_s, arrivals[-1], None, arrivals)


def test_figures():
    answers = [answer(0.1, 0.01, 11), answer(0.3, 0.01, 11), answer(0.2, 0.01, 11, "recomputed; cause=x")]
    measured = measure(Load(4), [*answers, Answer("r", error="HTTP 503: full")], 2.0)
    assert (measured.requests_per_s, measured.tokens_per_s) == (1.5, 16.5)
    assert measured.ttft_ms == Spread(200.0, 280.0, 298.0)
    assert measured.itl_ms == Spread(10.0, 10.0, 10.0) == measured.tpot_ms
    assert measured.latency_ms is not None and measured.latency_ms.p50 == 300.0
    assert measured.outcomes == {"delivered": 2, "recomputed": 1}
    assert measured.errors == {"HTTP 503: full": 1}
    out = io.StringIO()
    print_measured(measured, Console(file=out, width=100))
    for part in ("TTFT", "200.00", "2 delivered, 1 recomputed", "1 x HTTP 503: full", "16.5 tokens/s"):
        assert part in out.getvalue()


def test_no_answer_gives_no_figures():
    measured = measure(Load(1), [Answer("r", error="broke off")], 1.0)
    assert measured.ttft_ms is measured.itl_ms is measured.tpot_ms is measured.latency_ms is None
    assert measured.requests_per_s == 0.0


def test_goodput_counts_what_kept_both_limits():
    fast, late, slow = answer(0.1, 0.01, 11), answer(0.5, 0.01, 11), answer(0.1, 0.2, 11)
    broken, short = Answer("r", error="HTTP 503: full"), answer(0.1, 0.0, 1)
    answers = [fast, late, slow, broken, short]
    for load, good in (
        (Load(5), [fast, late, slow, short]),
        (Load(5, ttft_limit_s=0.2), [fast, slow, short]),
        (Load(5, tpot_limit_s=0.05), [fast, late, short]),
        (Load(5, ttft_limit_s=0.2, tpot_limit_s=0.05), [fast, short]),
    ):
        assert [a for a in answers if is_good(a, load)] == good
        assert measure(load, answers, 2.0).goodput_per_s == len(good) / 2
    out = io.StringIO()
    measured = measure(Load(5, ttft_limit_s=0.2, tpot_limit_s=0.05), answers, 2.0, [0.001, 0.003])
    print_measured(measured, Console(file=out, width=100))
    assert "2 within the limits, 1.00 a second" in out.getvalue() and "sent late" in out.getvalue()
    assert measured.late_ms is not None and measured.late_ms.p50 == 2.0
