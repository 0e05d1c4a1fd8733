from __future__ import annotations

from kvferry.transfer.bench.turns import turns


def test_each_round_runs_every_system_and_begins_with_another_one() -> None:
    assert list(turns(["a", "b", "c"], 3, (), lambda _: None)) == [*"abc", *"bca", *"cab"]


def test_who_is_skipped_in_one_round_has_no_turn_in_the_next() -> None:
    skipped: dict[str, str] = {}
    taken = []
    for name in turns(["a", "b"], 3, skipped, lambda _: None):
        taken.append(name)
        skipped["a"] = "it is not installed"
    assert taken == ["a", "b", "b", "b"]
