"""The settings themselves: each field with its type, bounds, default and help text, written once."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from kvferry.types import Role

ENVIRONMENT_PREFIX = "KVFERRY_"

Seconds = Annotated[float, Meta(gt=0, le=10_000_000, extra={"unit": "s"})]
Bytes = Annotated[int, Meta(ge=1, le=1 << 50, extra={"unit": "B"})]
Port = Annotated[int, Meta(ge=0, le=65535)]
Count = Annotated[int, Meta(ge=1, le=1 << 40)]


class ClusterSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all processes of one cluster share."""

    secret: Annotated[str | None, Meta(description="cluster secret, proven by every peer; never a flag")] = None
    secret_file: Annotated[str | None, Meta(description="file that holds the cluster secret")] = None
    namespace: Annotated[str, Meta(description="separates tenants: part of every block hash")] = "default"
    router_url: Annotated[str | None, Meta(description="http URL of the router that instances join")] = None
    advertise_host: Annotated[
        str | None, Meta(description="host name or address that this process tells others, if not the bound one")
    ] = None


class RouterSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The OpenAI-compatible front."""

    host: Annotated[str, Meta(description="address to bind")] = "127.0.0.1"
    port: Annotated[Port, Meta(description="port to bind; 0 lets the system choose")] = 8000
    ttl_s: Annotated[Seconds, Meta(description="an instance that is silent for so long is gone")] = 3.0
    heartbeat_s: Annotated[Seconds, Meta(description="instances report so often")] = 1.0
    max_queue: Annotated[Count, Meta(description="requests that may wait; one more gets 429")] = 1024
    max_in_flight: Annotated[Count, Meta(description="requests forwarded at once")] = 512
    max_body_bytes: Annotated[Bytes, Meta(description="largest request body")] = 16 << 20
    request_deadline_s: Annotated[Seconds, Meta(description="a request ends within this, whatever happens")] = 600.0
    connect_timeout_s: Annotated[Seconds, Meta(description="to open a connection to an instance")] = 5.0
    outcome_wait_s: Annotated[
        Seconds, Meta(description="how long the last bytes wait for the target's report of the handoff")
    ] = 1.0
    attempts: Annotated[Count, Meta(description="instance pairs tried before a request fails")] = 3
    stream_first_token: Annotated[
        bool, Meta(description="greedy and seeded streams begin with the prefill instance's token")
    ] = False
    drain_s: Annotated[Seconds, Meta(description="at the end, running requests get this long")] = 10.0
    prefill: Annotated[tuple[str, ...], Meta(description="URLs of prefill instances that do not register")] = ()
    decode: Annotated[tuple[str, ...], Meta(description="URLs of decode instances that do not register")] = ()


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One instance of the embedded engine."""

    model: Annotated[str | None, Meta(description="path or Hugging Face name; without it the model of the demo")] = None
    served_model_name: Annotated[str | None, Meta(description="name in the API; without it the model's own")] = None
    instance_id: Annotated[str | None, Meta(description="name in logs and tables; without it one is made")] = None
    role: Annotated[Role, Meta(description="what this instance is for")] = "both"
    host: Annotated[str, Meta(description="address to bind")] = "127.0.0.1"
    port: Annotated[Port, Meta(description="port to bind; 0 lets the system choose")] = 0
    block_size: Annotated[Count, Meta(description="tokens in one KV block")] = 16
    num_blocks: Annotated[Count, Meta(description="KV blocks of this instance")] = 1024
    max_running: Annotated[Count, Meta(description="requests computed in one step")] = 16
    max_waiting: Annotated[Count, Meta(description="requests that may wait; one more gets 503")] = 1024
    max_model_len: Annotated[Count | None, Meta(description="longest prompt plus answer; without it the model's")] = (
        None
    )
    prefill_chunk_tokens: Annotated[
        Count | None,
        Meta(
            description="prompt tokens computed in one pass, padded; without it 64 on a CPU and 512 on a GPU. "
            "Equal bits over a handoff need the same value on both sides"
        ),
    ] = None
    decode_rows: Annotated[
        Count | None,
        Meta(
            description="answers whose next tokens are computed in one pass, padded; without it 8 on a CPU and 32 on "
            "a GPU. Equal bits over a handoff need the same value on both sides"
        ),
    ] = None
    device: Annotated[str, Meta(description="auto, cpu, cuda or cuda:N")] = "auto"
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], Meta(description="of weights and KV")] = "auto"
    num_threads: Annotated[Count | None, Meta(description="CPU threads of torch; without it torch's own choice")] = None
    prefix_cache: Annotated[bool, Meta(description="reuse blocks of prompts with the same prefix")] = True
    pool: Annotated[
        tuple[str, ...],
        Meta(description="nodes of the KV pool, tcp://host:port, this host's first; without one there is no pool"),
    ] = ()
    pool_deadline_s: Annotated[
        Seconds, Meta(description="a prompt waits no longer for the pool; a save is over within this")
    ] = 2.0
    pool_saving_bytes: Annotated[
        Bytes, Meta(description="blocks that wait to be saved in the pool, at most; those beyond are not saved")
    ] = 256 << 20
    pool_staging_bytes: Annotated[
        Bytes, Meta(description="pinned host memory through which blocks of a GPU come from and go to the pool")
    ] = 64 << 20


class HandoffSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Passing one request's blocks from prefill to decode."""

    listen: Annotated[str, Meta(description="where peers connect; port 0 lets the system choose")] = "tcp://127.0.0.1:0"
    deadline_s: Annotated[Seconds, Meta(description="a handoff is over within this")] = 30.0
    lease_ttl_s: Annotated[Seconds, Meta(description="blocks are held so long without a heartbeat")] = 5.0
    heartbeat_s: Annotated[Seconds, Meta(description="a target renews its lease so often")] = 1.0
    digest: Annotated[
        Literal["none", "xxh3", "sum"],
        Meta(description="of each published block, checked by the target: xxh3 of host memory, or sum, GPU memory too"),
    ] = "xxh3"
    on_failure: Annotated[
        Literal["recompute", "fail"], Meta(description="what the target does when the KV does not arrive")
    ] = "recompute"
    max_handoffs: Annotated[Count, Meta(description="open handoffs of one instance; more are refused")] = 4096
    max_parked: Annotated[Count, Meta(description="early subscriptions kept for one peer")] = 1024
    max_recomputing: Annotated[Count, Meta(description="recomputes at once on one instance; then 503")] = 32


class TransferSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Moving bytes between registered regions."""

    transports: Annotated[tuple[str, ...], Meta(description="schemes in the order they are tried")] = (
        "cuda",
        "shm",
        "tcp",
    )
    worker_threads: Annotated[Count, Meta(description="transfers that run at once")] = 8
    max_streams: Annotated[Count, Meta(description="TCP data connections to one peer, at most")] = 4
    max_in_flight_bytes: Annotated[Bytes, Meta(description="bytes being moved at once, over all peers")] = 4 << 30
    socket_buffer_bytes: Annotated[Bytes, Meta(description="of each TCP data connection")] = 256 << 10
    dead_after_s: Annotated[Seconds, Meta(description="a network that is silent for so long is down")] = 5.0
    verify_digest: Annotated[bool, Meta(description="xxh3 of every chunk that TCP moves")] = False


class PoolSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One node of the KV pool."""

    listen: Annotated[str, Meta(description="where engines connect; port 0 lets the system choose")] = (
        "tcp://127.0.0.1:0"
    )
    arena_bytes: Annotated[Bytes, Meta(description="host memory for blocks, shared with this host's engines")] = 1 << 30
    slab_bytes: Annotated[Bytes, Meta(description="room of one block: the largest block it takes")] = 1 << 20
    eviction: Annotated[str, Meta(description="which block leaves: hazard, lru, lfu, lfu-da, s3-fifo or prefix")] = (
        "hazard"
    )
    quotas: Annotated[tuple[str, ...], Meta(description="host memory of namespaces, each as NAMESPACE=SIZE")] = ()
    disk_path: Annotated[str | None, Meta(description="directory of the disk tier; without it there is none")] = None
    disk_bytes: Annotated[Bytes, Meta(description="size of the disk tier, preallocated")] = 4 << 30
    lease_ttl_s: Annotated[Seconds, Meta(description="a get is over within this")] = 10.0
    directory: Annotated[
        str | None, Meta(description="where nodes tell what they hold, redis://host:port/number; none for one node")
    ] = None
    max_copies: Annotated[
        Count, Meta(description="nodes that may hold a hot block, with a directory; 1: no copies")
    ] = 2
    metrics_host: Annotated[str, Meta(description="address that /metrics binds")] = "127.0.0.1"
    metrics_port: Annotated[
        Port | None, Meta(description="serve Prometheus metrics here; 0 lets the system choose")
    ] = None


class LogSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Structured lines on standard error."""

    level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="least level shown")] = "info"
    format: Annotated[Literal["text", "json"], Meta(description="one line for each event, as text or JSON")] = "text"


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole tree. Every process reads the same one and uses the sections that concern it."""

    cluster: ClusterSettings = msgspec.field(default_factory=ClusterSettings)
    router: RouterSettings = msgspec.field(default_factory=RouterSettings)
    engine: EngineSettings = msgspec.field(default_factory=EngineSettings)
    handoff: HandoffSettings = msgspec.field(default_factory=HandoffSettings)
    transfer: TransferSettings = msgspec.field(default_factory=TransferSettings)
    pool: PoolSettings = msgspec.field(default_factory=PoolSettings)
    log: LogSettings = msgspec.field(default_factory=LogSettings)


class Setting(NamedTuple):
    """One key of the tree: everything that reading, printing and explaining it needs."""

    section: str
    key: str
    kind: Literal["bool", "int", "float", "str", "choice", "list"]
    optional: bool
    unit: Literal["s", "B"] | None
    choices: tuple[str, ...]
    default: Any
    help: str
    annotation: Any

    @property
    def name(self) -> str:
        return f"{self.section}.{self.key}"

    @property
    def default_text(self) -> str:
        """The default as one would write it, with its unit; empty where there is none."""
        if self.unit == "B":
            power = max(n for n in range(5) if self.default % 1024**n == 0)
            return f"{self.default // 1024**power}{('', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
        return f"{self.default:g}s" if self.unit == "s" else setting_text(self.default)

    @property
    def variable(self) -> str:
        return f"{ENVIRONMENT_PREFIX}{self.section}_{self.key}".upper()


SECTIONS: dict[str, type[msgspec.Struct]] = {
    f.name: type(f.default_factory()) for f in msgspec.structs.fields(Settings) if callable(f.default_factory)
}


def _describe(section: str, field: msgspec.structs.FieldInfo) -> Setting:
    info: Any = msgspec.inspect.type_info(field.type)
    unit, text, optional = None, "", False
    choices: tuple[str, ...] = ()
    while True:
        if isinstance(info, msgspec.inspect.Metadata):
            unit = (info.extra or {}).get("unit", unit)
            text = (info.extra_json_schema or {}).get("description", text)
            info = info.type
        elif isinstance(info, msgspec.inspect.UnionType):
            optional = info.includes_none
            (info,) = (t for t in info.types if not isinstance(t, msgspec.inspect.NoneType))
        else:
            break
    kinds: dict[type, Any] = {
        msgspec.inspect.BoolType: "bool",
        msgspec.inspect.IntType: "int",
        msgspec.inspect.FloatType: "float",
        msgspec.inspect.StrType: "str",
        msgspec.inspect.LiteralType: "choice",
        msgspec.inspect.VarTupleType: "list",
    }
    if isinstance(info, msgspec.inspect.LiteralType):
        choices = tuple(str(v) for v in info.values)
    return Setting(
        section, field.name, kinds[type(info)], optional, unit, choices, field.default, text, field.type
    )  # fmt: skip


SETTINGS: dict[str, Setting] = {
    f"{section}.{field.name}": _describe(section, field)
    for section, struct in SECTIONS.items()
    for field in msgspec.structs.fields(struct)
}
"""Every setting by its dotted name, such as `router.ttl_s`."""


def setting_text(value: Any) -> str:
    """A value as the environment and flags write it; None is the empty text."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value)
