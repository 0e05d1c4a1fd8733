"""`kvferry bench pool` on a few blocks: every system that is installed moves them right, and the rest is named."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from kvferry.cli import main
from kvferry.pool.bench.cases import CASES, Result, Scale
from kvferry.pool.bench.ours import Kvferry, KvferryRedis, KvferryTcp
from kvferry.pool.bench.peers import Fio, Mooncake, Redis
from kvferry.pool.bench.runner import figures
from kvferry.pool.bench.stores import Memcpy, Store, StoreSystem, System, memories

MIB = 1 << 20


def scale(directory: Path) -> Scale:
    return Scale(memory_bytes=16 * MIB, disk_bytes=16 * MIB, restart_blocks=50, repeats=1, disk_path=str(directory))


@pytest.mark.parametrize("system", [Memcpy, Kvferry, KvferryTcp, KvferryRedis, Redis, Mooncake, Fio])
def test_each_system_gives_a_right_result_for_each_of_its_cases(system: type[System], tmp_path: Path) -> None:
    why_not = system.why_not()
    if why_not is not None:
        pytest.skip(why_not)
    # Of the shapes of blocks one is enough, but for the first system.
    left_out = ("single",) if system is Kvferry else ("single", "64k")
    asked = [case for case in CASES.values() if case.kind in system.kinds and not case.name.endswith(left_out)]
    results = list(system().measure(asked, scale(tmp_path)))
    assert sorted(result.case for result in results) == sorted(case.name for case in asked)
    for result in results:
        assert result.seconds and min(result.seconds) > 0
        # What goes to the disk is looked at when it comes back.
        unseen = system is Fio or result.case == "disk-write"
        assert result.verified is (None if unseen else True), result
    assert not list(tmp_path.iterdir())


class _Forgetful(Store):
    """Gives back what lay at the target anyway."""

    def __init__(self, nbytes: int) -> None:
        self.source, self.target = memories(nbytes)

    def put(self, keys: list[bytes], sources: list[int], nbytes: int, batch: int) -> None:
        pass

    def get(self, keys: list[bytes], targets: list[int], nbytes: int, batch: int) -> None:
        self.target[:] = self.source

    def lookup(self, keys: list[bytes]) -> Callable[[], Sequence[object]]:
        return lambda: [True] * len(keys)


class _ForgetfulSystem(StoreSystem):
    name = "forgetful"

    def open(self, memory_bytes: int, block_bytes: int) -> contextlib.AbstractContextManager[Store]:
        return contextlib.nullcontext(_Forgetful(memory_bytes))


def test_blocks_at_the_wrong_place_and_wrong_answers_are_found_out(tmp_path: Path) -> None:
    results = list(_ForgetfulSystem().measure([CASES["get-1m"], CASES["exists"]], scale(tmp_path)))
    assert [result.verified for result in results] == [False, False]


def row(case: str, **seconds: list[float]) -> dict[str, object]:
    seen = {
        (name, case): [Result(case, [value], 10**9, True)._asdict() for value in values]
        for name, values in seconds.items()
    }
    return figures("kvferry", case, seen)


def test_a_ratio_is_the_median_over_rounds_and_decides_whether_the_goal_is_reached() -> None:
    assert CASES["get-1m"].goals["kvferry"].ratio == 0.8
    seen = row("get-1m", kvferry=[1.0, 2.0, 4.0], memcpy=[0.7, 1.7, 3.4])
    assert (seen["ratio"], seen["reached"], seen["GBps"], seen["verified"]) == (0.85, True, 0.5, True)
    assert row("get-1m", kvferry=[1.0, 2.0, 4.0], memcpy=[0.7, 1.5, 3.2])["reached"] is False
    assert row("get-1m", kvferry=[1.0])["reached"] is None
    assert row("exists", kvferry=[0.0004])["reached"] is True
    assert row("exists", kvferry=[0.0006])["reached"] is False


@pytest.mark.leaks_allowed  # matplotlib keeps the files of its fonts open.
def test_the_command_writes_one_object_a_line_and_a_plot(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "pool.png"
    flags = ["--systems", "kvferry", "--cases", "get-1m", "--rounds", "1", "--mib", "16", "--json"]
    assert main(["bench", "pool", *flags, "--plot", str(plot), "--disk", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [(r["system"], r["case"], r["verified"]) for r in rows] == [
        ("memcpy", "get-1m", True),
        ("kvferry", "get-1m", True),
    ]
    assert rows[1]["ratio"] == pytest.approx(rows[1]["GBps"] / rows[0]["GBps"], rel=0.05)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_an_unknown_name_is_told_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "pool", "--systems", "memcached"]) == 2
    told = capsys.readouterr().err
    assert "memcached" in told and "mooncake" in told and "get-1m" in told
    assert main(["bench", "pool", "--systems", "fio", "--cases", "exists"]) == 2
    assert "none of fio does exists" in capsys.readouterr().err


def test_a_peer_that_is_not_installed_is_named_and_skipped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    flags = ["--systems", "fio", "--cases", "disk-read", "--rounds", "1", "--json", "--disk", str(tmp_path)]
    assert main(["bench", "pool", *flags]) == 0
    (only,) = map(json.loads, capfd.readouterr().out.splitlines())
    assert (only["system"], only["verified"]) == ("fio", None)
    assert "not installed" in only["skipped"]
