"""The machine under the instances: stopped processes, shared memory, limits, huge pages, disks, clocks, settings."""

from __future__ import annotations

from collections.abc import Iterator

from kvferry.doctor.case import Case
from kvferry.doctor.facts import Side
from kvferry.doctor.findings import Finding, found

MIN_SHM_BYTES = 64 << 20
MIN_MEMLOCK_BYTES = 1 << 30
MIN_FDS = 512
FDS_NEARLY_USED = 0.9
MIN_DISK_BYTES = 100 << 20
MAX_SKEW_S = 5.0
REFUSED_SKEW_S = 60.0
_HUGE_PAGE_VARIABLES = ("MC_STORE_USE_HUGEPAGE", "MOONCAKE_USE_HUGEPAGE")


def stopped(case: Case) -> Iterator[Finding]:
    """KVF001: a process that exists but does not run."""
    for side in case.facts.sides:
        if side.process and side.process.status in ("stopped", "tracing-stop", "zombie", "dead"):
            pid = side.process.pid
            ended = side.process.status in ("zombie", "dead")
            yield found(
                "KVF001",
                f"{side.name}: process {pid} is {side.process.status}",
                f"start {side.name} again and read why it ended"
                if ended
                else f"continue it: kill -CONT {pid} (or end the debugger that holds it)",
            )


def shared_memory(case: Case) -> Iterator[Finding]:
    """KVF080: /dev/shm is too small for ranks to talk through."""
    for side in case.facts.sides:
        process = side.process
        if process is None or process.shm_free_bytes is None or process.shm_free_bytes >= MIN_SHM_BYTES:
            continue
        total = process.shm_total_bytes or 0
        yield found(
            "KVF080",
            f"{side.name}: /dev/shm has {_size(process.shm_free_bytes)} free of {_size(total)}",
            "free /dev/shm (left-over segments: ls -l /dev/shm), or start the container with --shm-size=16g "
            "(or --ipc=host)",
        )


def limits(case: Case) -> Iterator[Finding]:
    """KVF081, KVF082: locked memory for RDMA, open files."""
    for side in case.facts.sides:
        process = side.process
        if process is None:
            continue
        if process.memlock_bytes is not None and process.memlock_bytes < MIN_MEMLOCK_BYTES and _wants_rdma(case, side):
            yield found(
                "KVF081",
                f"{side.name}: may lock {_size(process.memlock_bytes)} of memory, and RDMA locks the whole KV cache",
                "raise it: ulimit -l unlimited before the start, --ulimit memlock=-1 for a container, "
                "LimitMEMLOCK=infinity for a service",
            )
        if process.max_fds is None:
            continue
        full = process.num_fds is not None and process.num_fds > FDS_NEARLY_USED * process.max_fds
        if full or process.max_fds < MIN_FDS:
            yield found(
                "KVF082",
                f"{side.name}: {process.num_fds} files open, {process.max_fds} allowed",
                "raise it: ulimit -n 65536 before the start, --ulimit nofile=65536 for a container",
                severity=None if full else "warning",
            )


def _wants_rdma(case: Case, side: Side) -> bool:
    config = side.mooncake or case.facts.mooncake or {}
    transfer = case.settings[side.name].transfer
    modern = transfer is not None and transfer.extra("mooncake_protocol") == "rdma"
    tls = side.environment.get("UCX_TLS", "")
    return config.get("protocol") == "rdma" or modern or any(t.startswith(("rc", "dc", "ib")) for t in tls.split(","))


def huge_pages(case: Case) -> Iterator[Finding]:
    """KVF083: huge pages are asked for and there are none."""
    for side in case.facts.sides:
        asked = next((v for v in _HUGE_PAGE_VARIABLES if side.environment.get(v) not in (None, "", "0")), None)
        if asked and case.facts.host.hugepages_free == 0 and (side.process or case.inside):
            yield found(
                "KVF083",
                f"{side.name}: {asked}={side.environment[asked]}, but this machine has "
                f"{case.facts.host.hugepages_total} huge pages, none free",
                f"reserve some (sysctl -w vm.nr_hugepages=2048), or take {asked} away",
            )


def disks(case: Case) -> Iterator[Finding]:
    """KVF084: a directory that the KV cache is written to is full."""
    for path, (total, free) in case.facts.host.disks.items():
        if free < MIN_DISK_BYTES:
            yield found(
                "KVF084",
                f"{path}: {_size(free)} free of {_size(total)}",
                f"make room on the file system of {path}, or name another directory",
            )


def clocks(case: Case) -> Iterator[Finding]:
    """KVF085: wall clocks that differ."""
    for reading in case.facts.clocks:
        if abs(reading.ahead_s) >= MAX_SKEW_S:
            way = "ahead of" if reading.ahead_s > 0 else "behind"
            yield found(
                "KVF085",
                f"{reading.name} ({reading.url}): its clock is {abs(reading.ahead_s):.0f} s {way} this machine's",
                "set the clocks by NTP on every node (timedatectl set-ntp true, or chronyd)",
                severity="error" if abs(reading.ahead_s) >= REFUSED_SKEW_S else "warning",
            )


def settings_file(case: Case) -> Iterator[Finding]:
    """KVF086: kvferry's own settings do not load."""
    if case.facts.kvferry_error:
        yield found("KVF086", f"{case.facts.kvferry_path}: {case.facts.kvferry_error}")


def _size(nbytes: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} B"
