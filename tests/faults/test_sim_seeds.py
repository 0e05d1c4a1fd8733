"""Seeds under faults: the protocol's invariants hold, and whatever breaks can be replayed from its seed."""

from __future__ import annotations

import json

import pytest

from kvferry.cli import main
from kvferry.sim.faults import run_seed, run_seeds

CI_SEEDS = range(1000)


def test_a_thousand_seeds_break_nothing_and_do_not_pass_by_doing_nothing() -> None:
    report = run_seeds(CI_SEEDS)
    assert report.violations == (), f"replay: kvferry sim faults --replay {report.violations[0].seed}"
    assert report.runs == 1000
    # Every end and every fault really happens (I10).
    seen = ("delivered", "recomputed", "aborted", "failed", "dropped", "duplicated", "late", "corrupted", "crashes")
    seen += ("stops", "partitions", "preemptions", "hangs", "late_answers", "released_acked", "released_expired")
    seen += ("released_cancelled", "released_revoked", "released_preempted", "released_failed")
    assert [name for name in seen if not report.counts.get(name)] == []
    assert report.counts["pulled"] > 1000


def test_a_failing_seed_replays_with_its_story(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sim", "faults", "--rules-off", "R8", "--json"]
    assert main([*arguments, "--seeds", "0:50", "--jobs", "1"]) == 1
    found = json.loads(capsys.readouterr().out)["violations"][0]
    assert main([*arguments, "--replay", str(found["seed"])]) == 1
    replayed = json.loads(capsys.readouterr().out)
    assert replayed["violation"] == found
    assert any("ReleaseBlocks" in line for line in replayed["story"])
    assert main(["sim", "faults", "--replay", str(found["seed"])]) == 0
    assert "no violation" in capsys.readouterr().out


def test_the_json_report_has_what_a_script_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sim", "faults", "--seeds", "0:300", "--json", "--jobs", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["runs"] == 300 and report["violations"] == []
    assert 0 < report["worst_terminal_s"] < 20 and report["worst_overrun_s"] <= 1.2
    assert report["steps"] == run_seeds(range(300)).steps  # however many processes share the seeds


def test_digests_catch_corrupted_bytes() -> None:
    corrupted = [r for r in map(run_seed, range(600)) if r.counts.get("corrupted")]
    assert len(corrupted) > 5
    assert all(r.violation is None and r.plan.digests for r in corrupted)
