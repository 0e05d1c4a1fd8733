"""What must be equal on both sides before one byte of KV means the same on each."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from importlib import resources
from pathlib import PurePosixPath

import msgspec

from kvferry.doctor.case import Case, version_tuple
from kvferry.doctor.facts import Side
from kvferry.doctor.findings import Finding, found
from kvferry.doctor.settings import DTYPE_ALIASES, STORE_CONNECTORS, Settings, as_int

_UNSTATED = ("", "auto", "None")
_BLOCK_SIZE = {True: 128, False: 16}
"""vLLM's default tokens a block, on a CPU and on a GPU."""


def models(case: Case) -> Iterator[Finding]:
    """KVF060, KVF061: another model, or another revision of it."""
    for p, d, a, b in _commands(case):
        if a.model and b.model and _model_name(a.model) != _model_name(b.model):
            yield found(
                "KVF060",
                f"{p.name}: model {a.model}; {d.name}: model {b.model}",
                f"start {d.name} with the model {a.model} (or {p.name} with {b.model})",
            )
        elif a.model and b.model and (a.flag("revision") or "main") != (b.flag("revision") or "main"):
            yield _flag(
                "KVF061", p, d, "--revision", a.flag("revision"), b.flag("revision"), a.flag("revision") or "main"
            )


def number_formats(case: Case) -> Iterator[Finding]:
    """KVF062, KVF063: the model's dtype, and the KV cache's."""
    for p, d, a, b in _commands(case):
        mine, theirs = _dtype(a.flag("dtype")), _dtype(b.flag("dtype"))
        if mine and theirs and mine != theirs:
            yield _flag("KVF062", p, d, "--dtype", a.flag("dtype"), b.flag("dtype"), mine)
        cache_a, cache_b = (s.flag("kv-cache-dtype") or "auto" for s in (a, b))
        if cache_a != cache_b and not {_dtype(cache_a) or mine or "?", _dtype(cache_b) or theirs or "?"} <= {
            "bfloat16"
        }:
            yield _flag("KVF063", p, d, "--kv-cache-dtype", cache_a, cache_b, cache_a)


def blocks(case: Case) -> Iterator[Finding]:
    """KVF064: tokens a block."""
    for p, d, a, b in _commands(case):
        mine, theirs = (as_int(s.flag("block-size")) for s in (a, b))
        if mine is None and theirs is None:
            continue
        x, y = mine or _default_block_size(a), theirs or _default_block_size(b)
        remaps = "NixlConnector" in a.connectors and x < y and y % x == 0
        if x != y and not remaps:
            yield _flag("KVF064", p, d, "--block-size", _or_default(mine, x), _or_default(theirs, y), str(x))


_MAP_RANKS = frozenset({"KVFerryConnector", "MooncakeConnector", "MooncakeStoreConnector", "NixlConnector"})
"""Connectors that carry head slices between sides of different tensor-parallel sizes."""


def ranks(case: Case) -> Iterator[Finding]:
    """KVF065: tensor-parallel sizes that do not map to one another, or that the connector cannot map."""
    for p, d, a, b in _commands(case):
        if a.tp == b.tp:
            continue
        divides = max(a.tp, b.tp) % min(a.tp, b.tp) == 0
        maps = not a.connectors or bool(_MAP_RANKS & set(a.connectors))
        old = case.old_mooncake(p) or case.old_mooncake(d)
        if divides and maps and not old:
            continue
        rule = "one must be a multiple of the other" if not divides else "this connector needs equal sizes"
        yield found(
            "KVF065",
            f"{p.name}: tensor-parallel size {a.tp}; {d.name}: tensor-parallel size {b.tp}; {rule}",
            f"start both with --tensor-parallel-size {min(a.tp, b.tp)}"
            + ("" if not maps or old else ", or make one a multiple of the other"),
        )


def layouts(case: Case) -> Iterator[Finding]:
    """KVF066, KVF067: the order inside a block, and the kernel that chose it."""
    for p, d, a, b in _commands(case, need_command=False):
        mine, theirs = (s.environment.get("VLLM_KV_CACHE_LAYOUT") for s in (p, d))
        permutes = any(
            s.transfer is not None and str(s.transfer.raw.get("enable_permute_local_kv", "")).lower() == "true"
            for s in (a, b)
        )
        if (mine or theirs) and mine != theirs and not permutes and ((mine and theirs) or "NHD" in (mine, theirs)):
            yield _flag("KVF066", p, d, "VLLM_KV_CACHE_LAYOUT", mine, theirs, "HND", equals=True)
        elif a.tp != b.tp and "NixlConnector" in a.connectors and mine == theirs == "NHD":
            yield found(
                "KVF066",
                f"{p.name} and {d.name}: VLLM_KV_CACHE_LAYOUT=NHD with tensor-parallel sizes {a.tp} and {b.tp}; "
                "heads can only be split in the layout HND",
                "set VLLM_KV_CACHE_LAYOUT=HND on both sides, or use the same tensor-parallel size",
            )
        kernel_a, kernel_b = _kernel(p, a), _kernel(d, b)
        if kernel_a and kernel_b and kernel_a != kernel_b:
            yield _flag("KVF067", p, d, "VLLM_ATTENTION_BACKEND", kernel_a, kernel_b, kernel_a, equals=True)


def hashing(case: Case) -> Iterator[Finding]:
    """KVF068, KVF069: how prompts become block hashes."""
    for p, d, a, b in _commands(case, need_command=False):
        mine, theirs = a.flag("prefix-caching-hash-algo"), b.flag("prefix-caching-hash-algo")
        if (mine or "sha256") != (theirs or "sha256") and (a.flags or b.flags):
            yield _flag("KVF068", p, d, "--prefix-caching-hash-algo", mine, theirs, mine or "sha256")
        seed_a, seed_b = (s.environment.get("PYTHONHASHSEED") for s in (p, d))
        looks_up = any(set(s.connectors) & set(STORE_CONNECTORS) for s in (a, b)) or not (a.connectors or b.connectors)
        seeded = [mine or "", theirs or ""]
        if "PYTHONHASHSEED" in p.unknown | d.unknown:
            continue
        if seed_a != seed_b:
            known = seed_a or seed_b or "0"
            yield found(
                "KVF069",
                f"{p.name}: PYTHONHASHSEED {seed_a or 'not set'}; {d.name}: PYTHONHASHSEED {seed_b or 'not set'}",
                f"set PYTHONHASHSEED={known} on every instance",
                severity=None if looks_up else "warning",
            )
        elif seed_a in (None, "random") and looks_up and any("xxhash" in s or s == "builtin" for s in seeded):
            yield found(
                "KVF069",
                f"{p.name} and {d.name}: --prefix-caching-hash-algo {mine} seeds itself at random in each process, "
                "and PYTHONHASHSEED is not set",
                "set PYTHONHASHSEED=0 on every instance, or use --prefix-caching-hash-algo sha256",
            )


def versions(case: Case) -> Iterator[Finding]:
    """KVF070, KVF071: versions that differ, and versions that are known not to work together."""
    for p, d in case.pairs():
        for name in ("vllm", "kvferry", "nixl", "mooncake"):
            a, b = p.versions.get(name), d.versions.get(name)
            if a and b and a != b:
                yield found(
                    "KVF070",
                    f"{p.name}: {name} {a}; {d.name}: {name} {b}",
                    f"install {name} {max(a, b, key=version_tuple)} on both sides and start them again",
                )
    for side in case.facts.sides:
        for pair in known_bad():
            if pair.applies(side, case.settings[side.name]):
                have = ", ".join(f"{n} {side.versions[n]}" for n in sorted(pair.versions) if n in side.versions)
                yield found("KVF071", f"{side.name}: {have}: {pair.what}", pair.fix)


def speculation(case: Case) -> Iterator[Finding]:
    """KVF072: speculative decoding that adds KV layers on one side only."""
    for p, d, a, b in _commands(case):
        mine, theirs = _draft(a), _draft(b)
        if mine != theirs:
            yield _flag(
                "KVF072",
                p,
                d,
                "--speculative-config",
                mine or None,
                theirs or None,
                a.flag("speculative-config") or "…",
            )


class KnownBad(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Versions that do not work together. A bound is `==X`, `<X`, `<=X`, `>X` or `>=X`; several joined by commas."""

    versions: dict[str, str]
    what: str
    fix: str
    connector: str = ""
    unless: str = ""

    def applies(self, side: Side, settings: Settings) -> bool:
        """Whether a side has these versions (and this connector, where one is named)."""
        name, _, value = self.unless.partition("=")
        mended = bool(name) and side.environment.get(name) == value
        if mended or (self.connector and self.connector not in settings.connectors):
            return False
        return all(
            n in side.versions and all(_within(side.versions[n], bound) for bound in bounds.split(","))
            for n, bounds in self.versions.items()
        )


@cache
def known_bad() -> tuple[KnownBad, ...]:
    """The table in known_bad.toml."""
    text = resources.files("kvferry.doctor").joinpath("known_bad.toml").read_text(encoding="utf-8")
    return tuple(msgspec.convert(tomllib.loads(text)["pair"], list[KnownBad]))


_COMPARE: dict[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
    "==": lambda a, b: a == b,
    "<=": lambda a, b: a <= b,
    ">=": lambda a, b: a >= b,
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
}


def _within(version: str, bound: str) -> bool:
    bound = bound.strip()
    operator = next(o for o in _COMPARE if bound.startswith(o))
    mine, limit = version_tuple(version), version_tuple(bound[len(operator) :].strip())
    width = max(len(mine), len(limit))
    return _COMPARE[operator](mine + (0,) * (width - len(mine)), limit + (0,) * (width - len(limit)))


def _commands(case: Case, need_command: bool = True) -> Iterator[tuple[Side, Side, Settings, Settings]]:
    for p, d in case.pairs():
        if not need_command or (p.command and d.command):
            yield p, d, case.settings[p.name], case.settings[d.name]


def _flag(
    finding_id: str, p: Side, d: Side, name: str, a: str | None, b: str | None, right: str, *, equals: bool = False
) -> Finding:
    joint = "=" if equals else " "
    return found(
        finding_id,
        f"{p.name}: {name} {a or 'not set'}; {d.name}: {name} {b or 'not set'}",
        f"set {name}{joint}{right} on both sides",
    )


def _default_block_size(settings: Settings) -> int:
    return _BLOCK_SIZE[settings.cpu and settings.engine != "kvferry"]


def _or_default(stated: int | None, value: int) -> str:
    return str(value) if stated is not None else f"not set (default {value})"


def _model_name(model: str) -> str:
    """A local path and a hub name of the same model end alike."""
    return PurePosixPath(model.rstrip("/")).name.lower()


def _dtype(text: str | None) -> str | None:
    return None if text is None or text in _UNSTATED else DTYPE_ALIASES.get(text, text)


def _kernel(side: Side, settings: Settings) -> str | None:
    return settings.flag("attention-backend") or side.environment.get("VLLM_ATTENTION_BACKEND")


def _draft(settings: Settings) -> str:
    """The drafting method and model where they add KV layers; n-gram and suffix methods do not."""
    text = settings.flag("speculative-config")
    if text is None:
        return ""
    try:
        config = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return text
    method = str(config.get("method", "")) if isinstance(config, dict) else text
    if method in ("ngram", "ngram_gpu", "suffix"):
        return ""
    return f"{method} {config.get('model', '')}".strip() if isinstance(config, dict) else text
