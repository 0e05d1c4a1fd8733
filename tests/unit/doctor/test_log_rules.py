"""Each log rule matches its own sample, no other cause matches it, and the story finds the first cause."""

from __future__ import annotations

import re

import pytest

from kvferry.doctor.findings import catalogue
from kvferry.doctor.log_lines import parse_time, request_of
from kvferry.doctor.log_rules import Rule, candidates, literals_of, rules
from kvferry.doctor.logs import parse_lines, tell

ALL = [rule for rule, _ in rules()]


@pytest.mark.parametrize("rule", ALL, ids=[r.id for r in ALL])
def test_the_sample_of_a_rule_tells_its_finding_and_no_other(rule: Rule) -> None:
    told = {f.finding for f in tell(parse_lines([rule.sample], f"{rule.side or 'x'}.log", 2026)).findings}
    assert told == ({rule.finding} if rule.finding else set())
    assert re.search(rule.pattern, rule.sample)


@pytest.mark.parametrize("rule", ALL, ids=[r.id for r in ALL])
def test_the_words_that_lines_are_searched_for_first_do_not_hide_a_rules_own_line(rule: Rule) -> None:
    assert ALL.index(rule) in candidates(rule.sample)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("plain words", ("plain words",)),
        ("[Aa]ddress in use|EADDRINUSE", ("ddress in use", "EADDRINUSE")),
        (r"(a|b) engine \d+ died", (" engine ",)),
        ("compat(ibility)?_hash", ("compat",)),
        ("is still? there", ("is stil",)),
        (r"Engine \(pid", ("Engine (pid",)),
        (r"Connection refused(?! by policy)", ("Connection refused",)),
        ("(one|other) (a|b)", ()),
        ("long enough|abc", ()),
    ],
)
def test_words_of_a_pattern_are_in_all_that_it_matches(pattern: str, words: tuple[str, ...]) -> None:
    assert literals_of(pattern) == words


def test_a_rule_of_one_side_says_nothing_of_the_other() -> None:
    line = "INFO 11-22 10:00:00 [loggers.py:259] Engine 000: External prefix cache hit rate: 0.0%"
    assert [f.finding for f in tell(parse_lines([line], "decode.log", 2026)).findings] == ["KVF210"]
    assert tell(parse_lines([line], "prefill.log", 2026)).findings == ()
    store = "INFO 11-22 09:59:00 [factory.py:64] Creating v1 connector with name: LMCacheConnectorV1 and engine_id: 1"
    assert tell(parse_lines([store, line], "decode.log", 2026)).findings == (), "a store may well have nothing yet"


def test_every_rule_has_a_finding_or_a_stage_and_ids_are_unique() -> None:
    assert len({r.id for r in ALL}) == len(ALL)
    for rule in ALL:
        assert bool(rule.finding) != bool(rule.stage), rule.id
        assert not rule.finding or rule.finding in catalogue(), rule.id


@pytest.mark.parametrize(
    ("line", "seconds"),
    [
        ("(EngineCore_0 pid=12) ERROR 10-16 17:22:56 [nixl_connector.py:815] x", 56.0),
        ("INFO 10-16 17:22:56 [engine.py:310] Added request", 56.0),
        ("E1016 17:22:56.139716 281933 transfer_metadata_plugin.cpp:290] x", 56.139716),
        ("I20261016 17:22:56.417019 281473495854048 client_metric.cpp:76] x", 56.417019),
        ("2026-10-16 17:22:56.566927 ERROR    [975] [coro_rpc_client.hpp:978] x", 56.566927),
        ("[2026-10-16 17:22:56,627] LMCache INFO: x", 56.627),
        ("2026-10-16T17:22:56.120Z WARNING router  instance gone  instance=p", 56.12),
    ],
)
def test_times_of_each_kind_of_log_are_read(line: str, seconds: float) -> None:
    at = parse_time(line, 2026)
    assert at is not None
    assert at % 60 == pytest.approx(seconds, abs=1e-3)


def test_a_traceback_has_the_time_of_the_line_before_it() -> None:
    lines = parse_lines(["ERROR 10-16 17:22:56 [core.py:1] boom", "Traceback (most recent call last):"], "d.log", 2026)
    assert lines[0].at == lines[1].at is not None


@pytest.mark.parametrize(
    ("line", "request_id"),
    [
        ("Added request cmpl-035fe306-0.", "cmpl-035fe306"),
        ("Releasing expired KV blocks for request chatcmpl-77aa which were", "chatcmpl-77aa"),
        ("request ended  request=r-17 state=delivered", "r-17"),
        ("request ended  request=r-17 state=delivered handoff=4f0e11aa", "4f0e11aa"),
        ("handoff 5e5591bd7f214e35b23adf0cbd620f19 refused at the source: closed", "5e5591bd7f214e35b23adf0cbd620f19"),
        ("nothing here", None),
    ],
)
def test_the_request_of_a_line(line: str, request_id: str | None) -> None:
    assert request_of(line) == request_id


def test_logs_are_merged_by_time_and_the_cause_comes_before_its_consequences() -> None:
    prefill = [
        "INFO 11-22 10:00:00 [engine.py:310] Added request cmpl-aa-0.",
        "WARNING 11-22 10:02:00 [nixl_connector.py:1048] Releasing expired KV blocks for request cmpl-aa-0 which were",
    ]
    decode = [
        "INFO 11-22 10:00:01 [engine.py:310] Added request cmpl-aa-0.",
        "ERROR 11-22 10:00:02 [nixl_connector.py:827] Handshake failed for request cmpl-aa-0",
        "E1122 09:59:58.139716 28 x.cpp:290] EtcdStoragePlugin: unable to set k: connections to all backends failing",
    ]
    story = tell([*parse_lines(prefill, "prefill.log", 2026), *parse_lines(decode, "decode.log", 2026)])
    assert [f.finding for f in story.findings] == ["KVF204", "KVF200", "KVF202"]
    assert story.requests[0].name == "cmpl-aa"
    assert story.requests[0].stage == "queued"
    assert "metadata server cannot be reached" in story.paragraph
    assert "cmpl-aa was last well at 10:00:01" in story.paragraph


@pytest.mark.parametrize(
    ("line", "why", "fix"),
    [
        (
            "2026-11-22T22:16:03.120Z WARNING router  request ended  request=r-3 state=recomputed stage=waiting "
            "cause=source_revoked prefill=prefill-1 decode=decode-2",
            "prefill-1 needed the room and took the blocks back before decode-2 had read them.",
            "more KV blocks on prefill-1",
        ),
        (
            '{"ts":"2026-11-22T22:16:03.120Z","event":"request ended","state":"failed","status":502,'
            '"stage":"decode","cause":"peer_gone","prefill":"prefill-1","decode":"decode-2"}',
            "the router lost decode-2",
            "look at decode-2",
        ),
        (
            "(EngineCore pid=7) WARNING 11-26 05:11:02 [scheduler.py:380] handoff 5e5591bd7f214e35b23adf0cbd620f19 of "
            "request cmpl-1-0 from prefill-1: recomputed in stage reserving: deadline_exceeded: no room came free",
            "decode had no room for it",
            "more KV blocks on decode",
        ),
        (
            "2026-11-22T22:16:03.120Z WARNING decode-0  the pool cannot serve this  cause=pool_exhausted error=full",
            "more waited to be saved than may",
            "engine.pool_saving_bytes",
        ),
        ("2026-11-22T22:16:03.120Z INFO d  handoff ended  state=recomputed cause=of_later_days", "", "see what came"),
    ],
)
def test_the_cause_in_a_line_is_explained(line: str, why: str, fix: str) -> None:
    (finding,) = tell(parse_lines([line], "x.log", 2026)).findings
    assert why in finding.why and finding.why.startswith(catalogue()[finding.finding].why)
    assert finding.fix.startswith(fix) or fix in finding.fix


def test_logs_without_trouble_say_so() -> None:
    lines = parse_lines(["INFO 11-22 10:00:00 [engine.py:310] Added request cmpl-aa-0."], "p.log", 2026)
    story = tell(lines)
    assert story.findings == ()
    assert "No line tells of trouble" in story.paragraph


def test_versions_that_the_logs_begin_with_are_compared() -> None:
    p = parse_lines(["INFO 11-22 10:00:00 [api_server.py:764] vLLM API server version 0.11.0"], "prefill.log", 2026)
    d = parse_lines(
        ["INFO 11-22 10:00:00 [core.py:77] Initializing a V1 LLM engine (v0.10.2) with"], "decode.log", 2026
    )
    story = tell([*p, *d])
    assert [f.finding for f in story.findings] == ["KVF070"]
    assert story.findings[0].first == "prefill.log: vllm 0.11.0; decode.log: vllm 0.10.2"
    assert tell(p).findings == ()
