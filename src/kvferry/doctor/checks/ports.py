"""Ports: ranges that overlap, lie too close, are taken, or that the kernel may give away."""

from __future__ import annotations

from collections.abc import Iterator

from kvferry.addresses import is_loopback, is_wildcard
from kvferry.doctor.case import Case, Ports
from kvferry.doctor.facts import Listener, Side
from kvferry.doctor.findings import Finding, found

MIN_DISTANCE = 5
"""How far prefill_url's and decode_url's ports must be apart on one node. Source: Mooncake issue 8."""


def overlapping(case: Case) -> Iterator[Finding]:
    """KVF010, KVF011: two sides of one node want the same ports, or ports closer than their ranks need."""
    by_name = {s.name: s for s in case.facts.sides}
    for i, a in enumerate(case.ports):
        for b in case.ports[i + 1 :]:
            if a.side == b.side or not _share_node(case, by_name[a.side], by_name[b.side], a, b):
                continue
            common = sorted(a.ports & b.ports)
            if common:
                yield _overlap(a, b, common)
            elif a.purpose == b.purpose == "Mooncake pipe" and abs(a.base - b.base) < MIN_DISTANCE:
                yield found(
                    "KVF011",
                    f"{a.side}: {a.key} port {a.base}; {b.side}: {b.key} port {b.base}: "
                    f"{abs(a.base - b.base)} apart on one node, {MIN_DISTANCE} or more are needed",
                    f"set the port of {b.key} to {a.base + 100} (Mooncake's documentation advises 50 or more apart), "
                    "in the one mooncake.json that both sides read",
                )


def _share_node(case: Case, a: Side, b: Side, x: Ports, y: Ports) -> bool:
    if x.purpose == y.purpose == "Mooncake pipe":
        if a.mooncake is not None and b.mooncake is not None and _urls(a) != _urls(b):
            return False  # Two files that differ: the ports of one say nothing about the other (KVF054).
        hosts = [case.old_url(p.key, s) for p, s in ((x, a), (y, b))]
        if all(hosts):
            first, second = hosts[0][0], hosts[1][0]  # type: ignore[index]
            return first == second or (case.is_ours(first) and case.is_ours(second))
    same = case.same_node(a, b)
    if same is None and x.purpose == y.purpose == "NIXL side channel":
        # Without a host both advertise localhost, so one node is the only set-up that could work. Two defaults on
        # sides that nothing places are no evidence, though.
        placed = x.explicit or y.explicit or _told_apart(case, a, b)
        return placed and not any(s.sets("VLLM_NIXL_SIDE_CHANNEL_HOST") for s in (a, b))
    return same is True


def _told_apart(case: Case, a: Side, b: Side) -> bool:
    """Whether HTTP ports or GPUs were chosen so that two instances fit on one node."""
    http = [case.settings[s.name].http_port for s in (a, b)]
    gpus = [s.environment.get("CUDA_VISIBLE_DEVICES") for s in (a, b)]
    return http[0] != http[1] or (None not in gpus and gpus[0] != gpus[1])


def _urls(side: Side) -> tuple[object, object]:
    config = side.mooncake or {}
    return config.get("prefill_url"), config.get("decode_url")


def _overlap(a: Ports, b: Ports, common: list[int]) -> Finding:
    span = max(len(a.ports), len(b.ports))
    free = max(max(a.ports), max(b.ports)) + 1
    if a.purpose == b.purpose == "Mooncake pipe":
        free = a.base + 100
    ports = ", ".join(map(str, common[:6])) + (" …" if len(common) > 6 else "")
    return found(
        "KVF010",
        f"{a.side}: {a.purpose} needs {_span(a)} ({a.key}{'' if a.explicit else ', by default'}); "
        f"{b.side}: {b.purpose} needs {_span(b)} ({b.key}{'' if b.explicit else ', by default'}); "
        f"both want {ports} on one node",
        f"give {b.side} {b.key}={free}: "
        + (f"the ranges of {span} ports then stay apart" if span > 1 else "the two ports then differ"),
    )


def _span(p: Ports) -> str:
    return f"port {p.base}" if len(p.ports) == 1 else f"ports {min(p.ports)}–{max(p.ports)}"


def taken(case: Case) -> Iterator[Finding]:
    """KVF012, KVF014: a port that a side needs is held by a process that is not that side's."""
    by_name = {s.name: s for s in case.facts.sides}
    for wanted in case.ports:
        side = by_name[wanted.side]
        here = side.process is None or side.process.netns == case.facts.host.netns
        if not here or not _runs_here(case, side):
            continue
        all_own = {pid for s in case.facts.sides if s.process for pid in s.process.pids}
        own = set(side.process.pids) if side.process else set()
        bound = {entry.port for entry in side.process.listeners} if side.process else set()
        for port in sorted(wanted.ports - bound):
            holder = next((x for x in case.facts.host.listeners if x.port == port and x.pid not in own), None)
            if holder is not None and side.process is None and _may_be_itself(holder, side, all_own):
                continue
            if holder is not None and holder.pid not in all_own:
                yield found(
                    "KVF012",
                    f"{wanted.side}: needs port {port} for its {wanted.purpose} ({wanted.key}); "
                    f"it is held by {holder.owner or 'a process that may not be seen'} on {holder.address}:{port}",
                    f"stop {holder.owner or 'that process'}, or set {wanted.key} of {wanted.side} to a free port"
                    + (f" (a free range of {len(wanted.ports)})" if len(wanted.ports) > 1 else ""),
                )
                break
            if holder is None and port in case.facts.host.outgoing_ports and wanted.explicit:
                low, high = case.facts.host.ephemeral_ports
                yield found(
                    "KVF014",
                    f"{wanted.side}: needs port {port} for its {wanted.purpose} ({wanted.key}); an outgoing "
                    f"connection holds it now, as the kernel gives out {low}–{high}",
                    f"set {wanted.key} below {low}, or reserve the port: "
                    f"sysctl -w net.ipv4.ip_local_reserved_ports={port}",
                )
                break


def _runs_here(case: Case, side: Side) -> bool:
    """Whether the side's ports are this machine's: its process is here, or all it says of itself is ours."""
    if side.process is not None:
        return True
    stated = case.addresses[side.name].values()
    return (bool(stated) and all(case.is_ours(a) or is_wildcard(a) for a in stated)) or (not stated and case.inside)


def _may_be_itself(holder: Listener, side: Side, known: set[int]) -> bool:
    """A side known only by a file may be running: then a vLLM or kvferry process holds its ports rightly."""
    return holder.pid is None or holder.pid in known or holder.is_engine


def ephemeral(case: Case) -> Iterator[Finding]:
    """KVF013: a fixed port lies where the kernel takes ports for outgoing connections from."""
    low, high = case.facts.host.ephemeral_ports
    for wanted in case.ports:
        inside = [p for p in sorted(wanted.ports) if low <= p <= high and not _reserved(case, p)]
        if inside and wanted.fragile and wanted.explicit:
            yield found(
                "KVF013",
                f"{wanted.side}: {wanted.key} port {inside[0]} lies in the ephemeral range {low}–{high}",
                f"set {wanted.key} below {low}, or reserve it: "
                f"sysctl -w net.ipv4.ip_local_reserved_ports={inside[0]}-{inside[-1]}",
            )


def _reserved(case: Case, port: int) -> bool:
    return any(low <= port <= high for low, high in case.facts.host.reserved_ports)


def bound_to_loopback(case: Case) -> Iterator[Finding]:
    """KVF015: a side tells peers one address and listens on another."""
    for wanted in case.ports:
        side = next(s for s in case.facts.sides if s.name == wanted.side)
        if side.process is None or wanted.purpose == "HTTP":
            continue
        own = {a for addresses in side.process.interfaces.values() for a in addresses}
        told = {k: h for k, h in case.addresses[side.name].items() if not is_loopback(h) and h in own}
        mine = [x for x in side.process.listeners if x.port in wanted.ports]
        if told and mine and all(is_loopback(x.address) for x in mine):
            key, host = next(iter(told.items()))
            yield found(
                "KVF015",
                f"{side.name}: tells its peers {host} ({key}), but listens for its {wanted.purpose} only on "
                f"{mine[0].address}:{mine[0].port}",
                f"let it listen on {host} or on 0.0.0.0 (set VLLM_NIXL_SIDE_CHANNEL_HOST={host}, or the listen "
                "address of its connector), and start it again",
            )
