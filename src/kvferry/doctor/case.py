"""Facts with what follows from them: settings of each side, its addresses, its ports, who shares a node. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import combinations, islice, product
from typing import Any

import msgspec

from kvferry.addresses import is_loopback
from kvferry.doctor.facts import Facts, Side
from kvferry.doctor.settings import (
    Settings,
    as_int,
    json_object,
    read_settings,
    same_node,
    split_host_port,
    stated_addresses,
)

NIXL_PORT = 5600
BOOTSTRAP_PORT = 8998
_NIXL_PER_RANK_UNTIL = (0, 11, 0)
_OLD_MOONCAKE_FIRST_SOCKET = 8
_OLD_NIXL_PORT = 5557
_KV_PORT_A_RANK = ("P2pNcclConnector", "MooncakeConnectorV1", "MooncakeLayerwiseConnector")
_MAX_RANKS = 4096


class Ports(msgspec.Struct, frozen=True):
    """The ports that one purpose needs on one side. `key` says which variable or key moves them."""

    side: str
    purpose: str
    key: str
    base: int
    ports: frozenset[int]
    explicit: bool = True
    fragile: bool = False


class Case:
    """One examination. Settings and ports are worked out once."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts

    @cached_property
    def settings(self) -> dict[str, Settings]:
        """Settings by the side's name."""
        return {s.name: read_settings(s) for s in self.facts.sides}

    @cached_property
    def addresses(self) -> dict[str, dict[str, str]]:
        """What each side says of its own address: variable or key -> host."""
        config = self.facts.mooncake
        return {s.name: stated_addresses(s, self.settings[s.name], config) for s in self.facts.sides}

    def pairs(self) -> Iterator[tuple[Side, Side]]:
        """Each prefill with each decode."""
        yield from product(self.facts.prefills, self.facts.decodes)

    def any_two(self) -> Iterator[tuple[Side, Side]]:
        """Every two sides, whatever their roles."""
        yield from combinations(self.facts.sides, 2)

    def same_node(self, a: Side, b: Side) -> bool | None:
        """Whether two sides share a network stack; None where nothing tells."""
        return same_node(a, b, self.addresses, self.facts.host)

    @cached_property
    def spans_nodes(self) -> bool:
        """Whether some prefill and some decode are known to run on different nodes."""
        return any(self.same_node(p, d) is False for p, d in self.pairs()) or self._stated_hosts_differ

    @cached_property
    def _stated_hosts_differ(self) -> bool:
        p, d = self.old_url("prefill_url"), self.old_url("decode_url")
        return bool(p and d and p[0] != d[0] and not (is_loopback(p[0]) and is_loopback(d[0])))

    @cached_property
    def inside(self) -> bool:
        """Whether we look from inside the cluster, so that an address that does not answer tells something.

        Outside are only those who describe nodes by addresses none of which is ours.
        """
        if any(s.process for s in self.facts.sides):
            return True
        stated = {h for hosts in self.addresses.values() for h in hosts.values()}
        for s in self.facts.sides:
            if s.environment.get("VLLM_HOST_IP"):
                stated.add(s.environment["VLLM_HOST_IP"])
        for key in ("prefill_url", "decode_url", "local_hostname"):
            if isinstance(value := (self.facts.mooncake or {}).get(key), str) and value:
                stated.add(split_host_port(value)[0])
        return not stated or any(self.is_ours(h) for h in stated)

    def is_ours(self, host: str) -> bool:
        """Whether a host is this machine."""
        return is_loopback(host) or host in self.facts.host.addresses

    def old_url(self, key: str, side: Side | None = None) -> tuple[str, int] | None:
        """Host and port of `prefill_url` or `decode_url`, from the side's own file or from --config."""
        candidates = [s.mooncake for s in ([side] if side else self.facts.sides)] + [self.facts.mooncake]
        for config in candidates:
            value = (config or {}).get(key)
            if isinstance(value, str) and value:
                host, port = split_host_port(value)
                if port is not None:
                    return host, port
        return None

    @cached_property
    def configs(self) -> list[tuple[str, dict[str, Any]]]:
        """Every mooncake.json in play, with where it was seen; equal ones once."""
        out: list[tuple[str, dict[str, Any]]] = []
        if self.facts.mooncake is not None:
            out.append((str(self.facts.mooncake_path), self.facts.mooncake))
        for s in self.facts.sides:
            if s.mooncake is not None and all(s.mooncake != c for _, c in out):
                out.append((f"{s.name}'s {s.mooncake_path}", s.mooncake))
        return out

    @cached_property
    def ports(self) -> list[Ports]:
        """What each side binds, as far as its settings tell."""
        return [p for s in self.facts.sides for p in self._ports_of(s)]

    def _ports_of(self, side: Side) -> Iterator[Ports]:
        settings, env = self.settings[side.name], side.environment
        explicit_http = as_int(settings.flag("port")) is not None
        if settings.http_port:
            yield _ports(side, "HTTP", "--port", settings.http_port, [0], explicit_http)
        if "NixlConnector" in settings.connectors or "VLLM_NIXL_SIDE_CHANNEL_PORT" in env:
            base = as_int(env.get("VLLM_NIXL_SIDE_CHANNEL_PORT")) or _default_nixl_port(side)
            ranks = range(settings.dp * (settings.tp if _nixl_port_a_rank(side) else 1))
            explicit = "VLLM_NIXL_SIDE_CHANNEL_PORT" in env
            yield _ports(side, "NIXL side channel", "VLLM_NIXL_SIDE_CHANNEL_PORT", base, ranks, explicit, True)
        listen = split_host_port(settings.flags.get("handoff-listen", ""))[1]
        if listen:
            yield _ports(side, "handoff listener", "handoff.listen", listen, [0], True, True)
        modern = "MooncakeConnector" in settings.connectors and not self.old_mooncake(side)
        outside = settings.transfer is not None and settings.transfer.extra("bootstrap_server_address")
        if side.role == "prefill" and (modern or "VLLM_MOONCAKE_BOOTSTRAP_PORT" in env) and not outside:
            base = as_int(env.get("VLLM_MOONCAKE_BOOTSTRAP_PORT")) or BOOTSTRAP_PORT
            explicit = "VLLM_MOONCAKE_BOOTSTRAP_PORT" in env
            yield _ports(side, "Mooncake bootstrap", "VLLM_MOONCAKE_BOOTSTRAP_PORT", base, [0], explicit)
        key = "prefill_url" if side.role == "prefill" else "decode_url"
        if url := self.old_url(key, side):
            yield Ports(side.name, "Mooncake pipe", key, url[1], old_mooncake_ports(url[1], settings.tp), fragile=True)
        for name, part in settings.transfer.connectors if settings.transfer else ():
            base = as_int(part.get("kv_port")) or 0
            if base and name.startswith(_KV_PORT_A_RANK):
                yield _ports(side, name, "kv_port", base, range(settings.tp * settings.dp), True, True)
        if events := _events_port(settings.flag("kv-events-config")):
            yield _ports(side, "KV events", "--kv-events-config", events, range(settings.dp))

    def old_mooncake(self, side: Side) -> bool:
        """Whether this side uses Mooncake's first connector, which binds the ports of prefill_url and decode_url."""
        transfer = self.settings[side.name].transfer
        ranked = transfer is not None and "kv_rank" in transfer.raw
        key = "prefill_url" if side.role == "prefill" else "decode_url"
        return ranked or self.settings[side.name].process_group or self.old_url(key, side) is not None


def old_mooncake_ports(base: int, num_ranks: int) -> frozenset[int]:
    """The ports that Mooncake's first connector binds: the engine's for each rank, then two sockets for each rank.

    Source: vLLM's former mooncake_pipe.py (sockets from base + 8 + 2 * rank + 1).
    """
    ranks = range(min(num_ranks, _MAX_RANKS))
    engine = {base + r for r in ranks}
    sockets = {base + _OLD_MOONCAKE_FIRST_SOCKET + 2 * r + i for r in ranks for i in (1, 2)}
    return frozenset(engine | sockets)


def _ports(
    side: Side, purpose: str, key: str, base: int, offsets: Iterable[int], explicit: bool = True, fragile: bool = False
) -> Ports:
    ports = frozenset(p for o in islice(offsets, _MAX_RANKS) if 0 < (p := base + o) < 65536)
    return Ports(side.name, purpose, key, base, ports, explicit, fragile)


def _events_port(text: str | None) -> int | None:
    """The port that vLLM publishes its KV events on, None where it publishes none."""
    config = json_object(text) if text else None
    if config is None or not (config.get("enable_kv_cache_events") or config.get("publisher") == "zmq"):
        return None
    endpoint = config.get("endpoint", "tcp://*:5557")
    return split_host_port(endpoint)[1] if isinstance(endpoint, str) else None


def _default_nixl_port(side: Side) -> int:
    """vLLM's own default, which was that of its KV events before 0.11 (vLLM issue 25059)."""
    version = side.versions.get("vllm")
    return NIXL_PORT if version is None or version_tuple(version) >= (0, 11) else _OLD_NIXL_PORT


def _nixl_port_a_rank(side: Side) -> bool:
    """Up to vLLM 0.11.0 every tensor-parallel rank had a side channel of its own; later the instance has one."""
    version = side.versions.get("vllm")
    return version is not None and version_tuple(version) <= _NIXL_PER_RANK_UNTIL


def version_tuple(text: str) -> tuple[int, ...]:
    """The numbers of a version, such as (0, 11, 0); what follows a letter or a plus is ignored."""
    out: list[int] = []
    for part in text.partition("+")[0].split("."):
        digits = part[: next((i for i, c in enumerate(part) if not c.isdecimal()), len(part))]
        if not digits:
            break
        out.append(int(digits))
    return tuple(out)
