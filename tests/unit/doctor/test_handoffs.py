"""Stuck and undelivered handoffs, from what a router tells to who waits for whom and why."""

from __future__ import annotations

import re
from typing import Any

import pytest

from kvferry.doctor import Facts, Finding, examine

HANDOFF = "ab" * 16
PREFILL = {
    "instance_id": "prefill-0",
    "role": "prefill",
    "url": "http://p",
    "silent_s": 0.2,
    "answers": "yes",
    "num_blocks": 64,
    "free_blocks": 60,
}
DECODE = {**PREFILL, "instance_id": "decode-0", "role": "decode", "url": "http://d"}
REQUEST = {"request": "r-1", "handoff": HANDOFF, "stage": "handoff", "age_s": 8.0, "prefill": "prefill-0"}
TARGET = {
    "instance": "decode-0",
    "handoff": HANDOFF,
    "side": "target",
    "stage": "waiting",
    "age_s": 12.5,
    "remaining_s": 17.5,
    "peer": "prefill-0",
    "detail": "0 runs pulled of 0 known",
}
SOURCE = {**TARGET, "instance": "prefill-0", "side": "source", "stage": "open", "peer": "1f"}


def said(**state: Any) -> list[Finding]:
    router = {"instances": [PREFILL, DECODE], "handoffs": [TARGET], "requests": [REQUEST], "recent": [], **state}
    return examine(Facts(router=router, router_url="http://r"))


@pytest.mark.parametrize(
    ("prefill", "source", "cause"),
    [
        ({}, None, "the request did not reach prefill-0, or reached it without its ticket"),
        ({"waiting": 3, "running": 2}, None, "queues at prefill-0 behind 2 running and 3 waiting"),
        ({"running": 2}, SOURCE, "prefill-0 has 2 running and 0 waiting requests and is not done with this one"),
        ({"free_blocks": 0}, SOURCE, "the KV cache of prefill-0 is full"),
        ({}, {**SOURCE, "stage": "sealed"}, "everything is published there and decode-0 does not get it"),
    ],
)
def test_the_likely_cause_is_what_the_source_shows(prefill: Any, source: Any, cause: str) -> None:
    views = [TARGET, source] if source else [TARGET]
    findings = said(instances=[{**PREFILL, **prefill}, DECODE], handoffs=views)
    assert [f.id for f in findings] == ["KVF107"]
    for part in (
        cause,
        "of request r-1",
        "decode-0 is waiting since 12.5 s for prefill-0",
        "17.5 s remain",
        "0.2 s ago",
    ):
        assert part in findings[0].seen


@pytest.mark.parametrize(
    ("change", "finding", "trouble"),
    [
        ({"answers": "refused"}, "KVF114", "its process has ended"),
        ({"answers": "silent"}, "KVF114", "its process is stopped or hangs"),
        ({"silent_s": 3.0}, "KVF106", "no heartbeat of it for 3.0 s"),
        ({"standstill_s": 2.5, "running": 1, "step": 41}, "KVF106", "stands at step 41"),
    ],
)
@pytest.mark.parametrize("who", ["prefill-0", "decode-0"])
def test_an_instance_in_trouble_is_named_before_the_handoff_that_waits_for_it(
    change: Any, finding: str, trouble: str, who: str
) -> None:
    rows = [{**m, **change} if m["instance_id"] == who else m for m in (PREFILL, DECODE)]
    findings = said(instances=rows)
    assert [f.id for f in findings] == [finding, "KVF107"]
    assert who in findings[0].seen
    assert trouble in findings[1].seen
    assert (f"{who} itself" in findings[1].seen) == (who == "decode-0")


@pytest.mark.parametrize(
    ("prefill", "views"),
    [
        ({"waiting": 3}, [TARGET]),
        ({"running": 1}, [TARGET, SOURCE]),
        ({}, [{**TARGET, "stage": "reserving"}]),
        ({}, [{**TARGET, "stage": "pulling", "moved": True}, {**SOURCE, "stage": "sealed"}]),
    ],
)
def test_handoffs_that_wait_for_somebody_who_works_are_news_only_when_they_are_late(prefill: Any, views: Any) -> None:
    def at(age_s: float) -> list[Finding]:
        aged = [{**v, "age_s": age_s, "remaining_s": 30.0 - age_s} for v in views]
        return said(instances=[{**PREFILL, **prefill}, DECODE], handoffs=aged)

    assert at(6.0) == []
    assert len(at(10.5)) == 1


def test_handoffs_that_wait_for_one_reason_are_told_of_together_the_oldest_first() -> None:
    views = [{**TARGET, "handoff": f"{i:032x}", "stage": "reserving", "age_s": 11.0 + i} for i in range(9)]
    full = {**DECODE, "free_blocks": 11, "running": 1, "waiting": 9}
    (finding,) = said(instances=[PREFILL, full], handoffs=views, requests=[])
    assert finding.id == "KVF109"
    assert finding.seen.startswith(f"handoff {8:032x}: decode-0 is reserving since 19.0 s for prefill-0")
    assert "8 more wait like this (000000000000" in finding.seen
    assert "11 of 64 blocks are free at decode-0, with 1 running and 9 waiting requests" in finding.seen


def test_a_peer_that_left_the_table_is_gone() -> None:
    findings = said(instances=[DECODE])
    assert [f.id for f in findings] == ["KVF108", "KVF105"]
    assert "prefill-0 no longer reports itself" in findings[0].seen
    assert "prefill-0 was one" in findings[1].seen


def test_a_request_whose_decode_instance_is_gone_is_told_though_nobody_reports_its_handoff() -> None:
    request = {**REQUEST, "stage": "decode", "decode": "decode-0"}
    findings = said(instances=[PREFILL], handoffs=[], requests=[request])
    assert [f.id for f in findings] == ["KVF108", "KVF105"]
    assert "in stage decode, 8.0 s old at the router, prefill-0 to decode-0" in findings[0].seen
    delivered = said(instances=[DECODE, {**PREFILL, "instance_id": "prefill-1"}], handoffs=[], requests=[request])
    assert delivered == [], "prefill-0 may go once decode has the KV"


def test_young_handoffs_and_the_doctors_own_requests_are_no_news() -> None:
    assert said(handoffs=[{**TARGET, "age_s": 0.4}]) == []
    own = {"request": "r", "state": "failed", "cause": "http_422", "model": "kvferry-doctor-1f", "status": 500}
    assert said(handoffs=[], recent=[own]) == []


def ended(state: str, cause: str, **more: Any) -> dict[str, Any]:
    pair = {"prefill": "prefill-0", "decode": "decode-0"}
    return {"request": "r-9", "handoff": HANDOFF, "state": state, "stage": "waiting", "cause": cause, **pair, **more}


def test_handoffs_that_did_not_deliver_are_grouped_and_explained() -> None:
    recent = [ended("delivered", "")] * 5 + [ended("recomputed", "peer_gone", handoff_s=0.4)] * 2
    (finding,) = said(handoffs=[], recent=recent)
    assert (finding.id, finding.severity) == ("KVF115", "warning")
    for part in ("2 of the last 7", "peer_gone", "r-9", HANDOFF, "0.4 s", "the connection to prefill-0 broke"):
        assert part in finding.seen
    assert "start prefill-0 again" in finding.fix


def test_a_request_without_a_handoff_or_an_instance_is_told_without_gaps() -> None:
    direct = ended("recomputed", "no_prefill_instance", stage="queue", prefill=None, handoff=None)
    nobody = ended(
        "failed", "no_instance_available", stage="queue", prefill=None, decode=None, handoff=None, status=503
    )
    odd = ended("recomputed", "", stage=None)
    findings = said(handoffs=[], recent=[direct, nobody, odd])
    assert [f.id for f in findings] == ["KVF110", "KVF115", "KVF115"]
    text = " ".join(f.seen + f.fix for f in findings)
    assert not re.search(r"\bNone\b|\?|\(\)", text), text
    assert "(decode-0 alone), the last one, request r-9, after" in text and "(no instance)" in text
    lost = {**REQUEST, "handoff": None, "prefill": None, "decode": "decode-7", "stage": "decode"}
    gone = said(handoffs=[], requests=[lost])
    assert gone[0].seen.startswith("request r-1: in stage decode") and "decode-7 alone" in gone[0].seen


def test_that_nobody_is_there_comes_before_the_requests_that_failed_for_it() -> None:
    nobody = ended(
        "failed", "no_instance_available", stage="queue", prefill=None, decode=None, handoff=None, status=503
    )
    assert [f.id for f in said(instances=[PREFILL], handoffs=[], requests=[], recent=[nobody])] == ["KVF105", "KVF110"]


def test_the_stage_tells_whose_fault_a_deadline_is() -> None:
    late = ended("recomputed", "deadline_exceeded")
    (waiting,) = said(handoffs=[], recent=[late])
    assert "prefill-0 queues or computes for longer" in waiting.seen
    (reserving,) = said(handoffs=[], recent=[{**late, "stage": "reserving"}])
    assert "decode-0 had no room for it" in reserving.seen
    assert "more KV blocks on decode-0" in reserving.fix


@pytest.mark.parametrize("reason", ["expired", "revoked", "failed", "cancelled", "refused", "unknown"])
def test_whatever_the_source_answers_has_a_meaning_and_a_remedy(reason: str) -> None:
    (finding,) = said(handoffs=[], recent=[ended("recomputed", f"source_{reason}")])
    assert "; prefill-0 " in finding.seen or "at prefill-0" in finding.seen
    assert finding.fix


def test_most_of_them_recomputed_is_one_finding_of_its_own_and_failures_are_errors() -> None:
    (mostly,) = said(handoffs=[], recent=[ended("recomputed", "source_silent")] * 5)
    assert mostly.id == "KVF111"
    assert "5 x waiting/source_silent (prefill-0 to decode-0)" in mostly.seen
    (failed,) = said(handoffs=[], recent=[ended("failed", "transfer_timeout", status=502)])
    assert (failed.id, failed.severity) == ("KVF110", "error")
    assert said(handoffs=[], recent=[ended("failed", "http_404", status=404)]) == []
