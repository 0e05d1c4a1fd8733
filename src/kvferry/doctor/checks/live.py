"""What the running cluster, the probes and the logs tell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvferry.doctor.case import Case
from kvferry.doctor.findings import Finding, found

STUCK_AFTER_S = 2.0
SILENT_S = 2.5
RECOMPUTED_SHARE = 0.5
MIN_OUTCOMES = 4
_STEP_FINDING = {
    "bind": "KVF120",
    "connect": "KVF121",
    "handshake": "KVF122",
    "transfer": "KVF123",
    "verify": "KVF124",
    "metadata": "KVF125",
}
_WAITING = ("reserving", "waiting", "subscribed", "pulling")


def probe(case: Case) -> Iterator[Finding]:
    """KVF120 to KVF125: the first step of each transport's rendezvous that failed."""
    failed: set[str] = set()
    for step in case.facts.probe:
        if step.ok or step.transport in failed:
            continue
        failed.add(step.transport)
        done = [s.step for s in case.facts.probe if s.transport == step.transport and s.ok]
        far = f"; it got through {', '.join(done)}" if done else ""
        if step.step == "use":
            slower = [s.transport for s in case.facts.probe if s.step == "verify" and s.ok]
            if slower:
                yield found("KVF112", f"{step.transport} cannot be used, {slower[0]} can: {step.detail}")
            else:
                yield found("KVF123", f"{step.transport}: {step.detail}{far}")
            continue
        yield found(_STEP_FINDING[step.step], f"{step.transport}: {step.step} failed: {step.detail}{far}")


def router(case: Case) -> Iterator[Finding]:
    """KVF100: the router is not there or is none."""
    if case.facts.router_is_foreign and case.facts.router_probe is not None:
        return  # A proxy of another kind was named for the probe, which says what there is to say.
    if case.facts.router_error:
        yield found(
            "KVF100",
            case.facts.router_error,
            f"start the router (kvferry router), or name its real URL instead of {case.facts.router_url}",
            severity="warning" if case.facts.router_is_foreign else None,
        )


def roles(case: Case) -> Iterator[Finding]:
    """KVF105: a role that no registered instance has."""
    if case.facts.router is None:
        return
    members = _instances(case.facts.router)
    for role in ("prefill", "decode"):
        if not any(m.get("role") in (role, "both") for m in members):
            others = f"knows {len(members)} others, none" if members else "knows none"
            yield found(
                "KVF105",
                f"the router at {case.facts.router_url} {others} for {role}",
                f"start one: kvferry engine --role {role} with this router's URL",
            )


def instances(case: Case) -> Iterator[Finding]:
    """KVF106, KVF109, KVF113: who of the registered stands still, is full, or does not fit."""
    if case.facts.router is None:
        return
    for m in _instances(case.facts.router):
        still, silent = float(m.get("standstill_s") or 0.0), float(m.get("silent_s") or 0.0)
        busy = m.get("running") or m.get("waiting")
        if silent > SILENT_S and not m.get("polled"):
            yield found(
                "KVF106",
                f"{m.get('instance_id')} ({m.get('url')}): no heartbeat for {silent:.1f} s",
                f"look at it: is the process behind {m.get('url')} stopped, or its node gone? Start it again",
            )
        elif still and busy:
            yield found(
                "KVF106",
                f"{m.get('instance_id')}: heartbeats come, but its step stands at {m.get('step')} for {still:.1f} s "
                f"or more, with {m.get('running')} running and {m.get('waiting')} waiting requests",
                f"look at it (py-spy dump on the process behind {m.get('url')}), then start it again",
            )
        if m.get("num_blocks") and not m.get("free_blocks") and m.get("waiting"):
            yield found(
                "KVF109",
                f"{m.get('instance_id')}: 0 of {m.get('num_blocks')} blocks free, {m.get('waiting')} requests wait",
                f"start {m.get('instance_id')} with more blocks, or add an instance of role {m.get('role')}",
            )
        for mismatch in m.get("mismatches") or ():
            if m.get("role") != "decode":
                yield found("KVF113", f"{m.get('instance_id')}: {mismatch}")


def handoffs(case: Case) -> Iterator[Finding]:
    """KVF107, KVF108, KVF110, KVF111: open handoffs that do not move, and how the latest ones ended."""
    state = case.facts.router
    if state is None:
        return
    members = {m.get("instance_id"): m for m in _instances(state)}
    pairs = {r.get("handoff"): r for r in state.get("requests") or () if r.get("handoff")}
    for h in state.get("handoffs") or ():
        age = float(h.get("age_s") or 0.0)
        if h.get("side") != "target" or h.get("stage") not in _WAITING or age < STUCK_AFTER_S:
            continue
        request = pairs.get(h.get("handoff")) or {}
        source = request.get("prefill") or h.get("peer") or "an unknown peer"
        seen = (
            f"handoff {h.get('handoff')}{_of(request)}: {h.get('instance')} is {h.get('stage')} since {age:.1f} s "
            f"for {source}, {float(h.get('remaining_s') or 0):.1f} s remain{_detail(h)}"
        )
        member = members.get(source)
        if member is None and source != "an unknown peer":
            yield found("KVF108", f"{seen}; {source} no longer reports itself", f"start {source} again")
            continue
        theirs = _counterpart(state, str(h.get("handoff")))
        life = f", last heard {float(member['silent_s']):.1f} s ago" if member and "silent_s" in member else ""
        yield found(
            "KVF107",
            f"{seen}; {source}{life}: " + (theirs or "does not list this handoff (its request has not arrived there)"),
            f"look at {source}: its queue, its log, its serving loop; the request ends by itself at its deadline",
        )
    yield from _ended(state)


def _of(request: dict[str, Any]) -> str:
    return f" of request {request['request']}" if request.get("request") else ""


def _detail(view: dict[str, Any]) -> str:
    return f" ({view['detail']})" if view.get("detail") else ""


def _counterpart(state: dict[str, Any], handoff: str) -> str:
    for h in state.get("handoffs") or ():
        if h.get("handoff") == handoff and h.get("side") == "source":
            return f"there it is {h.get('stage')}{_detail(h)} since {float(h.get('age_s') or 0):.1f} s"
    return ""


def _is_probe(record: dict[str, Any]) -> bool:
    """Whether a request was one of the doctor's own."""
    return str(record.get("model") or "").startswith("kvferry-doctor-")


def _ended(state: dict[str, Any]) -> Iterator[Finding]:
    ended = [r for r in state.get("recent") or () if r.get("state") and not _is_probe(r)]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for r in ended:
        if r["state"] in ("failed", "recomputed"):
            key = (r["state"], str(r.get("stage") or "?"), str(r.get("cause") or "?"))
            groups.setdefault(key, []).append(r)
    for (kind, stage, cause), requests in groups.items():
        last = requests[-1]
        if kind == "failed" and not 400 <= int(last.get("status") or 500) < 500:
            pair = f"{last.get('prefill') or '?'} to {last.get('decode') or '?'}"
            detail = f": {last['detail']}" if last.get("detail") else ""
            yield found(
                "KVF110",
                f"{len(requests)} of the last {len(ended)} requests failed at {stage} with {cause} ({pair}){detail}",
            )
    recomputed = sum(r["state"] == "recomputed" for r in ended)
    if len(ended) >= MIN_OUTCOMES and recomputed > RECOMPUTED_SHARE * len(ended):
        causes = [
            f"{len(v)} x {stage}/{cause} ({v[-1].get('prefill') or '?'} to {v[-1].get('decode') or '?'})"
            for (kind, stage, cause), v in groups.items()
            if kind == "recomputed"
        ]
        yield found("KVF111", f"{recomputed} of the last {len(ended)} requests recomputed: {', '.join(causes)}")


def passage(case: Case) -> Iterator[Finding]:
    """KVF101 to KVF104: what the way through the router does to bytes, streams, fields and statuses."""
    p = case.facts.router_probe
    if p is None:
        return
    if p.failure:
        yield found("KVF100", f"{p.url}: {p.failure}", f"make {p.url} answer /v1/completions, then probe again")
        return
    if p.mangled:
        yield found("KVF101", f"{p.url}: {p.mangled}", f"let what stands before {p.url} pass the body on as bytes")
    if p.buffered_s is not None:
        yield found(
            "KVF102",
            f"{p.url}: chunks sent over {p.buffered_s:.2f} s arrived together at the end",
            f"turn buffering off in what stands before {p.url} (nginx: proxy_buffering off; x-accel-buffering: no)",
        )
    if p.dropped_params:
        yield found(
            "KVF103",
            f"{p.url}: kv_transfer_params were sent and did not arrive at the instance",
            f"let what stands before {p.url} pass unknown fields of the request on",
        )
    if p.status_change is not None:
        yield found(
            "KVF104",
            f"{p.url}: the instance answered {p.status_change[0]}, the client got {p.status_change[1]}",
            f"let what stands before {p.url} pass the status on",
        )


def logs(case: Case) -> Iterator[Finding]:
    """KVF200 and after: what log rules found."""
    for entry in case.facts.logs:
        times = f"{entry.count} x, first " if entry.count > 1 else ""
        yield Finding(
            entry.finding,
            "error" if entry.severity == "error" else "warning" if entry.severity == "warning" else "info",
            entry.title,
            f"{entry.source}: {times}{entry.first}",
            entry.why,
            entry.fix,
        )


def _instances(state: dict[str, Any]) -> list[dict[str, Any]]:
    return [m for m in state.get("instances") or () if isinstance(m, dict)]
