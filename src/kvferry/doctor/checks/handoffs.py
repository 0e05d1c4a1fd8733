"""Each handoff that is stuck or did not deliver: its stage, who waits for whom, since when, and the likely cause."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from kvferry.doctor.case import Case
from kvferry.doctor.causes import Cause, cause_of
from kvferry.doctor.checks.live import SILENT_S, instances_of, is_probe
from kvferry.doctor.findings import Finding, found

STUCK_AFTER_S = 2.0
LATE_SHARE = 1 / 3
"""Of a handoff's time; with the default deadline that is after ten seconds, as in the alarms."""
RECOMPUTED_SHARE = 0.5
MIN_OUTCOMES = 4
_UNKNOWN = "an unknown peer"
_NAMED = 5
_WAITING = ("reserving", "waiting", "subscribed", "pulling", "draining")


def handoffs(case: Case) -> Iterator[Finding]:
    """KVF107, KVF108, KVF109: handoffs that do not move."""
    state = case.facts.router
    if state is None:
        return
    members = {str(m.get("instance_id")): m for m in instances_of(state)}
    requests = [r for r in state.get("requests") or () if not is_probe(r)]
    told: set[object] = set()
    groups: dict[_Why, list[dict[str, Any]]] = {}
    for view in sorted(state.get("handoffs") or (), key=_age, reverse=True):
        if view.get("side") != "target" or view.get("stage") not in _WAITING or _age(view) < STUCK_AFTER_S:
            continue
        told.add(view.get("handoff"))
        why = _why(state, members, requests, view)
        if not why.busy or _age(view) >= LATE_SHARE * (_age(view) + float(view.get("remaining_s") or 0)):
            groups.setdefault(why, []).append(view)
    for why, views in groups.items():
        yield found(why.finding, _account(state, members, requests, views) + why.cause, why.fix)
    for request in requests:
        # Once decode has the KV, prefill may go.
        needed = ("decode", "prefill") if request.get("stage") == "prefill" else ("decode",)
        gone = [str(request[role]) for role in needed if request.get(role) not in (None, *members)]
        if gone and request.get("handoff") not in told and _age(request) >= STUCK_AFTER_S:
            yield found(
                "KVF108",
                f"{_named(request)}: in stage "
                f"{request.get('stage')}, {_age(request):.1f} s old at the router, {_pair(request)}; "
                f"{' and '.join(gone)} no longer reports itself: its process ended or is stopped, or it does not "
                "reach the router",
                f"continue or start {gone[0]} again",
            )


class _Why(NamedTuple):
    """Why handoffs wait: those with the same reason are told of together.

    `busy` ones wait for somebody who works, as every request does under load; they are news once they are late.
    """

    finding: str
    cause: str
    fix: str
    stage: str
    busy: bool = False


def _why(
    state: dict[str, Any], members: dict[str, dict[str, Any]], requests: list[dict[str, Any]], view: dict[str, Any]
) -> _Why:
    target, source, stage = str(view.get("instance")), _source(requests, view), str(view.get("stage"))
    if trouble := _trouble(members.get(target)):
        return _Why("KVF107", f"likely cause: {target} itself: {trouble}", f"look at {target}: {trouble}", stage)
    if source not in members and source != _UNKNOWN:
        gone = f"{source} no longer reports itself: its process ended or is stopped, or it does not reach the router"
        return _Why("KVF108", gone, f"continue or start {source} again", stage)
    if stage == "reserving":
        own = members.get(target, {})
        room = f"{own.get('free_blocks')} of {own.get('num_blocks')} blocks are free at {target}, with {_queue(own)}"
        fix = f"start {target} with more blocks, let fewer requests in at once, or add a decode instance"
        return _Why("KVF109", f"likely cause: {room}: the next request needs more than that", fix, stage, True)
    other, member = _counterpart(state, view), members.get(source)
    cause, busy = _source_cause(member, other, source, target)
    moving = bool(view.get("moved") or other.get("moved"))
    fix = f"look at {source}: its queue, its log, its serving loop; the request ends by itself at its deadline"
    return _Why("KVF107", f"likely cause: {cause}", fix, stage, busy or moving)


def _account(
    state: dict[str, Any],
    members: dict[str, dict[str, Any]],
    requests: list[dict[str, Any]],
    views: list[dict[str, Any]],
) -> str:
    """Who waits for whom, in which stage and since when: the oldest of these handoffs, and the others by name."""
    oldest = views[0]
    source = _source(requests, oldest)
    request = next((r for r in requests if r.get("handoff") == oldest.get("handoff")), {})
    of = f" of request {request['request']}" if request.get("request") else ""
    seen = (
        f"handoff {oldest.get('handoff')}{of}: {oldest.get('instance')} is {oldest.get('stage')} since "
        f"{_age(oldest):.1f} s for {source}, {float(oldest.get('remaining_s') or 0):.1f} s remain{_detail(oldest)}; "
    )
    other, member = _counterpart(state, oldest), members.get(source)
    if member is not None:
        heard = f", last heard {float(member['silent_s']):.1f} s ago" if "silent_s" in member else ""
        there = f"there it is {other.get('stage')}{_detail(other)} since {_age(other):.1f} s" if other else "not listed"
        seen += f"{source}{heard}: {there}; "
    if more := views[1:]:
        names = ", ".join(str(v.get("handoff"))[:12] for v in more[:_NAMED]) + (" …" if len(more) > _NAMED else "")
        seen += f"{len(more)} more wait like this ({names}); "
    return seen


def _source(requests: list[dict[str, Any]], view: dict[str, Any]) -> str:
    request = next((r for r in requests if r.get("handoff") == view.get("handoff")), {})
    return str(request.get("prefill") or view.get("peer") or _UNKNOWN)


def _queue(member: dict[str, Any] | None) -> str:
    running, waiting = (int((member or {}).get(k) or 0) for k in ("running", "waiting"))
    return f"{running} running and {waiting} waiting requests"


def _source_cause(member: dict[str, Any] | None, view: dict[str, Any], source: str, target: str) -> tuple[str, bool]:
    """Why the source has not delivered, by what it and the router say of it, and whether it is only busy."""
    if trouble := _trouble(member):
        return trouble, False
    queue = _queue(member)
    stage = view.get("stage")
    if stage == "sealed":
        why = f"everything is published there and {target} does not get it: the way between the two is slow or closed"
        return why, False
    if member and not member.get("free_blocks") and member.get("num_blocks"):
        return f"the KV cache of {source} is full, with {queue}", True
    if stage in ("open", "publishing"):
        return f"{source} has {queue} and is not done with this one", True
    if member and member.get("waiting"):
        return f"its request queues at {source} behind {queue}", True
    why = (
        f"the request did not reach {source}, or reached it without its ticket: something between the router and it "
        "drops kv_transfer_params, or it runs without the connector"
    )
    return why, False


def _trouble(member: dict[str, Any] | None) -> str:
    """What is wrong with an instance that others wait for; empty where nothing is."""
    if member is None:
        return ""
    if member.get("answers") == "refused":
        return f"nothing listens at {member.get('url')} any more, its process has ended"
    if member.get("answers") == "silent":
        return f"{member.get('url')} takes connections and says nothing, its process is stopped or hangs"
    silent, still = float(member.get("silent_s") or 0), float(member.get("standstill_s") or 0)
    if silent > SILENT_S and not member.get("polled"):
        return f"no heartbeat of it for {silent:.1f} s, its process is stopped or its node is gone"
    if still and (member.get("running") or member.get("waiting")):
        return f"its serving loop stands at step {member.get('step')} for {still:.1f} s or more"
    return ""


def _counterpart(state: dict[str, Any], view: dict[str, Any]) -> dict[str, Any]:
    views = state.get("handoffs") or ()
    return next((h for h in views if h.get("handoff") == view.get("handoff") and h.get("side") == "source"), {})


def _age(view: dict[str, Any]) -> float:
    return float(view.get("age_s") or 0.0)


def _detail(view: dict[str, Any]) -> str:
    return f" ({view['detail']})" if view.get("detail") else ""


def outcomes(case: Case) -> Iterator[Finding]:
    """KVF110, KVF111, KVF115: how the latest requests ended."""
    state = case.facts.router
    if state is None:
        return
    ended = [r for r in state.get("recent") or () if r.get("state") and not is_probe(r)]
    recomputed = sum(r["state"] == "recomputed" for r in ended)
    mostly = len(ended) >= MIN_OUTCOMES and recomputed > RECOMPUTED_SHARE * len(ended)
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for r in ended:
        if r["state"] in ("failed", "recomputed"):
            key = (r["state"], str(r.get("stage") or "an unknown stage"), str(r.get("cause") or "no cause"))
            groups.setdefault(key, []).append(r)
    for (kind, stage, cause), requests in groups.items():
        last = requests[-1]
        if kind == "failed" and 400 <= int(last.get("status") or 500) < 500:
            continue  # The client's own error.
        if kind == "recomputed" and mostly:
            continue
        texts = _texts(stage, cause, last)
        yield found(
            "KVF110" if kind == "failed" else "KVF115",
            f"{len(requests)} of the last {len(ended)} requests {'failed' if kind == 'failed' else 'were recomputed'}: "
            f"at {stage} with {cause} ({_pair(last)}), the last one, {_named(last)}, after "
            f"{float(last.get('handoff_s') or last.get('total_s') or 0):.1f} s"
            + (f": {last['detail']}" if last.get("detail") else "")
            + (f"; {texts.meaning}" if texts.meaning else ""),
            texts.mend,
        )
    if mostly:
        causes = [
            f"{len(v)} x {stage}/{cause} ({_pair(v[-1])})"
            + (f", {m}" if (m := _texts(stage, cause, v[-1]).meaning) else "")
            for (kind, stage, cause), v in groups.items()
            if kind == "recomputed"
        ]
        yield found("KVF111", f"{recomputed} of the last {len(ended)} requests recomputed: {'; '.join(causes)}")


def _named(record: dict[str, Any]) -> str:
    """A request with its handoff, if it has one."""
    request, handoff = f"request {record.get('request')}", record.get("handoff")
    return f"handoff {handoff} of {request}" if handoff else request


def _pair(record: dict[str, Any]) -> str:
    prefill, decode = record.get("prefill"), record.get("decode")
    if prefill and decode:
        return f"{prefill} to {decode}"
    return f"{prefill or decode} alone" if prefill or decode else "no instance"


def _texts(stage: str, cause: str, record: dict[str, Any]) -> Cause:
    """What a stage and a cause say of the pair, and what to do; empty for a word that another release gave."""
    texts = cause_of(cause, stage) or Cause("", "")
    return texts.named(prefill=str(record.get("prefill") or "prefill"), decode=str(record.get("decode") or "decode"))
