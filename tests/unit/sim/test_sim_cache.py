"""Trace replay: hit ratios by hand, and the command."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from kvferry.cli import main
from kvferry.errors import ConfigError
from kvferry.request_trace import TracedRequest, read_request_trace
from kvferry.sim.cache import belady, parse_capacities, replay, unbounded


def test_only_the_prefix_hits_and_the_last_block_counts_its_tokens() -> None:
    requests = [TracedRequest(1024, (1, 2)), TracedRequest(700, (1, 2)), TracedRequest(1024, (3, 2))]
    result = unbounded(requests)
    assert result.hit_tokens == 700
    assert result.input_tokens == 2748
    assert replay(requests, "lru", 10 * 512).hit_tokens == 700


def test_lru_loses_what_a_full_cache_must_and_belady_does_not() -> None:
    requests = [TracedRequest(512, (key,)) for key in (1, 2, 3, 1, 2, 3)]
    lru, bound = replay(requests, "lru", 2 * 512), belady(requests, 2 * 512)
    assert (lru.hit_tokens, lru.evictions) == (0, 4)
    assert bound.hit_tokens == 2 * 512


def write_trace(path: Path) -> Path:
    lines = (msgspec.json.encode({"timestamp": 0, "input_length": 512, "hash_ids": [k % 5]}) for k in range(20))
    path.write_bytes(b"\n".join(lines))
    return path


def test_the_command_prints_one_object_a_line_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    trace, image = write_trace(tmp_path / "trace.jsonl"), tmp_path / "plot.svg"
    arguments = ["sim", "cache", "--trace", str(trace), "--capacity", "1k,4k", "--policy", "lru,prefix", "--json"]
    assert main([*arguments, "--jobs", "1", "--plot", str(image)]) == 0
    found = [msgspec.json.decode(line) for line in capsys.readouterr().out.splitlines()]
    ratios = {(r["policy"], r["capacity_tokens"]): r["hit_ratio"] for r in found}
    assert ratios[("lru", 1000)] == 0.0
    assert ratios[("lru", 4000)] == ratios[("unbounded", None)] == 0.75
    assert len(ratios) == 7
    assert image.read_bytes().startswith(b"<?xml")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--capacity", "3M,x"], "'x' is no number of tokens"),
        (["--policy", "lru,fifo9"], "'fifo9' is unknown"),
        (["--capacity", "100"], "holds no block of 512"),
        (["--trace", "/nowhere"], "cannot be read"),
    ],
)
def test_wrong_command_lines_say_what_is_wrong(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = write_trace(tmp_path / "trace.jsonl")
    assert main(["sim", "cache", "--trace", str(trace), "--jobs", "1", *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_line_that_is_no_request_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"input_length": 5}\n')
    with pytest.raises(ConfigError, match="is no request of a trace"):
        read_request_trace(path)
    assert parse_capacities("3M,512,3M") == (512, 3_000_000)
