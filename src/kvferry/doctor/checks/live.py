"""What the running cluster, the probes and the logs tell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvferry.doctor.case import Case
from kvferry.doctor.facts import ProbeStep
from kvferry.doctor.findings import Finding, found

SILENT_S = 2.5
MIN_ASKED_TOKENS = 64
"""Fewer are a warm-up request or a look at the instance itself."""
_NO_ANSWER = {
    "refused": "nothing listens there any more, its process has ended",
    "silent": "it takes connections and says nothing on them, its process is stopped or hangs",
}
_STEP_MEND = {
    "bind": "correct the setting that the message names, or give this node the address again (ip addr)",
    "connect": "open this way in the firewall or the routes (ip route get ADDRESS on the side that is named), or "
    "advertise an address that the other side reaches",
    "handshake": "the same kvferry version and secret on both sides, and nothing between them that rewrites bytes",
    "transfer": "look for drops between the nodes (ip -s link), a firewall that ends long connections, an MTU that "
    "does not fit (ping -M do -s 8972 PEER)",
    "verify": "turn checksum offload off to see which card it is (ethtool -K NAME rx off tx off), replace it; until "
    "then set transfer.verify_digest = true",
}
_STEP_FINDING = {
    "bind": "KVF120",
    "connect": "KVF121",
    "handshake": "KVF122",
    "transfer": "KVF123",
    "verify": "KVF124",
    "metadata": "KVF125",
}


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
        seen = f"{step.transport}: {step.step} failed: {step.detail}{far}"
        yield found(_STEP_FINDING[step.step], seen, _mend_of(step))


def _mend_of(step: ProbeStep) -> str:
    if "cluster secret" in step.detail:
        return "give both sides (and the router) the same KVFERRY_CLUSTER_SECRET, and start them again"
    if "MTU" in step.detail:
        return (
            "if the process runs and is the right one: ping -M do -s 1472 PEER, then with -s 8972; set the MTU of both "
            "interfaces to what gets through (ip link set dev NAME mtu 1500)"
        )
    return _STEP_MEND.get(step.step, "")


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
    members = instances_of(case.facts.router)
    for role in ("prefill", "decode"):
        if not any(m.get("role") in (role, "both") for m in members):
            instances = "one instance" if len(members) == 1 else f"{len(members)} instances"
            others = f"knows {instances}, none" if members else "knows none"
            last = _last_seen(case.facts.router, role)
            yield found(
                "KVF105",
                f"the router at {case.facts.router_url} {others} for {role}"
                + (f"; {last} was one and no longer reports itself" if last else ""),
                f"look at {last}: did its process end, is it stopped, does it still reach the router? Start it again"
                if last
                else f"start one: kvferry engine --role {role} with this router's URL",
            )


def _last_seen(state: dict[str, Any], role: str) -> str:
    """The instance that last had this role in a request, open or ended; empty where none is known."""
    records = [*(state.get("recent") or ()), *(state.get("requests") or ())]
    return next((str(r[role]) for r in reversed(records) if r.get(role) and not is_probe(r)), "")


def instances(case: Case) -> Iterator[Finding]:
    """KVF003, KVF106, KVF109, KVF113, KVF114: who does not answer, stands still, is full, or cannot hand over."""
    if case.facts.router is None:
        return
    for m in instances_of(case.facts.router):
        still, silent = float(m.get("standstill_s") or 0.0), float(m.get("silent_s") or 0.0)
        busy = m.get("running") or m.get("waiting")
        if m.get("answers") in _NO_ANSWER:
            yield found(
                "KVF114",
                f"{m.get('instance_id')} ({m.get('url')}): {_NO_ANSWER[m['answers']]}; "
                f"it last reported itself {silent:.1f} s ago",
                f"kill -CONT it if it is stopped, else read its log's end and start {m.get('instance_id')} again",
            )
        elif silent > SILENT_S and not m.get("polled"):
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
        if m.get("polled") and m.get("role") != "decode" and not m.get("addresses"):
            yield found(
                "KVF003",
                f"{m.get('instance_id')} ({m.get('url')}) answers and has registered no listener for handoffs: "
                "requests to it are computed and their KV cannot be fetched",
                f"start {m.get('instance_id')} with KVFerryConnector and this router's URL, or name its listener: "
                f"router.prefill = {m.get('url')},handoff=tcp://HOST:PORT",
            )
        for mismatch in m.get("mismatches") or ():
            if m.get("role") != "decode":
                yield found("KVF113", f"{m.get('instance_id')}: {mismatch}")


def fetching(case: Case) -> Iterator[Finding]:
    """KVF111: vLLM's own counters say that decode's connector never brought a token."""
    for counts in case.facts.prefix_counts:
        if counts.asked >= MIN_ASKED_TOKENS and not counts.came:
            connectors = ", ".join(case.settings[counts.name].connectors)
            yield found(
                "KVF111",
                f"{counts.name}: its connector ({connectors}) was asked for the KV of {counts.asked} prompt tokens and "
                "brought none (vllm:external_prefix_cache_hits_total is 0)",
                "send requests to kvferry's router, not to the instance itself"
                if "KVFerryConnector" in connectors
                else "use a proxy that is made for this connector: one that hands prefill's kv_transfer_params to "
                "decode (vLLM's toy_proxy_server.py for NixlConnector), and ask it, not decode itself",
            )


def passage(case: Case) -> Iterator[Finding]:
    """KVF101 to KVF104: what the way through the router does to bytes, streams, fields and statuses."""
    p = case.facts.router_probe
    if p is None:
        return
    if p.failure:
        if case.facts.router_error and not case.facts.router_is_foreign:
            return  # Told already.
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


def instances_of(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the router's table."""
    return [m for m in state.get("instances") or () if isinstance(m, dict)]


def is_probe(record: dict[str, Any]) -> bool:
    """Whether a request was one of the doctor's own."""
    return str(record.get("model") or "").startswith("kvferry-doctor-")
