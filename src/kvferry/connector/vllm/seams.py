"""Between vLLM's objects and the two halves: classes that vLLM carries between processes, and a step's requests."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvferry.connector.vllm.metadata import RankReport, StepPlan
from kvferry.connector.vllm.scheduler import Scheduled
from kvferry.errors import ConfigError
from kvferry.pool import BlockSpace

_log = logging.getLogger("kvferry.vllm")


@dataclass
class KVFerryMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """One step's plan, on its way to the workers."""

    plan: StepPlan


@dataclass
class KVFerryAddress(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """Where one rank really listens, and what its blocks are in the pool, on its way to the scheduler half."""

    address: str
    pool_space: BlockSpace | None = None


@dataclass
class KVFerryReports(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """How loads ended on the workers, on its way to the scheduler half."""

    reports: list[RankReport] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVFerryReports:
        return KVFerryReports(self.reports + other.reports)


def scheduled_requests(scheduler_output: Any) -> list[Scheduled]:
    """The requests of a step, in both model runners' forms.

    V1 lists a request that resumes after a preemption in `resumed_req_ids` with its whole table; V2 lists it again
    among the new ones.
    """
    num_scheduled = scheduler_output.num_scheduled_tokens
    found = [
        _scheduled(new.req_id, new.block_ids, True, new.num_computed_tokens, num_scheduled)
        for new in scheduler_output.scheduled_new_reqs
    ]
    cached = scheduler_output.scheduled_cached_reqs
    for request_id, added, num_computed in zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    ):
        replaces = request_id in cached.resumed_req_ids
        found.append(_scheduled(request_id, added or ([],), replaces, num_computed, num_scheduled))
    return found


def _scheduled(
    request_id: str, groups: tuple[list[int], ...], replaces: bool, num_computed: int, num_scheduled: dict[str, int]
) -> Scheduled:
    first, *others = groups
    return Scheduled(request_id, first, replaces, num_computed, num_scheduled.get(request_id, 0), tuple(others))


def event_recorder(device: torch.device) -> Callable[[], Any]:
    """Marks this device's current stream with an event."""

    def record() -> Any:
        # A blocking event lets the waiting thread sleep instead of spinning beside the engine.
        event: Any = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event

    return record


def hook_named(name: str | None) -> Callable[[dict[str, torch.Tensor], list[int]], None] | None:
    """The function `package.module:function`. Raises: ConfigError: there is none."""
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        hook: Callable[[dict[str, torch.Tensor], list[int]], None] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"kv_connector_extra_config.on_loaded is {name!r}: {error}") from error
    _log.warning("every delivered handoff goes through %s: this is for tests", name)
    return hook


@functools.cache
def log_as_vllm_does() -> None:
    """Send kvferry's log lines where vLLM's go."""
    theirs, ours = logging.getLogger("vllm"), logging.getLogger("kvferry")
    ours.handlers = list(theirs.handlers)
    ours.setLevel(theirs.level or logging.INFO)
    ours.propagate = False
