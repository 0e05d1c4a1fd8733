"""What kvferry's own instances must share: the secret, the router, the namespace, a transport."""

from __future__ import annotations

import hmac
from collections.abc import Iterator

from kvferry.addresses import is_wildcard
from kvferry.config import RouterSettings
from kvferry.doctor.case import Case
from kvferry.doctor.facts import Side
from kvferry.doctor.findings import Finding, found
from kvferry.doctor.settings import split_host_port

_ABSENT = {
    "refused": "refuses connections: nothing listens there",
    "timeout": "does not answer (connection timed out)",
    "unreachable": "cannot be reached (no route)",
    "unresolved": "does not resolve to an address",
}
_SECRET = "KVFERRY_CLUSTER_SECRET"


def secrets(case: Case) -> Iterator[Finding]:
    """KVF087: two instances prove different secrets to each other. The secrets themselves are never shown."""
    for p, d in case.pairs():
        a, b = p.environment.get(_SECRET), d.environment.get(_SECRET)
        ours = _is_ours(case, p) and _is_ours(case, d)
        if not ours or hmac.compare_digest((a or "").encode(), (b or "").encode()):
            continue
        if any(f"{_SECRET}_FILE" in s.environment or case.settings[s.name].flag("cluster-secret-file") for s in (p, d)):
            continue
        yield found(
            "KVF087",
            f"{p.name}: {_SECRET} {_said(a)}; {d.name}: {_SECRET} {_said(b)}",
            f"give both instances (and the router) the same {_SECRET}, and start them again",
        )


def _said(secret: str | None) -> str:
    return "is not set" if not secret else f"is another one ({len(secret)} characters)"


def meeting_places(case: Case) -> Iterator[Finding]:
    """KVF088: instances that join different routers or namespaces."""
    for p, d in case.pairs():
        for flag, variable in (
            ("cluster-router-url", "KVFERRY_CLUSTER_ROUTER_URL"),
            ("cluster-namespace", "KVFERRY_CLUSTER_NAMESPACE"),
        ):
            a, b = (case.settings[s.name].flag(flag) for s in (p, d))
            if a != b and (flag == "cluster-namespace" or (a and b)) and _is_ours(case, p) and _is_ours(case, d):
                yield found(
                    "KVF088",
                    f"{p.name}: {flag} {a or 'not set'}; {d.name}: {flag} {b or 'not set'}",
                    f"set {variable}={a or b} on both",
                )


def routers(case: Case) -> Iterator[Finding]:
    """KVF100: the router that a running instance is to report to is not there, or is stopped."""
    for reach in case.facts.reaches:
        if reach.purpose != "router" or (reach.outcome == "open" and not reach.stopped_owner):
            continue
        where = f"{reach.seen_from}: its router {reach.host}:{reach.port}"
        stopped = f"takes connections and does not answer: {reach.stopped_owner} is stopped"
        yield found(
            "KVF100",
            f"{where} {stopped if reach.stopped_owner else _ABSENT.get(reach.outcome, reach.outcome)}",
            f"continue it: kill -CONT {reach.stopped_owner.rpartition(' ')[2].rstrip(')')}"
            if reach.stopped_owner
            else f"start it (kvferry router --host {reach.host} --port {reach.port}), or correct cluster.router_url of "
            f"{reach.seen_from}",
        )


def transports(case: Case) -> Iterator[Finding]:
    """KVF009: lists of transports without one in common."""
    for p, d in case.pairs():
        lists = [case.settings[s.name].flag("transfer-transports") for s in (p, d)]
        if None in lists:
            continue
        mine, theirs = ({t.strip() for t in str(x).split(",")} for x in lists)
        if not mine & theirs:
            yield found(
                "KVF009",
                f"{p.name}: transports {lists[0]}; {d.name}: transports {lists[1]}; none is common",
                "add tcp to KVFERRY_TRANSFER_TRANSPORTS on both sides",
            )


def shared_memory(case: Case) -> Iterator[Finding]:
    """KVF112: two instances of one machine cannot map each other's memory, so that KV goes over TCP."""
    for p, d in case.pairs():
        a, b = p.process, d.process
        if not a or not b or not (_is_ours(case, p) and _is_ours(case, d)):
            continue
        apart = a.pid_namespace and b.pid_namespace and a.pid_namespace != b.pid_namespace
        lists = [case.settings[s.name].flag("transfer-transports") for s in (p, d)]
        if apart and all(x is None or "shm" in x.split(",") for x in lists):
            yield found(
                "KVF112",
                f"{p.name} (pid {a.pid}) and {d.name} (pid {b.pid}) are on one machine, each in a PID namespace of its "
                "own: neither finds the other's memory under /proc, and KV goes over tcp",
                "let the containers share one: --pid=host, --pid=container:NAME, or shareProcessNamespace: true in one "
                "pod",
            )


def settings_ports(case: Case) -> Iterator[Finding]:
    """KVF012: a fixed port of the settings file is held by a stranger."""
    settings = case.facts.kvferry
    if settings is None:
        return
    places = [
        ("router.port", settings.router.host, settings.router.port),
        ("engine.port", settings.engine.host, settings.engine.port),
        ("handoff.listen", *split_host_port(settings.handoff.listen)),
    ]
    for key, host, port in places:
        ours = is_wildcard(host) or case.is_ours(host)
        if not port or not ours or (key, port) == ("router.port", RouterSettings().port):
            continue
        holder = next((x for x in case.facts.host.listeners if x.port == port), None)
        if holder is not None and not holder.is_engine and holder.owner:
            yield found(
                "KVF012",
                f"{case.facts.kvferry_path}: {key} is {port}; it is held by {holder.owner} on {holder.address}:{port}",
                f"stop {holder.owner}, or set {key} to a free port (0 lets the system choose)",
            )


def _is_ours(case: Case, side: Side) -> bool:
    settings = case.settings[side.name]
    return settings.engine == "kvferry" or "KVFerryConnector" in settings.connectors
