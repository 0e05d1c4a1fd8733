"""Asking a running router who is there and how requests go. Synchronous HTTP, every wait bounded."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import msgspec

from kvferry.addresses import is_loopback
from kvferry.doctor.asking import get
from kvferry.doctor.facts import ClockReading, Facts
from kvferry.doctor.reach import Answers, ask_health

INSTANCES_PATH = "/kvferry/v1/instances"
HANDOFFS_PATH = "/debug/handoffs"
ASK_S = 3.0
SECOND_LOOK_S = 2.5
"""More than two heartbeats, so that a step counter that stands between two looks stands in truth."""


def look_at_router(facts: Facts, url: str, second_look_s: float = SECOND_LOOK_S) -> Facts:
    """Add what the router says. A second look, some heartbeats later, tells which serving loops move."""
    url = url.rstrip("/") if "://" in url else f"http://{url.rstrip('/')}"
    facts = msgspec.structs.replace(facts, router_url=url)
    try:
        rows = first = _instances(url)
        state = _state(url)
        if any(m.get("running") or m.get("waiting") for m in first) or state["handoffs"] or state["requests"]:
            time.sleep(second_look_s)
            rows = [_compared(m, first, second_look_s) for m in _instances(url)]
            before, state = state["handoffs"], _state(url)
            state["handoffs"] = [{**h, "moved": _moved(h, before)} for h in state["handoffs"]]
    except _NotKVFerry as e:
        return msgspec.structs.replace(facts, router_error=str(e), router_is_foreign=e.answers)
    # Who answers is asked last: an instance that ended in between is in the first table and not in the second.
    answers, clocks = _who_answers(url, rows)
    state["instances"] = [{**m, "answers": a} for m, a in zip(rows, answers, strict=True)]
    return msgspec.structs.replace(facts, router=state, clocks=(*facts.clocks, *clocks))


def _who_answers(url: str, rows: list[dict[str, Any]]) -> tuple[list[Answers], list[ClockReading]]:
    """Ask the HTTP server of each instance, side by side; a loopback address only where the router's is one, too."""
    at_home = is_loopback(_host(url))

    def ask(row: dict[str, Any]) -> tuple[Answers, ClockReading | None]:
        theirs = str(row.get("url"))
        if is_loopback(_host(theirs)) and not at_home:
            return "unknown", None
        return ask_health(str(row.get("instance_id")), theirs)

    with ThreadPoolExecutor(max_workers=16) as threads:
        asked = list(threads.map(ask, rows))
    return [a for a, _ in asked], [clock for _, clock in asked if clock is not None]


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


class _NotKVFerry(Exception):
    """The router does not answer as kvferry's. `answers` if something else does, perhaps a proxy of another kind."""

    def __init__(self, message: str, *, answers: bool) -> None:
        super().__init__(message)
        self.answers = answers


def _state(url: str) -> dict[str, Any]:
    seen = _get(url + HANDOFFS_PATH)
    return {
        "instances": [],
        "handoffs": seen.get("instances") or [],
        "requests": seen.get("requests") or [],
        "recent": seen.get("recent") or [],
    }


def _instances(url: str) -> list[dict[str, Any]]:
    rows = _get(url + INSTANCES_PATH).get("instances")
    return [r for r in rows if isinstance(r, dict)] if isinstance(rows, list) else []


def _compared(now: dict[str, Any], first: list[dict[str, Any]], between_s: float) -> dict[str, Any]:
    """A row with `standstill_s`: how long its step has not moved, as far as two looks tell."""
    before = next((m for m in first if m.get("instance_id") == now.get("instance_id")), None)
    same_life = before is not None and before.get("incarnation") == now.get("incarnation")
    stands = same_life and before is not None and before.get("step") == now.get("step") and not now.get("polled")
    return {**now, "standstill_s": between_s if stands or now.get("stuck") else 0.0}


def _moved(view: dict[str, Any], before: list[dict[str, Any]]) -> bool:
    """Whether a handoff got further between two looks."""
    same = ("handoff", "instance", "side")
    earlier = next((h for h in before if all(h.get(k) == view.get(k) for k in same)), None)
    return earlier is not None and any(earlier.get(k) != view.get(k) for k in ("stage", "detail"))


def _get(url: str) -> dict[str, Any]:
    try:
        answer = get(url, ASK_S)
    except (OSError, ValueError) as e:
        raise _NotKVFerry(f"{url} does not answer ({e})", answers=isinstance(e, ValueError)) from e
    if answer.status != 200:
        raise _NotKVFerry(f"{url} answered {answer.status}; kvferry's router answers 200 there", answers=True)
    try:
        decoded = msgspec.json.decode(answer.body)
    except (msgspec.DecodeError, RecursionError) as e:
        raise _NotKVFerry(f"{url} answered something that is not JSON; kvferry's router does", answers=True) from e
    if not isinstance(decoded, dict):
        raise _NotKVFerry(f"{url} answered JSON of another form; kvferry's router gives an object", answers=True)
    return decoded
