"""The checks: pure functions from a case to findings, in one table whose order is the order of likely causes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kvferry.doctor.case import Case
from kvferry.doctor.checks import (
    addresses,
    compatibility,
    devices,
    handoffs,
    live,
    machine,
    own,
    pool,
    ports,
    servers,
    transfer,
)
from kvferry.doctor.facts import Facts
from kvferry.doctor.findings import Finding, in_order

Check = Callable[[Case], Iterator[Finding]]

CHECKS: tuple[Check, ...] = (
    machine.settings_file,
    machine.stopped,
    transfer.unreadable,
    transfer.absent,
    transfer.differ,
    transfer.roles,
    transfer.ranks,
    transfer.rendezvous,
    transfer.backends,
    own.secrets,
    own.meeting_places,
    own.routers,
    own.transports,
    own.shared_memory,
    servers.files,
    servers.differing_files,
    addresses.host_ip,
    addresses.names,
    addresses.loopback,
    addresses.group_variables,
    addresses.vllm_port,
    ports.overlapping,
    ports.taken,
    own.settings_ports,
    ports.bound_to_loopback,
    devices.gpu_lists,
    devices.gpu_overlap,
    devices.gpu_strangers,
    devices.socket_interfaces,
    devices.ucx,
    servers.servers,
    servers.protocols,
    addresses.reachable,
    compatibility.models,
    compatibility.number_formats,
    compatibility.blocks,
    compatibility.ranks,
    compatibility.layouts,
    compatibility.hashing,
    compatibility.versions,
    compatibility.speculation,
    machine.shared_memory,
    machine.limits,
    machine.huge_pages,
    machine.disks,
    pool.nodes,
    pool.directory,
    machine.clocks,
    live.probe,
    live.router,
    live.instances,
    handoffs.handoffs,
    live.roles,
    handoffs.outcomes,
    live.fetching,
    live.passage,
    live.logs,
    ports.ephemeral,
)


def examine(facts: Facts) -> list[Finding]:
    """All findings, the likeliest cause first."""
    case = Case(facts)
    return in_order([finding for check in CHECKS for finding in check(case)])
