"""From what the user named to facts. The only place where the doctor's inputs meet its I/O."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from kvferry.addresses import is_wildcard
from kvferry.config import Settings, load
from kvferry.doctor.case import Case
from kvferry.doctor.facts import Facts, PoolAnswer, Side, SideRole
from kvferry.doctor.inputs import read_config, read_side
from kvferry.doctor.processes import look_at_host
from kvferry.doctor.reach import gather_clocks, gather_prefix_counts, gather_reaches, gather_resolutions
from kvferry.errors import ConfigError

_DISK_VARIABLES = ("MOONCAKE_OFFLOAD_FILE_STORAGE_PATH", "LMCACHE_LOCAL_DISK", "KVFERRY_POOL_DISK")


def gather(
    *,
    config: str | None = None,
    prefill: Sequence[str] = (),
    decode: Sequence[str] = (),
    offline: bool = False,
) -> Facts:
    """Read every input and look at this machine.

    Args:
        offline: make no connection.
    Raises:
        ConfigError: an input cannot be used; the message names it and what was expected.
    """
    sides = (*_sides("prefill", prefill), *_sides("decode", decode))
    facts = Facts(sides=sides)
    if config is not None:
        mooncake, kvferry = read_config(config)
        if mooncake is not None:
            facts = msgspec.structs.replace(facts, mooncake=mooncake, mooncake_path=config)
        elif kvferry is not None:
            settings, error = _settings(kvferry, config)
            facts = msgspec.structs.replace(facts, kvferry=settings, kvferry_path=config, kvferry_error=error)
    facts = msgspec.structs.replace(
        facts, sides=(*facts.sides, *_described(facts)), host=look_at_host(_directories(sides))
    )
    facts = msgspec.structs.replace(facts, resolutions=gather_resolutions(Case(facts)))
    if offline:
        return facts
    case = Case(facts)
    urls = _urls(case)
    decoding = {
        s.name: urls[s.name]
        for s in facts.decodes
        if s.name in urls and case.settings[s.name].engine == "vllm" and case.settings[s.name].hands_over
    }
    return msgspec.structs.replace(
        facts,
        reaches=gather_reaches(case),
        clocks=gather_clocks(urls),
        prefix_counts=gather_prefix_counts(decoding),
        pool=_pool(case),
    )


def _pool(case: Case) -> tuple[PoolAnswer, ...]:
    own = case.facts.kvferry
    if not any(case.settings[s.name].flag("pool") for s in case.facts.sides) and not (own and own.engine.pool):
        return ()
    from kvferry.doctor.pool import gather_pool  # Nobody else needs the transfer engine for an examination.

    return gather_pool(case)


def _sides(role: SideRole, specs: Sequence[str]) -> list[Side]:
    names = [role if len(specs) == 1 else f"{role} {i}" for i in range(1, len(specs) + 1)]
    return [read_side(role, spec, name) for spec, name in zip(specs, names, strict=True)]


def _settings(text: str, path: str) -> tuple[Settings | None, str | None]:
    try:
        return load(text, toml_source=Path(path).name), None
    except ConfigError as e:
        return None, e.message


def _described(facts: Facts) -> list[Side]:
    """Sides that only a mooncake.json of the first kind tells of, by prefill_url and decode_url."""
    roles: tuple[tuple[SideRole, str], ...] = (("prefill", "prefill_url"), ("decode", "decode_url"))
    config = facts.mooncake or {}
    return [
        Side(role, role, f"{key} of {facts.mooncake_path}")
        for role, key in roles
        if config.get(key) and not any(s.role == role for s in facts.sides)
    ]


def _directories(sides: Sequence[Side]) -> tuple[str, ...]:
    paths = [
        side.environment[v].removeprefix("file://") for side in sides for v in _DISK_VARIABLES if v in side.environment
    ]
    for side in sides:
        root = (side.mooncake or {}).get("storage_root_dir")
        if isinstance(root, str) and root:
            paths.append(root)
    return tuple(dict.fromkeys(paths))


def _urls(case: Case) -> dict[str, str]:
    """The HTTP server of each side that runs here, for its clock."""
    urls = {}
    for side in case.facts.sides:
        port = case.settings[side.name].http_port
        if side.process is None or port is None or side.process.netns != case.facts.host.netns:
            continue
        listener = next((x for x in side.process.listeners if x.port == port), None)
        if listener is not None and side.process.status not in ("stopped", "zombie"):
            host = "127.0.0.1" if is_wildcard(listener.address) else listener.address
            urls[side.name] = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    return urls
