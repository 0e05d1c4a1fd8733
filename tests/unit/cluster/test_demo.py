"""The demo's verdict: it must not call a run good that was not."""

from __future__ import annotations

import io

import msgspec
import pytest
from rich.console import Console

from kvferry.cluster.client import Answer
from kvferry.cluster.demo import CHAT, PROMPTS, Report, Row, _prompts, _report, print_rows
from kvferry.cluster.local import ClusterPlan
from kvferry.cluster.router_view import EndedRequest
from kvferry.config import load
from kvferry.types import TerminalState

PLAN = ClusterPlan(1, 1, load())


def answer(tokens: list[int], *, text: str = "x", error: str | None = None) -> Answer:
    return Answer("demo-0", text, tokens, 5, "length", None, 0.02, 0.1, error)


def row(
    state: TerminalState | None = TerminalState.DELIVERED,
    ours: Answer | None = None,
    single: Answer | None = None,
) -> Row:
    record = None
    if state is not None:
        stages = {"queue": 0.0, "prefill": 0.01, "handoff": 0.002, "decode": 0.03}
        record = EndedRequest(
            "demo-0", state, "waiting", "peer_gone", stages=stages, handoff_s=0.01, handoff_bytes=4096
        )
    return Row("What is [bold]a ferry?", ours or answer([1, 2]), record, single or answer([1, 2]))


def shown(*rows: Row, width: int = 80) -> str:
    out = io.StringIO()
    print_rows(rows, _report(PLAN, rows), Console(file=out, width=width))
    return out.getvalue()


def test_a_good_run():
    report = _report(PLAN, [row(), row()])
    assert report.is_good and report.tokens_equal
    assert (report.requests, report.delivered, report.recomputed, report.failed) == (2, 2, 0, 0)
    assert (report.handoff_bytes, report.handoff_ms_p50, report.ttft_ms_p50, report.tokens) == (8192, 10.0, 20.0, 4)
    named = {"prefill", "decode", "requests", "tokens_equal", "delivered", "recomputed", "failed"}
    named |= {"handoff_bytes", "handoff_ms_p50", "ttft_ms_p50"}
    assert named <= set(msgspec.to_builtins(report))


@pytest.mark.parametrize(
    "bad",
    [
        row(TerminalState.RECOMPUTED),
        row(TerminalState.FAILED),
        row(TerminalState.ABORTED),
        row(None),
        row(ours=answer([1, 3])),
        row(ours=answer([1])),
        row(ours=answer([]), single=answer([])),
        row(ours=answer([1, 2], text="y")),
        row(ours=answer([1, 2], error="broke off")),
        row(single=answer([1, 2], error="broke off")),
    ],
)
def test_one_bad_request_makes_a_bad_run(bad: Row):
    assert not _report(PLAN, [row(), bad]).is_good


def test_the_table_fits_80_columns_and_keeps_what_matters():
    text = shown(row(), row())
    table = text.partition("Times in ms")[0].splitlines()
    assert max(map(len, table)) <= 80
    names = "request tokens queue prefill handoff after decode TTFT KV KiB ended ="
    assert next(line for line in table if line.startswith("request")).split() == names.split()
    assert "delivered" in text and "yes" in text and "all tokens equal" in text


def test_what_went_wrong_is_said():
    assert "tokens differ from the single instance's at 1: [3] and [2]" in shown(row(ours=answer([1, 3])), width=200)
    assert "recomputed: waiting, peer_gone" in shown(row(TerminalState.RECOMPUTED), width=200)
    assert "no record" in shown(row(None), width=200)
    assert "broke off" in shown(row(ours=answer([], error="broke off")), width=200)


def test_prompts_are_all_different_and_come_in_three_scripts():
    prompts = _prompts(20)
    assert len(prompts) == len(set(prompts)) == 20
    assert prompts[: len(PROMPTS)] == list(PROMPTS)
    texts = [text for _, text in PROMPTS]
    assert any(t.isascii() for t in texts) and any("静" in t for t in texts) and any("🚢" in t for t in texts)
    assert {path for path, _ in PROMPTS} == {CHAT, "/v1/completions"}


def test_an_empty_report_measures_nothing():
    report = _report(PLAN, [])
    assert isinstance(report, Report) and report.handoff_ms_p50 is None and report.ttft_ms_p50 is None
