"""Addresses: what each side says of itself, what the other can reach, and where both must name the same place."""

from __future__ import annotations

from collections.abc import Iterator

from kvferry.addresses import is_loopback, is_wildcard
from kvferry.doctor.case import Case
from kvferry.doctor.facts import Reach, Side
from kvferry.doctor.findings import Finding, found
from kvferry.doctor.settings import split_host_port

GROUP_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")
_BRIDGES = ("docker", "br-", "virbr", "cni", "lxc", "podman", "flannel", "cali", "kube-ipvs")


def group_variables(case: Case) -> Iterator[Finding]:
    """KVF020: one process group spans both sides, so its variables must agree."""
    for p, d in case.pairs():
        grouped = _one_group(case, p, d)
        if not grouped:
            continue
        wrong = [n for n in GROUP_VARIABLES if p.environment.get(n) != d.environment.get(n) and not _unknown(n, p, d)]
        if case.settings[p.name].process_group and case.spans_nodes:
            wrong += [n for n in ("VLLM_HOST_IP", "VLLM_PORT") if p.environment.get(n) != d.environment.get(n)]
        if wrong:
            first = next((p.environment[n] for n in wrong if n in p.environment), None)
            names = ", ".join(wrong)
            yield found(
                "KVF020",
                "; ".join(
                    f"{s.name}: " + ", ".join(f"{n}={s.environment.get(n, 'not set')}" for n in wrong) for s in (p, d)
                ),
                f"give {names} the same values on both sides: "
                + " ".join(f"{n}={p.environment.get(n) or d.environment.get(n)}" for n in wrong)
                if first is not None or wrong
                else names,
            )


def _unknown(name: str, *sides: Side) -> bool:
    return any(name in s.unknown for s in sides)


def _one_group(case: Case, p: Side, d: Side) -> bool:
    """Whether P and D join one process group: Mooncake's first integration, or nothing newer is in sight.

    Newer connectors give each instance a group of its own, whose variables may well differ.
    """
    if any(case.settings[s.name].process_group for s in (p, d)):
        return True
    modern = any(case.settings[s.name].connectors for s in (p, d))
    return not modern and any(n in s.environment for s in (p, d) for n in GROUP_VARIABLES)


def vllm_port(case: Case) -> Iterator[Finding]:
    """KVF021: two instances of one node start counting their internal ports at the same number."""
    for a, b in case.any_two():
        mine, theirs = a.environment.get("VLLM_PORT"), b.environment.get("VLLM_PORT")
        if mine is None or mine != theirs:
            continue
        p, d = case.old_url("prefill_url"), case.old_url("decode_url")
        if p and d and a.role != b.role:
            together = p[0] == d[0]
        elif case.same_node(a, b) is None:
            host = a.environment.get("VLLM_HOST_IP")
            together = host is not None and host == b.environment.get("VLLM_HOST_IP") and not case.spans_nodes
        else:
            together = case.same_node(a, b) is True
        if together and mine.isdecimal():
            yield found(
                "KVF021",
                f"{a.name}: VLLM_PORT={mine}; {b.name}: VLLM_PORT={theirs}, on one node",
                f"set VLLM_PORT={int(mine) + 100 if int(mine) < 65000 else int(mine) - 1000} on {b.name}",
            )


def host_ip(case: Case) -> Iterator[Finding]:
    """KVF022, KVF030, KVF031, KVF033, KVF034: the address that a side gives out for itself."""
    for side in case.facts.sides:
        for key, host in _given_out(case, side):
            if is_wildcard(host):
                yield found(
                    "KVF033",
                    f"{side.name}: {key} is {host}, which can be bound but not connected to",
                    f"set {key} of {side.name} to the address of this node that the other side reaches",
                )
            elif finding := _not_of_this_machine(case, side, key, host):
                yield finding
    for p, d in case.pairs():
        a, b = (s.environment.get("VLLM_HOST_IP") for s in (p, d))
        grouped = any(case.settings[s.name].process_group for s in (p, d))
        p_url, d_url = case.old_url("prefill_url"), case.old_url("decode_url")
        if p_url and d_url and a and b and not grouped and a != b and {a, b} == {p_url[0], d_url[0]} and a == d_url[0]:
            yield found(
                "KVF034",
                f"prefill_url is {p_url[0]} and decode_url {d_url[0]}, but {p.name} has VLLM_HOST_IP={a} and "
                f"{d.name} VLLM_HOST_IP={b}: they are swapped",
                f"set prefill_url to {a}:{p_url[1]} and decode_url to {b}:{d_url[1]}; "
                "the same mooncake.json goes to both sides, unswapped",
            )
        elif p_url and d_url and not grouped and (strays := _strays(p, d, {p_url[0], d_url[0]})):
            yield found(
                "KVF034",
                "; ".join(
                    f"{s.name}: VLLM_HOST_IP={s.environment['VLLM_HOST_IP']}, which is neither in prefill_url "
                    f"({p_url[0]}) nor in decode_url ({d_url[0]})"
                    for s in strays
                ),
                f"let prefill_url name {p.name}'s VLLM_HOST_IP and decode_url {d.name}'s, in the one mooncake.json",
                title="mooncake.json and VLLM_HOST_IP name different addresses",
            )
        elif a and a == b and not grouped and not is_loopback(a) and _other_evidence_of_two_nodes(case, p, d):
            yield found(
                "KVF022",
                f"{p.name}: VLLM_HOST_IP={a}; {d.name}: VLLM_HOST_IP={b}, but they run on different nodes",
                "set VLLM_HOST_IP on each side to that node's own address",
            )


def _strays(p: Side, d: Side, hosts: set[str]) -> list[Side]:
    """Sides whose VLLM_HOST_IP is an address that mooncake.json does not have; names are not compared with numbers."""
    if not all(_is_number(h) for h in hosts):
        return []
    return [
        s
        for s in (p, d)
        if (own := s.environment.get("VLLM_HOST_IP")) and _is_number(own) and not is_wildcard(own) and own not in hosts
    ]


def _given_out(case: Case, side: Side) -> list[tuple[str, str]]:
    pairs = dict(case.addresses[side.name])
    for key in ("MASTER_ADDR", "VLLM_HOST_IP"):
        if side.environment.get(key):
            pairs.setdefault(key, side.environment[key])
    if case.facts.mooncake and isinstance(local := case.facts.mooncake.get("local_hostname"), str):
        host = split_host_port(local)[0]
        if is_wildcard(host) and side is case.facts.sides[0]:
            pairs.setdefault("local_hostname", host)
    return list(pairs.items())


def _not_of_this_machine(case: Case, side: Side, key: str, host: str) -> Finding | None:
    if side.process is None or key == "MASTER_ADDR" or is_loopback(host) or not _is_number(host):
        return None
    if case.settings[side.name].process_group:
        return None
    interfaces = side.process.interfaces
    own = {a: name for name, addresses in interfaces.items() for a in addresses}
    if interfaces and host not in own:
        there = ", ".join(f"{name} {a}" for a, name in own.items() if not is_loopback(a) and ":" not in a)
        return found(
            "KVF030",
            f"{side.name}: {key}={host}, but its node has {there or 'no such address'}",
            f"set {key} of {side.name} to an address of its node" + (f" ({there})" if there else ""),
        )
    name = own.get(host, "")
    if name.startswith(_BRIDGES) and case.spans_nodes:
        return found(
            "KVF031",
            f"{side.name}: {key}={host}, which is the bridge {name}: other nodes do not reach it",
            f"set {key} of {side.name} to the address of the interface that other nodes reach",
        )
    return None


def _is_number(host: str) -> bool:
    return host.replace(".", "").isdecimal() or ":" in host


def _other_evidence_of_two_nodes(case: Case, p: Side, d: Side) -> bool:
    if p.process and d.process:
        return p.process.netns != d.process.netns
    a, b = (dict(case.addresses[s.name]) for s in (p, d))
    for stated in (a, b):
        stated.pop("VLLM_HOST_IP", None)
    first, second = next(iter(a.values()), None), next(iter(b.values()), None)
    return first is not None and second is not None and first != second


def loopback(case: Case) -> Iterator[Finding]:
    """KVF024: an address that means `myself` is told to another node."""
    if not case.spans_nodes:
        return
    for side in case.facts.sides:
        for key, host in _given_out(case, side):
            if is_loopback(host):
                yield found(
                    "KVF024",
                    f"{side.name}: {key}={host}, while the instances run on different nodes",
                    f"set {key} of {side.name} to its node's address on the network that both sides share",
                )
        settings = case.settings[side.name]
        told = side.sets("VLLM_NIXL_SIDE_CHANNEL_HOST")
        if side.role == "prefill" and "NixlConnector" in settings.connectors and not told:
            yield found(
                "KVF024",
                f"{side.name}: VLLM_NIXL_SIDE_CHANNEL_HOST is not set, so it tells decode to come to localhost, "
                "while the instances run on different nodes",
                f"set VLLM_NIXL_SIDE_CHANNEL_HOST of {side.name} to its node's address on the shared network",
            )
        ip = settings.transfer.raw.get("kv_ip") if settings.transfer else None
        if isinstance(ip, str) and is_loopback(ip):
            yield found(
                "KVF024",
                f"{side.name}: kv_ip={ip}, while the instances run on different nodes",
                f"set kv_ip in the --kv-transfer-config of {side.name} to an address that both nodes reach",
            )
    for path, config in case.configs:
        for key in ("metadata_server", "master_server_address"):
            value = config.get(key)
            if isinstance(value, str) and value and is_loopback(split_host_port(value)[0]):
                yield found(
                    "KVF024",
                    f"{path}: {key} is {value}, while the instances run on different nodes",
                    f"set {key} to the address of the node that runs it",
                )


def reachable(case: Case) -> Iterator[Finding]:
    """KVF023, KVF032: MASTER_ADDR, and what each side tells the other, must answer."""
    told: set[tuple[str, str]] = set()
    for reach in case.facts.reaches:
        if (reach.host, reach.purpose) in told or not case.inside:
            continue
        if reach.purpose == "MASTER_ADDR" and reach.outcome in ("timeout", "unreachable", "unresolved"):
            told.add((reach.host, reach.purpose))
            yield found(
                "KVF023",
                f"{reach.seen_from}: MASTER_ADDR={reach.host} {_says(reach)}",
                f"set MASTER_ADDR to an address that every node reaches, or open the way to {reach.host}:{reach.port}",
            )
        elif reach.purpose == "MASTER_ADDR" and reach.outcome == "refused" and _runs_in_group(case, reach.seen_from):
            told.add((reach.host, reach.purpose))
            yield found(
                "KVF023",
                f"{reach.seen_from}: MASTER_ADDR={reach.host}, MASTER_PORT={reach.port} {_says(reach)}, while the "
                "instances run that should meet there",
                "start the instance of rank 0 on the node that MASTER_ADDR names, first of all, and see in its log "
                f"which address and port it took ({reach.host}:{reach.port} is expected)",
            )
        elif reach.purpose.startswith("advertised") and reach.outcome in ("timeout", "unreachable", "unresolved"):
            told.add((reach.host, reach.purpose))
            yield found(
                "KVF032",
                f"{reach.seen_from}: {reach.host}:{reach.port} ({reach.purpose.partition(' ')[2]}) {_says(reach)}",
                f"advertise an address that {reach.seen_from} reaches, or open the firewall for port {reach.port}",
            )


def _runs_in_group(case: Case, name: str) -> bool:
    side = next((s for s in case.facts.sides if s.name == name), None)
    return side is not None and side.process is not None and case.settings[name].process_group


def _says(reach: Reach) -> str:
    return {
        "timeout": "does not answer (connection timed out)",
        "unreachable": "cannot be reached (no route)",
        "unresolved": "does not resolve to an address",
        "refused": "refuses connections: nothing listens there",
        "open": "answers",
    }[reach.outcome]


def names(case: Case) -> Iterator[Finding]:
    """KVF025: one name, two addresses."""
    by_name: dict[str, dict[str, tuple[str, ...]]] = {}
    for r in case.facts.resolutions:
        by_name.setdefault(r.name, {})[r.side] = r.addresses
    for name, sides in by_name.items():
        if len({tuple(sorted(a)) for a in sides.values()}) > 1:
            seen = "; ".join(f"{side}: {name} is {', '.join(a) or 'unknown'}" for side, a in sides.items())
            yield found(
                "KVF025",
                seen,
                f"give {name} the same address in /etc/hosts (or DNS) of every node, or use the number itself",
            )
