"""The simulator itself: it is deterministic, its faults happen, its processes stop and crash as they should."""

from __future__ import annotations

import random

import msgspec
import pytest

from kvferry.errors import ConfigError
from kvferry.sim.command import describe, parse_seeds
from kvferry.sim.faults import Report, run_seed, run_seeds
from kvferry.sim.network import Memory, Network
from kvferry.sim.rules import Rules
from kvferry.sim.world import Broken, Process, World, draw_plan


def world(seed: int = 1, **plan: object) -> World:
    rng = random.Random(seed)
    return World(seed, msgspec.structs.replace(draw_plan(rng), **plan), rng, trace=True)


def test_a_seed_always_tells_the_same_story() -> None:
    stories = [run_seed(7, trace=True).story for _ in range(2)]
    assert stories[0] == stories[1] and len(stories[0]) > 20
    assert run_seed(8, trace=True).story != stories[0]


def test_tracing_changes_nothing() -> None:
    traced = msgspec.structs.replace(run_seed(7, trace=True), story=())
    assert run_seed(7) == traced


def test_what_a_stopped_process_would_have_done_waits_and_is_read_before_its_own_turn() -> None:
    here = world()
    process = Process(here, "p")
    seen: list[tuple[str, float]] = []
    process.post(1.0, lambda: seen.append(("while stopped", here.now_s)))
    process.post(3.0, lambda: seen.append(("after", here.now_s)))
    here.at(0.5, process.stop)
    here.at(2.0, process.resume)
    here.run()
    assert seen == [("while stopped", 2.0), ("after", 3.0)]
    assert process.stopped_total_s == 1.5


def test_a_crash_forgets_what_was_to_be_done_and_the_next_life_is_another() -> None:
    here = world()
    process = Process(here, "p")
    before, seen = process.incarnation, []
    process.post(1.0, seen.append, 1)
    here.at(0.5, process.crash)
    here.at(0.6, process.start)
    here.run()
    assert seen == [] and process.incarnation != before
    assert list(here.processes.values()) == [process]


def test_a_cut_edge_carries_nothing_before_it_heals() -> None:
    here = world(drop=0.0, duplicate=0.0, late=0.0)
    network = Network(here)
    a, b = Process(here, "a"), Process(here, "b")
    network.cut(a, b, 2.0)
    arrived: list[float] = []
    for _ in range(50):
        network.send(a, b, lambda: arrived.append(here.now_s))
    here.run()
    assert 5 < len(arrived) < 45 and min(arrived) >= 2.0


def test_the_network_drops_doubles_and_delays() -> None:
    here = world(drop=0.2, duplicate=0.5, late=0.5, late_s=2.0)
    network = Network(here)
    a, b = Process(here, "a"), Process(here, "b")
    order: list[int] = []
    for n in range(200):
        network.send(a, b, order.append, n)
    here.run()
    assert len(set(order)) < 200 < len(order) + 50 and len(order) > len(set(order))
    assert order != sorted(order)
    assert here.counts["dropped"] == 200 - len(set(order))


def test_memory_notices_each_misuse() -> None:
    memory = Memory("m", 4, 2, 1)
    blocks = memory.take(2, "me")
    memory.write(blocks[0], 0, "tag", "me")
    memory.check()
    with pytest.raises(Broken, match="I3"):
        memory.write(blocks[0], 0, "tag", "you")
    with pytest.raises(Broken, match="I3"):
        memory.pass_on(blocks, "you", "them")
    with pytest.raises(Broken, match="I1"):
        memory.give(blocks, "you")
    memory.give(blocks, "me")
    with pytest.raises(Broken, match="I1"):
        memory.give(blocks, "me")
    memory.free.pop()
    with pytest.raises(Broken, match="I1"):
        memory.check()


def test_a_crash_takes_the_words_with_the_bytes() -> None:
    memory = Memory("m", 2, 1, 1)
    memory.write(memory.take(1, "me")[0], 0, "tag", "me")
    memory.words[0] = 7
    memory.freed_by_crash(words_survive=False)
    assert memory.words == [0] and memory.cells == [["freed"], ["freed"]] and len(memory.free) == 2


def test_an_exception_in_the_protocol_is_a_violation_with_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr("kvferry.protocol.source.SourceHandoffs._on_sealed", fail)
    violation = run_seeds(range(3)).violations[0]
    assert violation.invariant == "bug" and "KeyError" in violation.what


def test_a_batch_without_deliveries_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvferry.protocol.target.TargetHandoffs._advance", lambda *_: [])
    assert "I10" in {v.invariant for v in run_seeds(range(100)).violations}


def test_the_rules_that_exist() -> None:
    with pytest.raises(ConfigError, match="R99 is no rule; the rules are R1, R2"):
        Rules(["R1", "R99"])


def test_seeds_are_read_as_a_range() -> None:
    assert parse_seeds("3:7") == range(3, 7) and parse_seeds("5") == range(5, 6)


@pytest.mark.parametrize("text", ["", "x", "7:3", "3:x", "1:2:3"])
def test_seeds_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="write A:B"):
        parse_seeds(text)


def test_the_report_for_a_person_says_how_to_replay() -> None:
    report = run_seeds(range(40), ["R8"])
    text = describe(report)
    assert f"{len(report.violations)} violations" in text and report.violations
    assert f"kvferry sim faults --replay {report.violations[0].seed} --rules-off R8" in text


def test_the_report_survives_json() -> None:
    report = run_seeds(range(3))
    again = msgspec.json.decode(msgspec.json.encode(report), type=Report)
    assert (again.runs, again.violations, again.steps) == (3, (), report.steps)
