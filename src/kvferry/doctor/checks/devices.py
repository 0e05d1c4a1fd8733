"""GPUs and network interfaces: which each side may use, and whether they can meet over them."""

from __future__ import annotations

from collections.abc import Iterator

from kvferry.doctor.case import Case
from kvferry.doctor.facts import Side
from kvferry.doctor.findings import Finding, found

SOCKET_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
_REMOTE_TRANSPORTS = {
    "tcp",
    "rc",
    "rc_v",
    "rc_x",
    "rc_mlx5",
    "rc_verbs",
    "dc",
    "dc_x",
    "ud",
    "ud_v",
    "ud_x",
    "ib",
    "srd",
}
_SHARED_TRANSPORTS = {"sm", "shm", "posix", "sysv", "cma", "knem", "xpmem", "mm"}
_DEVICE_TRANSPORTS = {"cuda_ipc", "cuda", "gdr_copy", "rocm", "rocm_ipc"}
_ALIASES = {"rc_v": "rc", "rc_x": "rc", "rc_mlx5": "rc", "rc_verbs": "rc", "ud_v": "ud", "ud_x": "ud", "dc_x": "dc"}


def visible(side: Side) -> list[str] | None:
    """The tokens of CUDA_VISIBLE_DEVICES, None where it is not set."""
    text = side.environment.get("CUDA_VISIBLE_DEVICES")
    return None if text is None else [t.strip() for t in text.split(",") if t.strip()]


def gpu_lists(case: Case) -> Iterator[Finding]:
    """KVF041, KVF042, KVF043: a list that is empty, invalid, or too short for the ranks."""
    gpus = case.facts.host.gpus
    for side in case.facts.sides:
        tokens, settings = visible(side), case.settings[side.name]
        if tokens is None or settings.cpu:
            continue
        shown = side.environment["CUDA_VISIBLE_DEVICES"]
        ranks = settings.tp * settings.pp * settings.dp
        if not tokens or tokens[0] == "-1" or tokens == ["NoDevFiles"]:
            yield found(
                "KVF042",
                f"{side.name}: CUDA_VISIBLE_DEVICES={shown!r} shows it no GPU",
                f"set CUDA_VISIBLE_DEVICES of {side.name} to {ranks} GPU{'s' if ranks > 1 else ''} "
                "that the other side does not use",
            )
            continue
        bad = _invalid(tokens, len(gpus) if gpus is not None and _here(case, side) else None)
        if bad:
            yield found(
                "KVF041",
                f"{side.name}: CUDA_VISIBLE_DEVICES={shown!r}: {bad}; CUDA stops reading there",
                f"set CUDA_VISIBLE_DEVICES of {side.name} to distinct GPU numbers or UUIDs that exist",
            )
        elif len(tokens) < settings.tp * settings.pp and settings.dp == 1:
            yield found(
                "KVF043",
                f"{side.name}: {len(tokens)} GPU{'s' if len(tokens) > 1 else ''} visible ({shown}), "
                f"tensor-parallel {settings.tp} x pipeline-parallel {settings.pp} needs {settings.tp * settings.pp}",
                f"show {side.name} {settings.tp * settings.pp} GPUs, or lower --tensor-parallel-size to {len(tokens)}",
            )


def _invalid(tokens: list[str], num_gpus: int | None) -> str:
    for i, token in enumerate(tokens):
        named = token.startswith(("GPU-", "MIG-"))
        if not named and not token.isdecimal():
            return f"{token!r} is no GPU number and no UUID"
        if token in tokens[:i]:
            return f"{token} is listed twice"
        if not named and num_gpus is not None and int(token) >= num_gpus:
            return f"there is no GPU {token}, this machine has {num_gpus}"
    return ""


def gpu_overlap(case: Case) -> Iterator[Finding]:
    """KVF040: one GPU given to two instances of one machine."""
    for a, b in case.any_two():
        if case.settings[a.name].cpu or case.settings[b.name].cpu or not _same_machine(case, a, b):
            continue
        mine, theirs = visible(a), visible(b)
        if mine == [] or theirs == [] or _planned_sharing(case, a, b) or _containers_apart(a, b):
            continue
        if mine is None and theirs is None:
            gpus = case.facts.host.gpus
            together = bool(gpus) and _here(case, a) and all(case.settings[s.name].engine == "vllm" for s in (a, b))
            common = [str(g.index) for g in gpus or ()] if together else []
        elif mine is None or theirs is None:
            known = mine or theirs or []
            common = known if any(case.settings[s.name].engine == "vllm" for s in (a, b)) else []
        else:
            common = [t for t in mine if t in theirs]
        if common:
            yield found(
                "KVF040",
                f"{a.name}: CUDA_VISIBLE_DEVICES={_shown(a)}; {b.name}: CUDA_VISIBLE_DEVICES={_shown(b)}; "
                f"both use GPU {', '.join(common)} of one machine",
                f"give {b.name} other GPUs, such as CUDA_VISIBLE_DEVICES={_others(mine or common, theirs or common)}",
            )


def _containers_apart(a: Side, b: Side) -> bool:
    """Whether two containers were given different GPUs, which each then counts from 0."""
    lists = [s.environment.get("NVIDIA_VISIBLE_DEVICES", "all") for s in (a, b)]
    mine, theirs = (set(x.split(",")) for x in lists)
    return not ({"all", "void", "none", ""} & (mine | theirs)) and not mine & theirs


def gpu_strangers(case: Case) -> Iterator[Finding]:
    """KVF044: a process that is no instance of this examination holds memory on an instance's GPU."""
    known = {pid for s in case.facts.sides if s.process for pid in s.process.pids}
    for side in case.facts.sides:
        if side.process is None or case.settings[side.name].cpu:
            continue
        tokens = visible(side)
        for gpu in case.facts.host.gpus or ():
            if tokens is not None and str(gpu.index) not in tokens and gpu.uuid not in tokens:
                continue
            strangers = [name for pid, name in gpu.holders.items() if pid not in known]
            if strangers and not _containers_hide(side):
                yield found(
                    "KVF044",
                    f"{side.name}: its GPU {gpu.index} ({gpu.name}) is also held by {', '.join(strangers)}",
                    f"end {', '.join(strangers)} if it is left over, or give {side.name} another GPU",
                )


def _containers_hide(side: Side) -> bool:
    """Whether the instance counts its GPUs in a container, by numbers that are not this machine's."""
    return side.environment.get("NVIDIA_VISIBLE_DEVICES", "all") != "all"


def _shown(side: Side) -> str:
    return side.environment.get("CUDA_VISIBLE_DEVICES", "not set (all)")


def _others(mine: list[str], theirs: list[str]) -> str:
    numbers = [int(t) for t in [*mine, *theirs] if t.isdecimal()]
    start = max(numbers, default=0) + 1
    return ",".join(str(start + i) for i in range(len(theirs)))


def _planned_sharing(case: Case, a: Side, b: Side) -> bool:
    """Two instances that were each given a part of one GPU's memory share it on purpose."""
    parts = []
    for s in (a, b):
        try:
            parts.append(float(case.settings[s.name].flag("gpu-memory-utilization") or "1"))
        except ValueError:
            return False
    return sum(parts) <= 1.0


def _same_machine(case: Case, a: Side, b: Side) -> bool:
    if a.process and b.process:
        return True
    same = case.same_node(a, b)
    if same is None:
        # Nothing tells them apart: one node, unless each says a host of its own.
        hosts = [s.environment.get("VLLM_HOST_IP") for s in (a, b)]
        p, d = case.old_url("prefill_url"), case.old_url("decode_url")
        if p and d:
            return p[0] == d[0]
        return (hosts[0] is not None and hosts[0] == hosts[1]) or _unplaced(case, a, b)
    return same


def _unplaced(case: Case, a: Side, b: Side) -> bool:
    """Env files that name GPUs but no node at all describe one machine, if ports tell them apart or nothing does."""
    modern = any(case.settings[s.name].engine == "vllm" for s in (a, b))
    return not any(case.addresses[s.name] or s.environment.get("VLLM_HOST_IP") for s in (a, b)) and not (
        modern and case.settings[a.name].http_port == case.settings[b.name].http_port
    )


def _here(case: Case, side: Side) -> bool:
    stated = case.addresses[side.name].values()
    return side.process is not None or all(case.is_ours(h) for h in stated)


def socket_interfaces(case: Case) -> Iterator[Finding]:
    """KVF045, KVF046: GLOO/NCCL interface variables that disagree or name nothing."""
    missing: set[tuple[str, str]] = set()
    for side in case.facts.sides:
        if side.process is None and not _known_here(case, side):
            continue
        there = side.process.interfaces if side.process else case.facts.host.interfaces
        if "?" in there:
            continue
        for variable in SOCKET_VARIABLES:
            name = side.environment.get(variable)
            if name and there and not _matches(variable, name, tuple(there)):
                missing.add((side.name, variable))
                yield found(
                    "KVF046",
                    f"{side.name}: {variable}={name}, but its node has the interfaces {', '.join(sorted(there))}",
                    f"set {variable} of {side.name} to one of them",
                )
    for p, d in case.pairs():
        for variable in SOCKET_VARIABLES:
            a, b = p.environment.get(variable), d.environment.get(variable)
            if a == b or (p.name, variable) in missing or (d.name, variable) in missing:
                continue
            if case.spans_nodes and a and b and "lo" not in (a, b):
                continue  # Interfaces of two machines may well have different names.
            yield found(
                "KVF045",
                f"{p.name}: {variable}={a or 'not set'}; {d.name}: {variable}={b or 'not set'}",
                f"set {variable} on both sides to the interface of the network that they share"
                + (f" ({a or b})" if "lo" not in (a, b) else ""),
                severity=None if a and b else "warning",
            )


def _known_here(case: Case, side: Side) -> bool:
    stated = list(case.addresses[side.name].values()) + [
        side.environment[k] for k in ("VLLM_HOST_IP",) if k in side.environment
    ]
    return bool(stated) and all(case.is_ours(h) for h in stated)


def _matches(variable: str, pattern: str, names: tuple[str, ...]) -> bool:
    """NCCL takes prefixes, `=` for exact names and `^` to exclude; Gloo takes names, separated by commas."""
    if variable != "NCCL_SOCKET_IFNAME":
        return all(p in names for p in pattern.split(","))
    if pattern.startswith("^"):
        return True
    exact = pattern.startswith("=")
    return any((n == p if exact else n.startswith(p)) for p in pattern.lstrip("=").split(",") for n in names)


def ucx(case: Case) -> Iterator[Finding]:
    """KVF047, KVF048: UCX transports and devices over which the two sides cannot meet."""
    for p, d in case.pairs():
        a, b = _transports(p), _transports(d)
        apart = case.same_node(p, d) is False
        if a is not None and b is not None and not _meet(a, b, apart):
            yield found(
                "KVF047",
                f"{p.name}: UCX_TLS={p.environment['UCX_TLS']}; {d.name}: UCX_TLS={d.environment['UCX_TLS']}; "
                + ("nothing in common that crosses nodes" if apart else "no transport in common"),
                "set the same UCX_TLS on both sides, with one that carries bytes between processes "
                "(such as UCX_TLS=rc,cuda_copy,cuda_ipc,sm,self or UCX_TLS=tcp,cuda_copy,sm,self), or UCX_TLS=all",
            )
        else:
            for side, mine in ((p, a), (d, b)):
                if mine is not None and not _meet(mine, mine, apart):
                    yield found(
                        "KVF047",
                        f"{side.name}: UCX_TLS={side.environment['UCX_TLS']} names no transport that "
                        + ("crosses nodes" if apart else "carries bytes to another process"),
                        f"add one to UCX_TLS of {side.name} (rc or tcp), or set UCX_TLS=all",
                    )
        kinds = [_device_kind(s.environment.get("UCX_NET_DEVICES")) for s in (p, d)]
        if None not in kinds and kinds[0] != kinds[1]:
            yield found(
                "KVF048",
                f"{p.name}: UCX_NET_DEVICES={p.environment['UCX_NET_DEVICES']}; "
                f"{d.name}: UCX_NET_DEVICES={d.environment['UCX_NET_DEVICES']}",
                "give both sides devices of one network (RDMA devices on both, or the same kind of interface), "
                "or UCX_NET_DEVICES=all",
            )


def _transports(side: Side) -> set[str] | None:
    """What UCX_TLS allows, None where it does not restrict."""
    text = side.environment.get("UCX_TLS")
    if not text or text == "all" or text.startswith("^"):
        return None
    return {_ALIASES.get(t.strip(), t.strip()) for t in text.split(",") if t.strip() and not t.strip().startswith("^")}


def _meet(a: set[str], b: set[str], apart: bool) -> bool:
    kinds = [_REMOTE_TRANSPORTS] if apart else [_REMOTE_TRANSPORTS, _SHARED_TRANSPORTS, _DEVICE_TRANSPORTS]
    common = a & b
    if "ib" in a or "ib" in b:
        common |= {t for t in (a | b) & {"rc", "ud", "dc"} if ("ib" in a and t in b) or ("ib" in b and t in a)}
    return any(common & kind for kind in kinds)


def _device_kind(text: str | None) -> str | None:
    """`rdma`, `lo` or `ethernet`; None where every device is allowed or the list is mixed."""
    if not text or text == "all":
        return None
    kinds = {
        "rdma" if ":" in name or name.startswith("mlx") else "lo" if name == "lo" else "ethernet"
        for name in (t.strip() for t in text.split(","))
    }
    return kinds.pop() if len(kinds) == 1 else None
