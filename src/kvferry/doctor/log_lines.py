"""Log lines of vLLM, kvferry, Mooncake, NIXL, LMCache and UCX: their times, levels and request ids. Pure."""

from __future__ import annotations

import datetime
import re

import msgspec

_PREFIX = re.compile(r"^(\([\w ]+(?:_?\w+)* ?pid=\d+\)\s*)")
_ISO = re.compile(r"(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d):(\d\d)(?:[.,](\d{1,6}))?(Z|[+-]\d\d:?\d\d)?")
_VLLM = re.compile(r"^(DEBUG|INFO|WARNING|ERROR|CRITICAL) (\d\d)-(\d\d) (\d\d):(\d\d):(\d\d)(?:\.(\d{1,6}))?\b")
_GLOG = re.compile(r"^[IWEF](?:(\d{4}))?(\d\d)(\d\d) (\d\d):(\d\d):(\d\d)\.(\d{1,6})\b")
_EPOCH = re.compile(r"^\[(\d{10})\.(\d{1,6})\] \[")
_HANDOFF = re.compile(r"\bhandoff[\"']?[=: ]\s*[\"']?([0-9a-f]{4,32})\b")
_REQUEST = re.compile(r"\b((?:chat)?cmpl-[\w.:-]*\w|request(?:_id)?[\"']?[=:]\s*[\"']?[\w.:-]*\w)")
_CAUSE = re.compile(r"\bcause[\"']?[=:] ?[\"']?(\w+)|: (?:failed|recomputed) in stage \w+: (\w+)")
_STAGE = re.compile(r"\bstage[\"']?[=:] ?[\"']?(\w+)|: (?:failed|recomputed) in stage (\w+)")
_PREFILL = re.compile(r"\bprefill[\"']?[=:] ?[\"']?([\w.-]+)|\bhandoff \w+ of request \S+ from ([\w.-]+):")
_DECODE = re.compile(r"\bdecode[\"']?[=:] ?[\"']?([A-Za-z][\w.-]*)")
_CHOICE = re.compile(r"(-\d+)(-[0-9a-f]{8})?$")


class Line(msgspec.Struct, frozen=True):
    """One line with when it was written (seconds since the epoch; None before the first stamp of its file)."""

    at: float | None
    source: str
    text: str


def parse_time(text: str, year: int) -> float | None:
    """When a line was written, or None where it says nothing. Stamps without a zone are local time.

    Args:
        year: for the formats that leave it out.
    """
    text = _PREFIX.sub("", text, count=1)
    if m := _VLLM.match(text):
        return _local(year, *(int(x) for x in m.groups()[1:6]), micro=m[7])
    if m := _GLOG.match(text):
        return _local(int(m[1] or year), *(int(x) for x in m.groups()[1:6]), micro=m[7])
    if m := _EPOCH.match(text):
        return int(m[1]) + float(f"0.{m[2]}")
    if m := _ISO.search(text[:120]):
        numbers = [int(x) for x in m.groups()[:6]]
        return _local(*numbers, micro=m[7], zone=m[8])
    return None


def _local(
    year: int, month: int, day: int, hour: int, minute: int, second: int, *, micro: str | None, zone: str | None = None
) -> float | None:
    try:
        moment = datetime.datetime(year, month, day, hour, minute, second, int((micro or "0").ljust(6, "0")))
        if zone == "Z":
            moment = moment.replace(tzinfo=datetime.UTC)
        elif zone:
            moment = datetime.datetime.fromisoformat(moment.isoformat() + zone)
        return moment.timestamp()
    except (ValueError, OverflowError):
        return None


def request_of(text: str) -> str | None:
    """The request that a line is about: vLLM's id without its choice number, or kvferry's handoff or request id.

    A handoff has one id on all sides; the request's own is known to the router alone.
    """
    if m := _HANDOFF.search(text):
        return m[1]
    m = _REQUEST.search(text)
    if m is None:
        return None
    if m[1].startswith(("cmpl", "chatcmpl")):
        return _CHOICE.sub("", m[1])
    return re.split(r"[=:]\s*[\"']?", m[1], maxsplit=1)[-1]


class Failure(msgspec.Struct, frozen=True):
    """What one of kvferry's own lines says of a failure; the names are roles where the line has no names."""

    cause: str
    stage: str
    prefill: str
    decode: str


def failure_of(text: str) -> Failure | None:
    """The failure that a line tells of, None where it names no cause."""

    def first(pattern: re.Pattern[str], otherwise: str) -> str:
        m = pattern.search(text)
        return otherwise if m is None else next(g for g in m.groups() if g)

    cause = first(_CAUSE, "")
    return Failure(cause, first(_STAGE, ""), first(_PREFILL, "prefill"), first(_DECODE, "decode")) if cause else None


def side_of(name: str, text: str) -> str:
    """Which side a log is from, by its name, else by what it says; empty where neither tells."""
    lowered = name.lower()
    for word, side in (
        ("prefill", "prefill"),
        ("producer", "prefill"),
        ("decode", "decode"),
        ("consumer", "decode"),
        ("router", "router"),
        ("proxy", "router"),
    ):
        if word in lowered:
            return side
    if "kv_producer" in text:
        return "prefill"
    return "decode" if "kv_consumer" in text else ""
