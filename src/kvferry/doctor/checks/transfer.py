"""The connector: there on both sides, the same one, with roles and ranks that fit."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from kvferry.doctor.case import Case
from kvferry.doctor.facts import Side
from kvferry.doctor.findings import Finding, found
from kvferry.doctor.settings import NCCL_CONNECTORS, TRANSFER_KEYS, Transfer, as_int

_ROLES = ("kv_producer", "kv_consumer", "kv_both")
_RIGHT_ROLE = {"prefill": "kv_producer", "decode": "kv_consumer"}
_RIGHT_RANK = {"prefill": 0, "decode": 1}
_ROLE_IS_PLACEHOLDER = frozenset({"NixlConnector"})


def unreadable(case: Case) -> Iterator[Finding]:
    """KVF002: `--kv-transfer-config` is no JSON object, or has a key that is nearly another."""
    for side in case.facts.sides:
        settings = case.settings[side.name]
        if settings.transfer_error:
            yield found(
                "KVF002",
                f"{side.name}: --kv-transfer-config {settings.transfer_error}",
                f"pass {side.name} a JSON object in single quotes, such as --kv-transfer-config "
                f'\'{{"kv_connector":"NixlConnector","kv_role":"{_RIGHT_ROLE[side.role]}"}}\'',
            )
        if settings.transfer is None:
            continue
        for key in settings.transfer.raw:
            near = difflib.get_close_matches(key, TRANSFER_KEYS, 1, 0.8)
            if key not in TRANSFER_KEYS and near:
                yield found(
                    "KVF002",
                    f"{side.name}: --kv-transfer-config has the key {key!r}, which is not one of vLLM's",
                    f"rename {key!r} to {near[0]!r} on {side.name}",
                )


def absent(case: Case) -> Iterator[Finding]:
    """KVF003: one side has a connector, the other has none and will compute everything itself."""
    for p, d in case.pairs():
        for side, other in ((p, d), (d, p)):
            mine, theirs = case.settings[side.name], case.settings[other.name]
            if mine.connectors or not theirs.connectors or not side.command or mine.transfer_error:
                continue
            if mine.engine != "vllm":
                continue
            config = f'{{"kv_connector":"{theirs.connectors[0]}","kv_role":"{_RIGHT_ROLE[side.role]}"}}'
            yield found(
                "KVF003",
                f"{side.name}: no KV connector on its command line; {other.name}: {', '.join(theirs.connectors)}",
                f"start {side.name} with --kv-transfer-config '{config}'",
            )


def differ(case: Case) -> Iterator[Finding]:
    """KVF004: the two sides speak through different connectors."""
    for p, d in case.pairs():
        mine, theirs = case.settings[p.name].connectors, case.settings[d.name].connectors
        if mine and theirs and not set(mine) & set(theirs):
            yield found(
                "KVF004",
                f"{p.name}: kv_connector {', '.join(mine)}; {d.name}: kv_connector {', '.join(theirs)}",
                f"give both the same kv_connector, such as {mine[0]}",
            )


def roles(case: Case) -> Iterator[Finding]:
    """KVF005: a kv_role that is missing, unknown, or the other side's."""
    for side in case.facts.sides:
        transfer = case.settings[side.name].transfer
        if transfer is None or not transfer.names:
            continue
        role, right = transfer.raw.get("kv_role"), _RIGHT_ROLE[side.role]
        if role in (right, "kv_both"):
            continue
        harmless = role in _ROLES and set(transfer.names) <= _ROLE_IS_PLACEHOLDER
        seen = f"kv_role {role!r}" if role is not None else "no kv_role"
        yield found(
            "KVF005",
            f"{side.name}: {seen}; a {side.role} instance needs {right!r} (or 'kv_both')",
            f'set "kv_role":"{right}" in the --kv-transfer-config of {side.name}',
            severity="warning" if harmless else None,
        )


def ranks(case: Case) -> Iterator[Finding]:
    """KVF006, KVF007: kv_rank and kv_parallel_size must fit each other."""
    for p, d in case.pairs():
        transfers = _both(case, p, d)
        if transfers is None or set(transfers[0].names) != set(transfers[1].names):
            continue
        a, b = transfers[0].raw, transfers[1].raw
        rank_a, rank_b = as_int(a.get("kv_rank")), as_int(b.get("kv_rank"))
        if (rank_a is None) != (rank_b is None) or (rank_a is not None and rank_a == rank_b):
            yield _wrong_ranks(p, d, rank_a, rank_b, "must both be set and differ")
        elif rank_a is not None and case.settings[p.name].connectors and (rank_a, rank_b) != (0, 1):
            size = as_int(a.get("kv_parallel_size")) or 2
            if size == 2 or rank_a > (rank_b or 0):
                yield _wrong_ranks(p, d, rank_a, rank_b, "prefill must be rank 0 and decode rank 1")
        size_a, size_b = as_int(a.get("kv_parallel_size")), as_int(b.get("kv_parallel_size"))
        if size_a != size_b:
            yield _wrong_sizes(p, d, size_a, size_b, "must be equal")
        elif rank_a is not None and rank_b is not None and (size_a or 1) <= max(rank_a, rank_b):
            yield _wrong_sizes(p, d, size_a, size_b, f"must be more than the highest rank, {max(rank_a, rank_b)}")


def _wrong_ranks(p: Side, d: Side, a: int | None, b: int | None, rule: str) -> Finding:
    return found(
        "KVF006",
        f"{p.name}: kv_rank {a if a is not None else 'not set'}; "
        f"{d.name}: kv_rank {b if b is not None else 'not set'}; they {rule}"
        if rule.startswith("must")
        else f"{p.name}: kv_rank {a}; {d.name}: kv_rank {b}; {rule}",
        f'set "kv_rank":{_RIGHT_RANK["prefill"]} on {p.name} and "kv_rank":{_RIGHT_RANK["decode"]} on {d.name}',
    )


def _wrong_sizes(p: Side, d: Side, a: int | None, b: int | None, rule: str) -> Finding:
    return found(
        "KVF007",
        f"{p.name}: kv_parallel_size {a if a is not None else 'not set (1)'}; "
        f"{d.name}: kv_parallel_size {b if b is not None else 'not set (1)'}; it {rule}",
        f'set "kv_parallel_size":2 on {p.name} and on {d.name}',
    )


def rendezvous(case: Case) -> Iterator[Finding]:
    """KVF008: connectors that meet at kv_ip:kv_port must name the same place."""
    for p, d in case.pairs():
        transfers = _both(case, p, d)
        if transfers is None or not set(transfers[0].names) & set(NCCL_CONNECTORS):
            continue
        wrong = []
        for key, default in (("kv_ip", "127.0.0.1"), ("kv_port", 14579)):
            a, b = transfers[0].raw.get(key, default), transfers[1].raw.get(key, default)
            if str(a) != str(b):
                wrong.append((key, a, b))
        for key, a, b in wrong:
            yield found(
                "KVF008",
                f"{p.name}: {key} {a}; {d.name}: {key} {b}; both must name the place where they meet",
                f'set "{key}":{_json(a)} on both sides',
            )


def backends(case: Case) -> Iterator[Finding]:
    """KVF009: NIXL plugins or Mooncake protocols without one in common."""
    for p, d in case.pairs():
        transfers = _both(case, p, d)
        if transfers is None:
            continue
        a, b = transfers[0].extra("backends"), transfers[1].extra("backends")
        mine, theirs = _names(a) or {"UCX"}, _names(b) or {"UCX"}
        if "NixlConnector" in transfers[0].names and "NixlConnector" in transfers[1].names and not mine & theirs:
            seen = f"{p.name}: NIXL backends {', '.join(sorted(mine))}; {d.name}: {', '.join(sorted(theirs))}"
            yield found(
                "KVF009",
                f"{seen}; none is common",
                f'set "backends":{_json(sorted(mine))} in kv_connector_extra_config on both sides',
            )
        a, b = (t.extra("mooncake_protocol") or "rdma" for t in transfers)
        if "MooncakeConnector" in transfers[0].names and "MooncakeConnector" in transfers[1].names and a != b:
            yield found(
                "KVF009",
                f"{p.name}: mooncake_protocol {a}; {d.name}: mooncake_protocol {b}",
                f'set "mooncake_protocol":"{a}" in kv_connector_extra_config on both sides',
            )


def _both(case: Case, p: Side, d: Side) -> tuple[Transfer, Transfer] | None:
    a, b = case.settings[p.name].transfer, case.settings[d.name].transfer
    return (a, b) if a and b else None


def _names(value: Any) -> set[str]:
    return {str(v).upper() for v in value} if isinstance(value, list) else set()


def _json(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ",".join(f'"{v}"' for v in value) + "]"
    return str(value) if isinstance(value, int) else f'"{value}"'
