"""Reading the tree: defaults, file, environment, flags; converting and checking every value with its source."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import stat
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from kvferry.addresses import is_loopback
from kvferry.config._flags import FlagValue, flags_of
from kvferry.config._tree import ENVIRONMENT_PREFIX, SECTIONS, SETTINGS, Setting, Settings, setting_text
from kvferry.config._units import parse_size, parse_time
from kvferry.errors import ConfigError

CONFIG_FILE = "kvferry.toml"
CONFIG_VARIABLE = "KVFERRY_CONFIG"
"""Environment variable with the path of the settings file; the empty string means that none is read."""

MIN_SECRET_BYTES = 16

FOREIGN_PREFIXES = ("KVFERRY_TEST_", "KVFERRY_BENCH_")
"""Variables that belong to tests and benchmarks, and that `load` leaves alone."""


def load(
    toml_text: str | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, FlagValue] | None = None,
    *,
    toml_source: str = CONFIG_FILE,
) -> Settings:
    """The tree that these sources give, later ones first: flags over environment over file over defaults.

    Args:
        toml_text: content of the settings file, None where there is none.
        environ: variables; those that do not begin with `KVFERRY_` are ignored.
        flags: by dotted name (`router.ttl_s`), as `flags_of` returns them.
    Raises:
        ConfigError: an unknown key or a bad value; names the key, its source and the nearest right one.
    """
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    origin: dict[str, str] = {}
    given = (*_from_toml(toml_text, toml_source), *_from_environ(environ or {}), *_from_flags(flags or {}))
    for setting, raw, source in given:
        values[setting.section][setting.key] = _convert(setting, raw, source)
        origin[setting.name] = source
    settings = msgspec.convert(values, Settings)
    _check_addresses(settings, origin)
    _check_together(settings, origin)
    return settings


def load_settings(args: argparse.Namespace | None = None) -> Settings:
    """`load` with the file, the environment and the flags of this process.

    The file is `KVFERRY_CONFIG` if set (empty: none), else `kvferry.toml` in the working directory if there is one.

    Raises:
        ConfigError: as `load`, or the named file cannot be read.
    """
    path = os.environ.get(CONFIG_VARIABLE, CONFIG_FILE if Path(CONFIG_FILE).is_file() else "")
    text = None
    if path:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"settings file {path} cannot be read: {error}; correct {CONFIG_VARIABLE}") from error
    return load(text, os.environ, flags_of(args) if args is not None else None, toml_source=path or CONFIG_FILE)


def to_environ(settings: Settings) -> dict[str, str]:
    """Variables that make `load` give these settings again, in a process that reads no settings file.

    Only what differs from the defaults is written. The way a parent hands its tree to the processes it starts.
    """
    variables = {CONFIG_VARIABLE: ""}
    for name, setting in SETTINGS.items():
        value = getattr(getattr(settings, setting.section), setting.key)
        if value != setting.default:
            variables[SETTINGS[name].variable] = setting_text(value)
    return variables


def cluster_secret(settings: Settings) -> bytes | None:
    """The cluster's secret from `cluster.secret` or the file `cluster.secret_file`; None where neither is set.

    Raises:
        ConfigError: the file cannot be read, is too short, or others than its owner may read it.
    """
    if settings.cluster.secret is not None:
        return settings.cluster.secret.encode()
    if settings.cluster.secret_file is None:
        return None
    path = Path(settings.cluster.secret_file)
    try:
        mode = path.stat().st_mode
        secret = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"cluster.secret_file: {path} cannot be read: {error}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(
            f"cluster.secret_file: {path} has mode {stat.S_IMODE(mode):04o}, so others may read it; do chmod 600 {path}"
        )
    if len(secret) < MIN_SECRET_BYTES:
        seen = f"holds {len(secret)} bytes" if secret else "is empty"
        raise ConfigError(f"cluster.secret_file: {path} {seen}; write a random text of {MIN_SECRET_BYTES} or more")
    return secret


def _from_toml(text: str | None, path: str) -> Iterator[tuple[Setting, Any, str]]:
    try:
        tree = tomllib.loads(text or "")
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is no TOML: {error}") from error
    for section, keys in tree.items():
        if section not in SECTIONS:
            raise ConfigError(f"{path}: section [{section}] is unknown{_nearest(section, SECTIONS)}")
        if not isinstance(keys, dict):
            raise ConfigError(f"{path}: {section} is a section; write its keys below [{section}]")
        for key, value in keys.items():
            name = f"{section}.{key}"
            if name not in SETTINGS:
                raise ConfigError(f"{path}: key {name} is unknown{_nearest(name, SETTINGS)}")
            yield SETTINGS[name], value, f"{path}: {name}"


def _from_environ(environ: Mapping[str, str]) -> Iterator[tuple[Setting, Any, str]]:
    by_variable = {setting.variable: setting for setting in SETTINGS.values()}
    for variable, value in environ.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable.startswith(FOREIGN_PREFIXES):
            continue
        if variable == CONFIG_VARIABLE:
            continue
        if variable not in by_variable:
            raise ConfigError(f"environment variable {variable} is unknown{_nearest(variable, by_variable)}")
        yield by_variable[variable], value, f"environment variable {variable}"


def _from_flags(flags: Mapping[str, FlagValue]) -> Iterator[tuple[Setting, Any, str]]:
    for name, (flag, value) in flags.items():
        if name not in SETTINGS:
            raise ConfigError(f"flag {flag}: setting {name} is unknown{_nearest(name, SETTINGS)}")
        yield SETTINGS[name], value, f"flag {flag}"


def _convert(setting: Setting, raw: Any, source: str) -> Any:
    """The value that a source gave, in the field's own type, checked against its bounds."""
    shown = "(hidden)" if setting.name == "cluster.secret" else repr(raw)
    try:
        return msgspec.convert(_parse(setting, raw) if isinstance(raw, str) else raw, setting.annotation)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source} = {shown}: {_plain(str(error))}{_accepted(setting)}") from None
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None


def _parse(setting: Setting, text: str) -> Any:
    if setting.optional and text == "":
        return None
    if setting.unit == "B":
        return parse_size(text)
    if setting.unit == "s":
        return parse_time(text)
    match setting.kind:
        case "bool":
            if text.lower() not in _BOOLS:
                raise ValueError(f"{text!r} is neither true nor false; use one of {', '.join(_BOOLS)}")
            return _BOOLS[text.lower()]
        case "int":
            if re.fullmatch(r"[+-]?[0-9]{1,18}", text.strip(), re.ASCII) is None:
                raise ValueError(f"{text!r} is no whole number")
            return int(text)
        case "choice":
            if text not in setting.choices:
                near = _nearest(text, setting.choices)
                raise ValueError(f"{text!r} is unknown{near}; use one of {', '.join(setting.choices)}")
            return text
        case "list":
            return tuple(part for part in (p.strip() for p in text.split(",")) if part)
        case _:
            return text


_BOOLS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False, "on": True, "off": False}


def _plain(text: str) -> str:
    return text[:1].lower() + text[1:]


def _accepted(setting: Setting) -> str:
    units = {"B": " (a size such as 64MiB)", "s": " (a time such as 250ms or 2s)"}
    if setting.choices:
        return f"; use one of {', '.join(setting.choices)}"
    return units[setting.unit] if setting.unit else ""


def _nearest(seen: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    # A key in the wrong section is as common as a misspelt one: router.lease_ttl_s for handoff.lease_ttl_s.
    key = seen.partition(".")[2]
    near = [name for name in known if key and name.partition(".")[2] == key]
    near = near or difflib.get_close_matches(seen, list(known), 1, 0.6)
    return f"; did you mean {near[0]}?" if near else ""


_ADDRESSES = {
    "cluster.router_url": "http://host:port",
    "engine.pool": "tcp://host:port",
    "handoff.listen": "tcp://host:port",
    "pool.listen": "tcp://host:port",
}


def _check_addresses(settings: Settings, origin: Mapping[str, str]) -> None:
    """Found out before anything starts: what is bound or joined only after a model was loaded."""
    for name, expected in _ADDRESSES.items():
        section, key = name.split(".")
        value = getattr(getattr(settings, section), key)
        for address in value if isinstance(value, tuple) else [] if value is None else [value]:
            if not _is_address(address, expected.partition(":")[0]):
                raise ConfigError(f"{origin[name]}: {address!r} is no address; expected {expected}")


def _is_address(text: str, scheme: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme == scheme and bool(parts.hostname) and (parts.port is not None or scheme == "http")
    except ValueError:
        return False


def _check_together(settings: Settings, origin: Mapping[str, str]) -> None:
    """What no single field can say: pairs that must fit, and the secret that the outside world calls for."""
    # The handoff machine wants three heartbeats in a lease; the router takes what is late by one.
    for section, ttl, least in (("router", "ttl_s", 2), ("handoff", "lease_ttl_s", 3)):
        values = getattr(settings, section)
        if values.heartbeat_s * least > getattr(values, ttl):
            where = origin.get(f"{section}.heartbeat_s") or origin.get(f"{section}.{ttl}")
            raise ConfigError(
                f"{where}: {section}.heartbeat_s is {values.heartbeat_s} s and {section}.{ttl} is "
                f"{getattr(values, ttl)} s; one lost heartbeat must not end it, so {ttl} must hold {least} of them"
            )
    secret = settings.cluster.secret
    if secret is not None and len(secret.encode()) < MIN_SECRET_BYTES:
        raise ConfigError(
            f"{origin['cluster.secret']} has {len(secret.encode())} bytes; a secret needs {MIN_SECRET_BYTES} or more"
        )
    if settings.cluster.secret is not None or settings.cluster.secret_file is not None:
        return
    listening = {
        "router.host": settings.router.host,
        "engine.host": settings.engine.host,
        "handoff.listen": urlsplit(settings.handoff.listen).hostname or "",
        "pool.listen": urlsplit(settings.pool.listen).hostname or "",
    }
    for name, host in listening.items():
        if not is_loopback(host):
            raise ConfigError(
                f"{origin[name]}: {host or 'this address'} can be reached from other machines, and no cluster secret "
                "is set; set cluster.secret_file (or KVFERRY_CLUSTER_SECRET) on every process of the cluster"
            )
