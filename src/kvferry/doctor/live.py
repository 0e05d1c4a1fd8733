"""Asking a running router who is there and how requests go. Synchronous HTTP, every wait bounded."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from typing import Any

import msgspec

from kvferry.doctor.facts import Facts

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
        first = _instances(url)
        state = _state(url, first)
        if any(m.get("running") or m.get("waiting") for m in first) or state["handoffs"]:
            time.sleep(second_look_s)
            second = _instances(url)
            state = _state(url, [_compared(m, first, second_look_s) for m in second])
    except _NotKVFerry as e:
        return msgspec.structs.replace(facts, router_error=str(e), router_is_foreign=e.answers)
    return msgspec.structs.replace(facts, router=state)


class _NotKVFerry(Exception):
    """The router does not answer as kvferry's. `answers` if something else does, perhaps a proxy of another kind."""

    def __init__(self, message: str, *, answers: bool) -> None:
        super().__init__(message)
        self.answers = answers


def _state(url: str, instances: list[dict[str, Any]]) -> dict[str, Any]:
    seen = _get(url + HANDOFFS_PATH)
    return {
        "instances": instances,
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


def _get(url: str) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(url, timeout=ASK_S) as answer:
            decoded = msgspec.json.decode(answer.read())
    except urllib.error.HTTPError as e:
        raise _NotKVFerry(f"{url} answered {e.code}; kvferry's router answers 200 there", answers=True) from e
    except (OSError, ValueError) as e:
        reason = getattr(e, "reason", e)
        raise _NotKVFerry(f"{url} does not answer ({reason})", answers=False) from e
    except msgspec.DecodeError as e:
        raise _NotKVFerry(f"{url} answered something that is not JSON; kvferry's router does", answers=True) from e
    if not isinstance(decoded, dict):
        raise _NotKVFerry(f"{url} answered JSON of another form; kvferry's router gives an object", answers=True)
    return decoded
