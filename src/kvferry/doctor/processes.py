"""Looking at this machine and its processes through psutil, /proc, /sys and NVML. Nothing here raises for absence."""

from __future__ import annotations

import ipaddress
import shutil
import socket
from pathlib import Path, PurePath
from typing import Any

import psutil

from kvferry.doctor.facts import Gpu, Host, Listener, Process

_NUM_NVLINKS = 18
_HOLDING = (psutil.CONN_ESTABLISHED, psutil.CONN_SYN_SENT)
"""States of a connection in which nobody may listen on its port; one that is being closed is in nobody's way."""


def look_at(process: psutil.Process) -> Process:
    """A process with its children: status, namespace, listeners, limits. Fields stay empty where /proc is closed."""
    pids = [process.pid, *(child.pid for child in _children(process))]
    root = Path(f"/proc/{process.pid}/root")
    num_fds: int | None = None
    max_fds: int | None = None
    memlock: int | None = None
    try:
        num_fds = process.num_fds()
        max_fds = _limit(process, psutil.RLIMIT_NOFILE)
        memlock = _limit(process, psutil.RLIMIT_MEMLOCK)
    except psutil.Error:
        pass
    shm_total, shm_free = _space(root / "dev/shm")
    namespace = network_namespace(process.pid)
    return Process(
        pid=process.pid,
        pids=tuple(pids),
        status=process.status(),
        netns=namespace,
        listeners=tuple(entry for pid in pids for entry in _listeners_of(pid)),
        interfaces=interfaces() if namespace == network_namespace("self") else _interfaces_of(process.pid),
        hosts_file=_hosts_file(root / "etc/hosts"),
        num_fds=num_fds,
        max_fds=max_fds,
        memlock_bytes=memlock,
        shm_total_bytes=shm_total,
        shm_free_bytes=shm_free,
        pid_namespace=_namespace(process.pid, "pid"),
    )


def look_at_host(paths: tuple[str, ...] = ()) -> Host:
    """This machine. `paths` are directories whose free space matters."""
    listeners, outgoing = _connections()
    low, high = _numbers("/proc/sys/net/ipv4/ip_local_port_range", (32768, 60999))
    huge = _meminfo()
    return Host(
        interfaces=interfaces(),
        ephemeral_ports=(low, high),
        reserved_ports=_reserved_ports(),
        listeners=listeners,
        outgoing_ports=outgoing,
        netns=network_namespace("self"),
        rdma_devices=rdma_devices(),
        gpus=gpus(),
        hugepages_free=huge.get("HugePages_Free", 0),
        hugepages_total=huge.get("HugePages_Total", 0),
        disks={path: space for path in paths if (space := _disk(path))},
    )


def interfaces() -> dict[str, tuple[str, ...]]:
    """Interface name -> its IP addresses, in this network namespace."""
    return {
        name: tuple(a.address.partition("%")[0] for a in addresses if a.family in (socket.AF_INET, socket.AF_INET6))
        for name, addresses in psutil.net_if_addrs().items()
    }


def network_namespace(pid: int | str) -> str:
    """The identity of a process's network namespace, such as `net:[4026531840]`; empty where it may not be read."""
    return _namespace(pid, "net")


def _namespace(pid: int | str, kind: str) -> str:
    try:
        return str(Path(f"/proc/{pid}/ns/{kind}").readlink())
    except OSError:
        return ""


def rdma_devices() -> tuple[str, ...]:
    """RDMA devices with at least one active port."""
    out = []
    for device in sorted(Path("/sys/class/infiniband").glob("*")):
        states = [_read(p) for p in device.glob("ports/*/state")]
        if any("ACTIVE" in s for s in states):
            out.append(device.name)
    return tuple(out)


def gpus() -> tuple[Gpu, ...] | None:
    """The GPUs that NVML shows; without the package `nvidia-ml-py` those in the driver's /proc; None without either."""
    try:
        import pynvml
    except ImportError:
        return _gpus_of_the_driver()
    try:
        pynvml.nvmlInit()
        out = [_gpu(pynvml, i) for i in range(pynvml.nvmlDeviceGetCount())]
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None
    return tuple(out)


def _gpus_of_the_driver() -> tuple[Gpu, ...] | None:
    """GPUs by bus address, which is the order that CUDA counts in with CUDA_DEVICE_ORDER=PCI_BUS_ID."""
    out = []
    for i, path in enumerate(sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))):
        facts = dict(line.partition(":")[::2] for line in _read(path).splitlines())
        out.append(Gpu(i, facts.get("GPU UUID", "").strip(), facts.get("Model", "").strip()))
    return tuple(out) or None


def _gpu(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    links = 0
    for link in range(_NUM_NVLINKS):
        try:
            links += int(nvml.nvmlDeviceGetNvLinkState(handle, link))
        except nvml.NVMLError:
            break
    try:
        pids = [p.pid for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle)]
    except nvml.NVMLError:
        pids = []
    holders = {pid: owner_name(pid) for pid in pids if psutil.pid_exists(pid)}
    name, uuid = nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetUUID(handle)
    return Gpu(index, _text(uuid), _text(name), links, holders)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []


def _limit(process: psutil.Process, which: int) -> int | None:
    soft: int = process.rlimit(which)[0]
    return None if soft == psutil.RLIM_INFINITY else soft


def _listeners_of(pid: int) -> list[Listener]:
    try:
        process = psutil.Process(pid)
        owner = f"{process.name()} (pid {pid})"
        connections = process.net_connections(kind="tcp")
    except psutil.Error:
        return []
    return [
        Listener(c.laddr.ip, c.laddr.port, pid, owner)
        for c in connections
        if c.status == psutil.CONN_LISTEN and c.laddr
    ]


def _connections() -> tuple[tuple[Listener, ...], frozenset[int]]:
    """Who listens where on this machine, and the local ports of its other connections."""
    listeners: list[Listener] = []
    outgoing: set[int] = set()
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.AccessDenied:
        return (), frozenset()
    for c in connections:
        if not c.laddr:
            continue
        if c.status == psutil.CONN_LISTEN:
            listeners.append(Listener(c.laddr.ip, c.laddr.port, c.pid, owner_name(c.pid), _is_engine(c.pid)))
        elif c.status in _HOLDING:
            outgoing.add(c.laddr.port)
    ports = {entry.port for entry in listeners}
    return tuple(listeners), frozenset(outgoing - ports)


def owner_name(pid: int | None) -> str:
    """`name (pid N)`, or empty where the process may not be seen."""
    if pid is None:
        return ""
    try:
        return f"{psutil.Process(pid).name()} (pid {pid})"
    except psutil.Error:
        return f"pid {pid}"


def _is_engine(pid: int | None) -> bool:
    """Whether a process is vLLM's, kvferry's or Mooncake's, by the program that it runs."""
    try:
        command = psutil.Process(pid).cmdline() if pid is not None else []
    except psutil.Error:
        return False
    programs = [PurePath(token).name for token in command[:4]]
    return any(
        p in ("vllm", "kvferry", "etcd", "redis-server") or p.startswith(("vllm.", "kvferry.", "VLLM::", "mooncake_"))
        for p in programs
    )


def _interfaces_of(pid: int) -> dict[str, tuple[str, ...]]:
    """IPv4 addresses inside another process's network namespace, from its own /proc/net."""
    local: list[str] = []
    previous = ""
    for line in _read(Path(f"/proc/{pid}/net/fib_trie")).splitlines():
        words = line.split()
        if "/32 host LOCAL" in line and previous:
            local.append(previous)
        elif len(words) == 2 and words[0] in ("|--", "+--"):
            previous = words[1].partition("/")[0]
    found: dict[str, tuple[str, ...]] = {"lo": ()}
    for address in dict.fromkeys(local):
        name = _interface_of(pid, address)
        found[name] = (*found.get(name, ()), address)
    return found if local else {}


def _interface_of(pid: int, address: str) -> str:
    """The interface whose route leads to an own address's network, `lo` for loopback, else `?`."""
    number = ipaddress.IPv4Address(address)
    if number.is_loopback:
        return "lo"
    best, name = -1, "?"
    for line in _read(Path(f"/proc/{pid}/net/route")).splitlines()[1:]:
        words = line.split()
        if len(words) < 8:
            continue
        target, mask = (int.from_bytes(bytes.fromhex(words[i]), "little") for i in (1, 7))
        if mask > best and int(number) & mask == target and mask:
            best, name = mask, words[0]
    return name


def _hosts_file(path: Path) -> dict[str, tuple[str, ...]]:
    names: dict[str, tuple[str, ...]] = {}
    for line in _read(path).splitlines():
        words = line.partition("#")[0].split()
        for name in words[1:]:
            names[name] = (*names.get(name, ()), words[0])
    return names


def _space(path: Path) -> tuple[int | None, int | None]:
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return None, None
    return usage.total, usage.free


def _disk(path: str) -> tuple[int, int] | None:
    """(total, free) bytes of the file system that a path lies, or would lie, on."""
    where = Path(path)
    while not where.exists() and where != where.parent:
        where = where.parent
    total, free = _space(where)
    return None if total is None or free is None else (total, free)


def _reserved_ports() -> tuple[tuple[int, int], ...]:
    out = []
    for run in _read(Path("/proc/sys/net/ipv4/ip_local_reserved_ports")).strip().split(","):
        low, _, high = run.partition("-")
        if low.isdecimal():
            out.append((int(low), int(high) if high.isdecimal() else int(low)))
    return tuple(out)


def _numbers(path: str, default: tuple[int, int]) -> tuple[int, int]:
    words = _read(Path(path)).split()
    return (int(words[0]), int(words[1])) if len(words) == 2 and all(w.isdecimal() for w in words) else default


def _meminfo() -> dict[str, int]:
    out = {}
    for line in _read(Path("/proc/meminfo")).splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdecimal():
            out[name] = int(words[0])
    return out


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
