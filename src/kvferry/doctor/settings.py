"""What a side's environment and command line mean: model, ranks, connector, addresses, ports. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, Literal

import msgspec

from kvferry.addresses import is_loopback, is_wildcard
from kvferry.doctor.facts import Host, Side

Engine = Literal["vllm", "kvferry", "unknown"]

TRANSFER_KEYS = (
    "kv_connector",
    "engine_id",
    "kv_buffer_device",
    "kv_buffer_size",
    "kv_role",
    "kv_rank",
    "kv_parallel_size",
    "kv_ip",
    "kv_port",
    "kv_connector_extra_config",
    "kv_connector_module_path",
    "enable_permute_local_kv",
    "kv_load_failure_policy",
)
"""The keys of vLLM's `--kv-transfer-config`. Source: vLLM's KVTransferConfig."""

STORE_CONNECTORS = (
    "MooncakeStoreConnector",
    "LMCacheConnectorV1",
    "LMCacheMPConnector",
    "LMCacheConnector",
    "OffloadingConnector",
    "SharedStorageConnector",
)
"""Connectors that look KV up by block hash, so that both sides must hash alike."""

NCCL_CONNECTORS = ("PyNcclConnector",)
DTYPE_ALIASES = {"half": "float16", "fp16": "float16", "bf16": "bfloat16", "float": "float32", "fp32": "float32"}
_SHORT = {"tp": "tensor-parallel-size", "pp": "pipeline-parallel-size", "dp": "data-parallel-size"}
_PROCESS_GROUP_ROLE = "VLLM_DISTRIBUTED_KV_ROLE"


class Transfer(msgspec.Struct, frozen=True):
    """One `--kv-transfer-config`. `connectors` flattens a MultiConnector into its parts, each with its own keys."""

    raw: dict[str, Any]
    connectors: tuple[tuple[str, dict[str, Any]], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Connector names, the parts of a MultiConnector instead of itself."""
        return tuple(name for name, _ in self.connectors)

    def extra(self, key: str) -> Any:
        """A key of any part's `kv_connector_extra_config`, or None."""
        for _, part in self.connectors:
            extra = part.get("kv_connector_extra_config")
            if isinstance(extra, dict) and key in extra:
                return extra[key]
        return None


class Settings(msgspec.Struct, frozen=True):
    """A side's settings; None where nothing tells."""

    engine: Engine
    flags: dict[str, str]
    model: str | None = None
    transfer: Transfer | None = None
    transfer_error: str | None = None
    tp: int = 1
    pp: int = 1
    dp: int = 1
    http_port: int | None = None
    cpu: bool = False
    process_group: bool = False

    @property
    def connectors(self) -> tuple[str, ...]:
        """Names of the connectors, empty where there is none."""
        return self.transfer.names if self.transfer else ()

    @property
    def hands_over(self) -> bool:
        """Whether a connector takes each request's KV from its prefill, rather than look for any by its hash."""
        return bool(set(self.connectors) - set(STORE_CONNECTORS))

    def flag(self, name: str) -> str | None:
        """The value of `--name`, or None."""
        return self.flags.get(name)


def read_settings(side: Side) -> Settings:
    """The settings of one side."""
    flags, positional = parse_command(side.command)
    engine = engine_of(side.command)
    transfer, error = _transfer(flags)
    flags = {**_kvferry_flags(side.environment), **_connector_flags(transfer), **flags}
    env = side.environment
    cpu = (
        "VLLM_CPU_KVCACHE_SPACE" in env
        or env.get("VLLM_TARGET_DEVICE") == "cpu"
        or (flags.get("device") or "").startswith("cpu")
        or (transfer is not None and transfer.raw.get("kv_buffer_device") == "cpu")
        or engine == "kvferry"
    )
    default_port = 8000 if engine == "vllm" else None
    return Settings(
        engine=engine,
        flags=flags,
        model=flags.get("model") or positional,
        transfer=transfer,
        transfer_error=error,
        tp=as_int(flags.get("tensor-parallel-size")) or 1,
        pp=as_int(flags.get("pipeline-parallel-size")) or 1,
        dp=as_int(flags.get("data-parallel-size")) or 1,
        http_port=as_int(flags.get("port")) or default_port,
        cpu=cpu,
        process_group=_PROCESS_GROUP_ROLE in env,
    )


def _kvferry_flags(environment: Mapping[str, str]) -> dict[str, str]:
    """KVFERRY_ENGINE_PORT as the flag `port`, KVFERRY_HANDOFF_LISTEN as `handoff-listen`, and so on."""
    flags = {}
    for name, value in environment.items():
        if name.startswith("KVFERRY_") and value and not name.startswith("KVFERRY_CLUSTER_SECRET"):
            flag = name.removeprefix("KVFERRY_").removeprefix("ENGINE_").lower().replace("_", "-")
            flags[flag] = value
    return flags


def _connector_flags(transfer: Transfer | None) -> dict[str, str]:
    """What vLLM's KVFerryConnector was told, under the names of kvferry's own flags."""
    if transfer is None or "KVFerryConnector" not in transfer.names:
        return {}
    flags = {}
    names = {"listen": "handoff-listen", "router": "cluster-router-url", "namespace": "cluster-namespace"}
    names |= {"pool": "pool", "pool_directory": "pool-directory"}
    for key, flag in names.items():
        if isinstance(value := transfer.extra(key), str) and value:
            flags[flag] = value
    if isinstance(transports := transfer.extra("transports"), list):
        flags["transfer-transports"] = ",".join(map(str, transports))
    return flags


def parse_command(command: tuple[str, ...]) -> tuple[dict[str, str], str | None]:
    """Flags (without dashes, underscores as dashes; a bare flag is `true`) and the model that `serve` names."""
    flags: dict[str, str] = {}
    model: str | None = None
    tokens = list(command)
    start = next((i for i, t in enumerate(tokens) if PurePosixPath(t).name in ("vllm", "kvferry")), -1)
    i = start + 1
    while i < len(tokens):
        token = tokens[i]
        if not token.startswith("-") or token == "-":
            if model is None and i > 0 and tokens[i - 1] == "serve":
                model = token
            i += 1
            continue
        name, eq, value = token.lstrip("-").partition("=")
        if not token.startswith("--"):
            name = _SHORT.get(name, name)
        if "." in name:
            head, _, path = name.partition(".")
            name = f"{head.replace('_', '-')}.{path}"
        else:
            name = name.replace("_", "-")
        if not eq and i + 1 < len(tokens) and (not tokens[i + 1].startswith("-") or _is_number(tokens[i + 1])):
            value = tokens[i + 1]
            i += 1
        elif not eq:
            value = "true"
        flags[name] = value
        i += 1
    return flags, model


def _is_number(text: str) -> bool:
    return text.lstrip("-").replace(".", "", 1).isdecimal()


def engine_of(command: tuple[str, ...]) -> Engine:
    """Which engine a command line starts."""
    for token in command:
        name = PurePosixPath(token).name
        if name == "vllm" or name.startswith("vllm."):
            return "vllm"
        if name == "kvferry" or name.startswith("kvferry."):
            return "kvferry"
    return "unknown"


def _transfer(flags: Mapping[str, str]) -> tuple[Transfer | None, str | None]:
    raw: dict[str, Any] = {}
    text = flags.get("kv-transfer-config")
    if text is not None:
        try:
            decoded = msgspec.json.decode(text)
        except (msgspec.DecodeError, RecursionError) as e:
            return None, f"{text!r} is not JSON ({e})"
        if not isinstance(decoded, dict):
            return None, f"{text!r} is not a JSON object"
        raw = decoded
    for name, value in flags.items():
        if name.startswith("kv-transfer-config."):
            _set_dotted(raw, name.partition(".")[2], value)
    if not raw:
        return None, None
    return Transfer(raw, tuple(_parts(raw))), None


def _set_dotted(raw: dict[str, Any], path: str, value: str) -> None:
    keys = path.replace("-", "_").split(".")
    for key in keys[:-1]:
        if not isinstance(raw.get(key), dict):
            raw[key] = {}
        raw = raw[key]
    leaf = keys[-1]
    try:
        decoded = msgspec.json.decode(value)
    except (msgspec.DecodeError, RecursionError):
        decoded = value
    if leaf.endswith("+"):
        earlier = raw.get(leaf[:-1])
        raw[leaf[:-1]] = [*(earlier if isinstance(earlier, list) else ()), decoded]
    else:
        raw[leaf] = decoded


def _parts(raw: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    name = raw.get("kv_connector")
    extra = raw.get("kv_connector_extra_config")
    nested = extra.get("connectors") if isinstance(extra, dict) else None
    if name == "MultiConnector" and isinstance(nested, list):
        for part in nested:
            if isinstance(part, dict):
                yield from _parts(part)
    elif isinstance(name, str):
        yield name, raw


def json_object(text: str) -> dict[str, Any] | None:
    """A JSON object, or None where the text is none."""
    try:
        decoded = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return None
    return decoded if isinstance(decoded, dict) else None


def as_int(text: Any) -> int | None:
    """An integer, or None where the text is none."""
    try:
        return int(text)
    except (TypeError, ValueError, OverflowError):
        return None


def split_host_port(text: str) -> tuple[str, int | None]:
    """`host`, `host:port`, `[v6]:port` or a URL, taken apart."""
    text = text.partition("://")[2] or text
    text = text.partition("/")[0]
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        return host, as_int(rest.lstrip(":"))
    if text.count(":") > 1:
        return text, None
    host, _, port = text.partition(":")
    return host, as_int(port)


def stated_addresses(side: Side, settings: Settings, config: dict[str, Any] | None) -> dict[str, str]:
    """What a side says of its own address: variable or key -> host. The most telling first."""
    out: dict[str, str] = {}
    env = side.environment
    own = side.mooncake or config or {}
    url = own.get("prefill_url" if side.role == "prefill" else "decode_url")
    if isinstance(url, str) and url:
        out["prefill_url" if side.role == "prefill" else "decode_url"] = split_host_port(url)[0]
    if env.get("VLLM_NIXL_SIDE_CHANNEL_HOST"):
        out["VLLM_NIXL_SIDE_CHANNEL_HOST"] = env["VLLM_NIXL_SIDE_CHANNEL_HOST"]
    if env.get("VLLM_HOST_IP") and not settings.process_group:
        out["VLLM_HOST_IP"] = env["VLLM_HOST_IP"]
    if env.get("MOONCAKE_LOCAL_HOSTNAME"):
        out["MOONCAKE_LOCAL_HOSTNAME"] = split_host_port(env["MOONCAKE_LOCAL_HOSTNAME"])[0]
    for flag in ("cluster-advertise-host", "handoff-listen"):
        host = split_host_port(settings.flags.get(flag, ""))[0]
        if host and not is_wildcard(host):
            out[flag] = host
    local = side.mooncake.get("local_hostname") if side.mooncake else None
    if isinstance(local, str) and local:
        out["local_hostname"] = split_host_port(local)[0]
    return out


def same_node(a: Side, b: Side, addresses: Mapping[str, Mapping[str, str]], host: Host) -> bool | None:
    """Whether two sides share a network stack; None where nothing tells.

    Args:
        addresses: for each side's name, what `stated_addresses` gave.
    """
    if a.process and b.process:
        return a.process.netns == b.process.netns
    first = _node(a, addresses[a.name], host)
    second = _node(b, addresses[b.name], host)
    if first is None or second is None:
        return None
    return first == second


def _node(side: Side, stated: Mapping[str, str], host: Host) -> str | None:
    """A name for the node that a side runs on: `here`, or its first stated address."""
    if side.process and side.process.netns == host.netns:
        return "here"
    for address in stated.values():
        if is_wildcard(address):
            continue
        return "here" if is_loopback(address) or address in host.addresses else address
    return None
