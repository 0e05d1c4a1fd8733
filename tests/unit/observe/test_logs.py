"""Log lines: one line whatever is in it, fields that can be read back, ids that bind."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvferry.config import LogSettings
from kvferry.observe import configure_logs, get_log


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    root, kvferry = logging.getLogger(), logging.getLogger("kvferry")
    levels, handlers = (root.level, kvferry.level), list(root.handlers)
    yield
    root.setLevel(levels[0])
    kvferry.setLevel(levels[1])
    root.handlers[:] = handlers


@pytest.fixture
def lines() -> Callable[..., io.StringIO]:
    def begin(**kinds: Any) -> io.StringIO:
        stream = io.StringIO()
        configure_logs(LogSettings(**kinds), process="decode-0", stream=stream)
        return stream

    return begin


def test_text_line(lines: Callable[..., io.StringIO]):
    out = lines()
    get_log("kvferry.x").info("handoff ended", handoff="4f0e", state="delivered", bytes=8192, ok=True, took_s=0.25)
    line = out.getvalue()
    assert line.endswith(
        "INFO    decode-0  handoff ended  handoff=4f0e state=delivered bytes=8192 ok=true took_s=0.25\n"
    )


def test_text_values_with_spaces_are_quoted(lines: Callable[..., io.StringIO]):
    out = lines()
    get_log("kvferry.x").warning("refused", detail='said "no"\nand left', empty="")
    assert out.getvalue().endswith('refused  detail="said \\"no\\"\\nand left" empty=""\n')
    assert out.getvalue().count("\n") == 1


def test_json_line(lines: Callable[..., io.StringIO]):
    out = lines(format="json")
    log = get_log("kvferry.x").bind(request="r1")
    log.bind(handoff="h1").error("handoff ended", cause="peer_gone", level="mine", path=object)
    got = json.loads(out.getvalue())
    assert got["ts"].endswith("Z") and got["level"] == "error" and got["process"] == "decode-0"
    assert (got["log"], got["event"], got["request"], got["handoff"]) == ("kvferry.x", "handoff ended", "r1", "h1")
    assert got["cause"] == "peer_gone" and got["field_level"] == "mine"


def test_a_mapping_is_told_by_its_members(lines: Callable[..., io.StringIO]):
    out = lines()
    get_log("kvferry.x").info("request ended", stages={"queue": 0.25, "decode": 2.0}, status=200)
    assert out.getvalue().endswith("request ended  stages.queue=0.25 stages.decode=2 status=200\n")


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_fact_that_is_not_there_is_not_written(lines: Callable[..., io.StringIO], form: str):
    out = lines(format=form)
    get_log("kvferry.x").info("handoff ended", state="delivered", cause=None, detail=None, bytes=0)
    assert "bytes" in out.getvalue()
    assert not any(word in out.getvalue() for word in ("cause", "detail", "none", "null"))


def test_levels(lines: Callable[..., io.StringIO]):
    out = lines(level="warning")
    get_log("kvferry.x").info("quiet")
    get_log("kvferry.x").warning("loud")
    logging.getLogger("other").info("foreign quiet")
    logging.getLogger("other").error("foreign %s", "loud")
    assert [line.split("decode-0  ")[1] for line in out.getvalue().splitlines()] == ["loud", "foreign loud"]


def test_configure_again_writes_each_line_once(lines: Callable[..., io.StringIO]):
    first, second = lines(), lines()
    get_log("kvferry.x").info("hello")
    assert first.getvalue() == "" and second.getvalue().count("hello") == 1


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_traceback_stays_on_the_line(lines: Callable[..., io.StringIO], form: str):
    out = lines(format=form)
    try:
        raise RuntimeError("no room\nat all")
    except RuntimeError:
        get_log("kvferry.x").exception("step failed")
    assert out.getvalue().count("\n") == 1
    assert "RuntimeError: no room" in out.getvalue() and "test_logs.py" in out.getvalue()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(event=st.text(max_size=20), value=st.text(max_size=20), form=st.sampled_from(["text", "json"]))
def test_any_text_gives_one_line(lines: Callable[..., io.StringIO], event: str, value: str, form: str):
    out = lines(format=form)
    get_log("kvferry.x").info(event, value=value)
    assert out.getvalue().count("\n") == 1
    if form == "text":
        assert out.getvalue().removesuffix("\n").isprintable()
    if form == "json":
        got = json.loads(out.getvalue())
        assert (got["event"], got["value"]) == (event, value)
