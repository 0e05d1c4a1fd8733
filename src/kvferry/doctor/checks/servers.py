"""mooncake.json and the servers it names: metadata (etcd, Redis, HTTP) and the store's master."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from kvferry.doctor.case import Case
from kvferry.doctor.facts import Reach, Side
from kvferry.doctor.findings import Finding, found

OLD_KEYS = ("prefill_url", "decode_url", "metadata_server", "metadata_backend", "protocol", "device_name")
STORE_KEYS = (
    "local_hostname",
    "metadata_server",
    "master_server_address",
    "protocol",
    "device_name",
    "global_segment_size",
    "local_buffer_size",
)
KNOWN_KEYS = (
    *OLD_KEYS,
    *STORE_KEYS,
    "mode",
    "enable_offload",
    "tenant_id",
    "storage_root_dir",
    "transfer_timeout",
    "use_ascend_direct",
)
_SHARED_KEYS = ("prefill_url", "decode_url", "metadata_server", "master_server_address", "protocol", "tenant_id")
_START = {
    "etcd": "etcd --listen-client-urls http://0.0.0.0:{port} --advertise-client-urls http://{host}:{port}",
    "redis": "redis-server --bind {host} --port {port}",
    "http": "mooncake_http_metadata_server --port {port}",
    "master": "mooncake_master --port {port}",
}


def files(case: Case) -> Iterator[Finding]:
    """KVF055, KVF056: the file that MOONCAKE_CONFIG_PATH names is missing, unreadable or incomplete."""
    for side in case.facts.sides:
        settings = case.settings[side.name]
        if side.mooncake_error:
            yield found(
                "KVF056",
                f"{side.name}: MOONCAKE_CONFIG_PATH={side.mooncake_path}: {side.mooncake_error}",
                f"set MOONCAKE_CONFIG_PATH of {side.name} to the mooncake.json that both sides share",
            )
        needs = "MooncakeStoreConnector" in settings.connectors or (
            "MooncakeConnector" in settings.connectors
            and settings.transfer is not None
            and "kv_rank" in settings.transfer.raw
        )
        unnamed = needs and side.mooncake_path is None and "MOONCAKE_MASTER" not in side.environment
        if unnamed and (case.facts.mooncake is None or any(s.mooncake_path for s in case.facts.sides)):
            yield found(
                "KVF056",
                f"{side.name}: MOONCAKE_CONFIG_PATH is not set, and {', '.join(settings.connectors)} reads it",
                f"set MOONCAKE_CONFIG_PATH of {side.name} to the mooncake.json that both sides share",
            )
    for path, config in case.configs:
        yield from _incomplete(path, config)


def _incomplete(path: str, config: dict[str, Any]) -> Iterator[Finding]:
    old = "prefill_url" in config or "decode_url" in config
    needed = ("prefill_url", "decode_url", "metadata_server") if old else ("metadata_server",)
    typos = {}
    for key in config:
        near = difflib.get_close_matches(key, KNOWN_KEYS, 1, 0.8)
        if key not in KNOWN_KEYS and near and near[0] not in config:
            typos[near[0]] = key
    for right, wrong in typos.items():
        yield found("KVF055", f"{path}: has the key {wrong!r}, which Mooncake does not read", f"rename it to {right!r}")
    for key in needed:
        if not config.get(key) and key not in typos:
            yield found("KVF055", f"{path}: {key} is {'empty' if key in config else 'missing'}", f"set {key} in {path}")
    protocol = config.get("protocol", "tcp")
    if protocol not in (
        "tcp",
        "rdma",
        "efa",
        "ascend",
        "ascend_direct",
        "nvlink",
        "nvlink_intra",
        "cxl",
        "barex",
        "hip",
    ):
        yield found("KVF055", f"{path}: protocol is {protocol!r}", f'set "protocol":"rdma" or "tcp" in {path}')
    for key in ("prefill_url", "decode_url"):
        value = config.get(key)
        if isinstance(value, str) and value and not value.rpartition(":")[2].isdecimal():
            yield found(
                "KVF055", f"{path}: {key} is {value!r}, without a port", f'set "{key}":"{value}:13003" in {path}'
            )


def differing_files(case: Case) -> Iterator[Finding]:
    """KVF054: two mooncake.json that must say the same do not."""
    for p, d in case.pairs():
        a, b = p.mooncake, d.mooncake
        if a is None or b is None:
            continue
        wrong = [k for k in _SHARED_KEYS if a.get(k) != b.get(k)]
        if wrong:
            yield found(
                "KVF054",
                "; ".join(
                    f"{s.name} ({s.mooncake_path}): " + ", ".join(f"{k} {c.get(k, 'not set')}" for k in wrong)
                    for s, c in ((p, a), (d, b))
                ),
                f"give both sides the same {', '.join(wrong)}, best by copying {p.mooncake_path} to {d.name}",
            )


def servers(case: Case) -> Iterator[Finding]:
    """KVF050 to KVF053: a server that is not there, is stopped, or is another one."""
    for reach in case.facts.reaches:
        kind, _, what = reach.purpose.partition(" ")
        if kind not in _START or not (case.inside or reach.outcome == "refused"):
            continue
        where = f"{reach.host}:{reach.port}"
        finding_id = "KVF053" if kind == "master" else "KVF050"
        start = _START[kind].format(host=reach.host, port=reach.port)
        if reach.outcome != "open":
            yield found(
                finding_id,
                f"{reach.seen_from}: {what} {where} {_absence(reach)}",
                f"start it ({start}), or correct {what} in the config",
            )
        elif reach.stopped_owner:
            yield found(
                "KVF051",
                f"{reach.seen_from}: {what} {where} takes connections but does not answer: "
                f"{reach.stopped_owner} is stopped",
                f"continue it (kill -CONT {reach.stopped_owner.rpartition(' ')[2].rstrip(')')}) or start it again",
            )
        elif reach.answer == "silent":
            yield found(
                "KVF051",
                f"{reach.seen_from}: {what} {where} takes connections, and questions to {kind} are not answered",
                f"look at what listens there: it hangs, or its container is paused; start it again ({start})",
            )
        elif reach.answer not in ("", "ok", "closed"):
            yield found(
                "KVF052",
                f"{reach.seen_from}: {what} {where} should be {kind}, but it answered {reach.answer!r}",
                f"correct {what}, or start {kind} there ({start})",
            )


def _absence(reach: Reach) -> str:
    return {
        "refused": "refuses connections: nothing listens there",
        "timeout": "does not answer (connection timed out)",
        "unreachable": "cannot be reached (no route)",
        "unresolved": "does not resolve to an address",
    }.get(reach.outcome, reach.outcome)


def protocols(case: Case) -> Iterator[Finding]:
    """KVF057, KVF058, KVF059: RDMA asked for where there is none, left unused where there is, or the wrong device."""
    devices = case.facts.host.rdma_devices
    asked: dict[str, tuple[str, str, bool]] = {}
    for path, config in case.configs:
        old = "prefill_url" in config
        asked[path] = (str(config.get("protocol", "tcp")), str(config.get("device_name") or ""), old)
    for side in case.facts.sides:
        transfer = case.settings[side.name].transfer
        if transfer and "MooncakeConnector" in transfer.names and not case.old_mooncake(side):
            protocol = transfer.extra("mooncake_protocol")
            if protocol or side.process:
                where = f"{side.name}'s --kv-transfer-config"
                asked[where] = (str(protocol or "rdma"), str(transfer.extra("device_name") or ""), False)
    for where, (protocol, names, old) in asked.items():
        if protocol == "rdma":
            yield from _rdma(case, where, names, devices, old)
        elif protocol == "tcp" and case.inside and (devices or _nvlinks(case)):
            there = f"the RDMA devices {', '.join(devices)}" if devices else "NVLink between the GPUs"
            yield found(
                "KVF057",
                f"{where}: protocol tcp, while this node has {there}",
                'set "protocol":"rdma" and "device_name":"' + ",".join(devices) + '"'
                if devices
                else 'set "protocol":"nvlink_intra", or use a connector that moves KV over CUDA IPC',
            )


def _rdma(case: Case, where: str, names: str, devices: tuple[str, ...], old: bool) -> Iterator[Finding]:
    listed = names.split(",") if names else []
    if any(n != n.strip() for n in listed):
        yield found(
            "KVF059",
            f"{where}: device_name {names!r} has spaces",
            f'set "device_name":"{",".join(n.strip() for n in listed)}"',
        )
    elif not case.inside:
        return
    elif not devices:
        yield found(
            "KVF058",
            f"{where}: protocol rdma, but this node has no active RDMA device",
            'set "protocol":"tcp" and "device_name":"" on both sides, or bring the RDMA port up (ibv_devinfo)',
        )
    elif unknown := [n for n in listed if n and n not in devices]:
        yield found(
            "KVF059",
            f"{where}: device_name {names}, but the active RDMA devices here are {', '.join(devices)}",
            f'set "device_name":"{",".join(devices)}" ({", ".join(unknown)} is not among them)',
        )
    elif old and not listed:
        yield found(
            "KVF059",
            f"{where}: protocol rdma without a device_name",
            f'set "device_name":"{devices[0]}"',
        )


def _nvlinks(case: Case) -> bool:
    gpus = case.facts.host.gpus or ()
    sides: list[Side] = [s for s in case.facts.sides if s.process]
    return len(sides) >= 2 and sum(1 for g in gpus if g.num_nvlinks) >= 2
