"""What the doctor knows, as frozen values. Gathering them is I/O (inputs, processes, reach); checks are pure."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from kvferry.config import Settings

SideRole = Literal["prefill", "decode"]


class Listener(msgspec.Struct, frozen=True):
    """A TCP port that a process listens on. `owner` is `name (pid N)`, or empty where the machine does not tell;
    `is_engine` whether its command line is that of an instance, a router or one of Mooncake's servers."""

    address: str
    port: int
    pid: int | None = None
    owner: str = ""
    is_engine: bool = False


class Process(msgspec.Struct, frozen=True):
    """A running process, its limits and what it listens on, its children included."""

    pid: int
    pids: tuple[int, ...]
    status: str
    netns: str
    listeners: tuple[Listener, ...] = ()
    interfaces: dict[str, tuple[str, ...]] = {}
    hosts_file: dict[str, tuple[str, ...]] = {}
    num_fds: int | None = None
    max_fds: int | None = None
    memlock_bytes: int | None = None
    shm_total_bytes: int | None = None
    shm_free_bytes: int | None = None
    pid_namespace: str = ""


class Side(msgspec.Struct, frozen=True):
    """One prefill or decode instance as it was described: by a pid, or by a file of KEY=VALUE lines.

    `environment` holds the variables, `command` the argument list (empty where unknown), `mooncake` the content of
    the file that MOONCAKE_CONFIG_PATH names, `versions` distribution names with versions where they could be read.
    `unknown` are variables that are set to what only a shell or a pod would know, such as `$(POD_IP)`.
    """

    role: SideRole
    name: str
    origin: str
    environment: dict[str, str] = {}
    command: tuple[str, ...] = ()
    process: Process | None = None
    mooncake: dict[str, Any] | None = None
    mooncake_path: str | None = None
    mooncake_error: str | None = None
    versions: dict[str, str] = {}
    unknown: frozenset[str] = frozenset()

    def sets(self, variable: str) -> bool:
        """Whether a variable is set, to whatever."""
        return variable in self.environment or variable in self.unknown


class Gpu(msgspec.Struct, frozen=True):
    """One GPU as NVML shows it. `holders` are the processes of this machine that hold memory on it, by pid."""

    index: int
    uuid: str
    name: str
    num_nvlinks: int = 0
    holders: dict[int, str] = {}


class Host(msgspec.Struct, frozen=True):
    """This machine. Interfaces map a name to its addresses; `gpus` is None where NVML is not there."""

    interfaces: dict[str, tuple[str, ...]] = {}
    ephemeral_ports: tuple[int, int] = (32768, 60999)
    reserved_ports: tuple[tuple[int, int], ...] = ()
    listeners: tuple[Listener, ...] = ()
    outgoing_ports: frozenset[int] = frozenset()
    netns: str = ""
    rdma_devices: tuple[str, ...] = ()
    gpus: tuple[Gpu, ...] | None = None
    hugepages_free: int = 0
    hugepages_total: int = 0
    disks: dict[str, tuple[int, int]] = {}

    @property
    def addresses(self) -> frozenset[str]:
        """Every address of this machine."""
        return frozenset(a for addresses in self.interfaces.values() for a in addresses)


ReachOutcome = Literal["open", "refused", "timeout", "unresolved", "unreachable"]


class Reach(msgspec.Struct, frozen=True):
    """What a TCP connection from `seen_from` to `host:port` met. `address` is what the name resolved to.

    `answer` tells how a service answered that was asked in its own protocol: `ok`, `silent`, `closed`, or what it said
    instead; `stopped_owner` names the stopped process that holds the port, if it is one of this machine.
    """

    seen_from: str
    host: str
    port: int
    outcome: ReachOutcome
    purpose: str
    address: str = ""
    answer: str = ""
    stopped_owner: str = ""


class Resolution(msgspec.Struct, frozen=True):
    """What a name resolves to on one side."""

    side: str
    name: str
    addresses: tuple[str, ...]


class ClockReading(msgspec.Struct, frozen=True):
    """How far a peer's wall clock is ahead of ours, from the Date header of its answer."""

    name: str
    url: str
    ahead_s: float


class PrefixCounts(msgspec.Struct, frozen=True):
    """What a vLLM instance counts of the prompt tokens that its connector was asked for, and how many came."""

    name: str
    asked: int
    came: int


class PoolAnswer(msgspec.Struct, frozen=True):
    """What a node of the pool said to a side that is configured with it: `secret` means that it has another one."""

    side: str
    address: str
    outcome: Literal["ok", "absent", "silent", "secret"]
    detail: str = ""
    slab_bytes: int = 0
    block_bytes: int | None = None
    stopped_owner: str = ""


class RouterProbe(msgspec.Struct, frozen=True):
    """What came out when probe requests were sent through the router to an echo upstream, or straight to it.

    `failure` is set where the router could not be asked at all.
    """

    url: str
    failure: str = ""
    mangled: str = ""
    buffered_s: float | None = None
    dropped_params: bool | None = None
    status_change: tuple[int, int] | None = None
    note: str = ""


class ProbeStep(msgspec.Struct, frozen=True):
    """One step of the rendezvous probe over one transport."""

    transport: str
    step: str
    ok: bool
    detail: str = ""
    nbytes: int = 0
    duration_s: float = 0.0


class LogFinding(msgspec.Struct, frozen=True):
    """A log rule that matched: how often, and the first and last line."""

    rule: str
    finding: str
    severity: str
    title: str
    why: str
    fix: str
    count: int
    first: str
    source: str


class Facts(msgspec.Struct, frozen=True):
    """Everything gathered for one examination."""

    sides: tuple[Side, ...] = ()
    mooncake: dict[str, Any] | None = None
    mooncake_path: str | None = None
    kvferry: Settings | None = None
    kvferry_path: str | None = None
    kvferry_error: str | None = None
    host: Host = Host()
    reaches: tuple[Reach, ...] = ()
    resolutions: tuple[Resolution, ...] = ()
    clocks: tuple[ClockReading, ...] = ()
    prefix_counts: tuple[PrefixCounts, ...] = ()
    pool: tuple[PoolAnswer, ...] = ()
    router: dict[str, Any] | None = None
    router_url: str | None = None
    router_error: str | None = None
    router_is_foreign: bool = False
    router_probe: RouterProbe | None = None
    probe: tuple[ProbeStep, ...] = ()
    logs: tuple[LogFinding, ...] = ()

    @property
    def prefills(self) -> tuple[Side, ...]:
        """The prefill sides."""
        return tuple(s for s in self.sides if s.role == "prefill")

    @property
    def decodes(self) -> tuple[Side, ...]:
        """The decode sides."""
        return tuple(s for s in self.sides if s.role == "decode")
