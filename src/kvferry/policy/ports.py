"""Fixed ports for a cluster on one node, such that no two uses can meet. Pure.

With port 0 nothing of this is needed: listeners tell what they bound. It is for engines that must be given their ports
before they start (vLLM), and for sites whose firewalls know ports by number.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvferry.errors import ConfigError

MIN_ROLE_DISTANCE = 5
"""The prefill base is at least this far above the decode base. Source: the field's own rule against clashes."""


@dataclass(frozen=True)
class InstancePorts:
    """What one instance may bind: consecutive ports, each with one use."""

    http: int
    handoff: tuple[int, ...]
    master: int
    internal: tuple[int, ...]

    @property
    def all(self) -> tuple[int, ...]:
        return (self.http, *self.handoff, self.master, *self.internal)


@dataclass(frozen=True)
class PortPlan:
    """The ports of every instance of a node; no port occurs twice."""

    decode: tuple[InstancePorts, ...]
    prefill: tuple[InstancePorts, ...]

    @property
    def all(self) -> tuple[int, ...]:
        return tuple(port for ports in (*self.decode, *self.prefill) for port in ports.all)


def plan_ports(
    decode_base: int,
    *,
    num_prefill: int,
    num_decode: int,
    num_ranks: int = 1,
    num_internal: int = 0,
    prefill_base: int | None = None,
) -> PortPlan:
    """Lay out instances one after the other from each role's base.

    Args:
        num_ranks: tensor-parallel ranks of each instance; each has a handoff listener.
        num_internal: ports that an engine takes upward from a base of its own (VLLM_PORT).
        prefill_base: by default the first that fits above the decode instances.
    Raises:
        ConfigError: the ranges overlap or leave 1024..65535; names the numbers.
    """
    each = 2 + num_ranks + num_internal
    needed = max(MIN_ROLE_DISTANCE, num_decode * each)
    if prefill_base is None:
        prefill_base = decode_base + needed
    if prefill_base < decode_base + needed:
        raise ConfigError(
            f"prefill base port {prefill_base} is {prefill_base - decode_base} above decode base port {decode_base}; "
            f"{num_decode} decode instances of {each} ports need {needed}: use {decode_base + needed} or more"
        )
    end = prefill_base + num_prefill * each
    if decode_base < 1024 or end > 65536:
        raise ConfigError(f"ports {decode_base} to {end - 1} leave 1024 to 65535; choose another base port")

    def instance(first: int) -> InstancePorts:
        handoff = tuple(range(first + 1, first + 1 + num_ranks))
        master = first + 1 + num_ranks
        return InstancePorts(first, handoff, master, tuple(range(master + 1, first + each)))

    return PortPlan(
        decode=tuple(instance(decode_base + at * each) for at in range(num_decode)),
        prefill=tuple(instance(prefill_base + at * each) for at in range(num_prefill)),
    )
