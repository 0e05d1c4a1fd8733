"""The class that vLLM loads. It translates vLLM's calls for the two halves and decides nothing itself.

vLLM makes one in the scheduler's process (role SCHEDULER) and one in each worker (role WORKER).
"""

from __future__ import annotations

import logging
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1 import base as vllm_base
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole
from vllm.version import __version__ as vllm_version

from kvferry.connector.vllm import layouts, stats
from kvferry.connector.vllm.memory import open_node
from kvferry.connector.vllm.metadata import StepPlan
from kvferry.connector.vllm.metrics import KVFerryPromMetrics, KVFerryStats
from kvferry.connector.vllm.model import (
    ROLES,
    fingerprint_of,
    incarnation_of,
    model_name,
    prompt_identity,
    require_usable,
    windows_of,
)
from kvferry.connector.vllm.pace import Pace
from kvferry.connector.vllm.pool import attach_lookup, attach_memory, pool_fingerprint, require_pool_usable
from kvferry.connector.vllm.pool_scheduler import PoolSchedulerHalf
from kvferry.connector.vllm.pool_worker import PoolWorkerHalf
from kvferry.connector.vllm.registration import Registration
from kvferry.connector.vllm.scheduler import Ending, SchedulerHalf
from kvferry.connector.vllm.seams import (
    KVFerryAddress,
    KVFerryMetadata,
    KVFerryReports,
    event_recorder,
    hook_named,
    log_as_vllm_does,
    scheduled_requests,
)
from kvferry.connector.vllm.settings import settings_from_extra_config
from kvferry.connector.vllm.stream import AfterForward
from kvferry.connector.vllm.trace import Trace
from kvferry.connector.vllm.worker import WorkerHalf
from kvferry.pool import BlockSpace, PoolAttachment
from kvferry.types import Outcome

ENDINGS: dict[str, Ending] = {"FINISHED_ABORTED": "aborted", "FINISHED_IGNORED": "failed", "FINISHED_ERROR": "failed"}
EMPTY_STEP_S = 0.002
"""How long a step without a forward rests while blocks wait to be loaded, saved or let go; a new request waits no
longer for vLLM's scheduler than that."""

SWITCH_INTERVAL_S = 0.0005
_log = logging.getLogger("kvferry.vllm")


TRANSFER_RESULTS: Any = getattr(vllm_base, "KVConnectorTransferResults", None)
FAILS_REQUESTS = TRANSFER_RESULTS is not None
"""Whether this vLLM recomputes a request whose load failed by its id. Without that it needs the failed blocks' ids,
which are unique within one KV cache group only."""

_WORKERS_HERE: weakref.WeakValueDictionary[str, WorkerHalf] = weakref.WeakValueDictionary()
"""Worker halves of this process, by engine: with one rank vLLM runs it on the scheduler's thread."""

_BASES: Any = (KVConnectorBase_V1, vllm_base.SupportsHMA) if FAILS_REQUESTS else (KVConnectorBase_V1,)


class KVFerryConnector(*_BASES):  # type: ignore[misc]
    """Hands the KV cache of a prompt from the vLLM instance that computed it to the one that decodes.

    It is `SupportsHMA` only where several block tables can be recomputed after a failed load: elsewhere vLLM then gives
    all layers one.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        log_as_vllm_does()
        config = vllm_config.kv_transfer_config
        self._settings = settings_from_extra_config(config.kv_connector_extra_config)
        has_pool = self._settings.pool is not None
        require_usable(vllm_config, kv_cache_config, fails_requests=FAILS_REQUESTS, has_pool=has_pool)
        self._windows = windows_of(kv_cache_config)
        self._fingerprint = fingerprint_of(vllm_config, kv_cache_config, self._settings)
        self._stats = KVFerryStats()
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        self._worker_here: WorkerHalf | None = None
        self._pool: PoolAttachment | None = None
        self._pool_scheduler: PoolSchedulerHalf | None = None
        self._pool_worker: PoolWorkerHalf | None = None
        self._pool_space: BlockSpace | None = None
        self._released: set[str] = set()
        self._found_in_pool: set[str] = set()
        if self._settings.pool is not None:
            require_pool_usable(vllm_config)
        if role is KVConnectorRole.SCHEDULER:
            self._start_scheduler(config.kv_load_failure_policy)

    # Worker half

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        parallel = self._vllm_config.parallel_config
        rank, size = parallel.rank % parallel.tensor_parallel_size, parallel.tensor_parallel_size
        geometry = layouts.Geometry(self._kv_cache_config.num_blocks, self._fingerprint.block_size, rank, size)
        hook = hook_named(self._settings.on_loaded)
        news = threading.Event()
        self._node = open_node(
            kv_caches,
            geometry,
            settings=self._settings,
            fingerprint=self._fingerprint,
            instance_id=self._instance_id(),
            incarnation=incarnation_of(self._vllm_config),
            wake=news.set,
        )
        self._layer_numbers = {name: i + 1 for i, name in enumerate(layouts.distinct_layers(kv_caches))}
        device = next(iter(kv_caches.values())).device

        def on_loaded(block_ids: list[int]) -> None:
            self._stats.data[stats.PULLED_BLOCKS] += len(block_ids)
            if hook is not None:
                hook(kv_caches, block_ids)

        self._trace = Trace(self._settings.trace, f"worker-{rank}")
        self._after_forward = AfterForward(event_recorder(device) if device.type == "cuda" else None)
        wanted = self._settings.layers_a_publish
        fixed = None if wanted == "auto" else wanted
        assert self._node.layout is not None
        pace = Pace(len(self._layer_numbers), self._node.layout.block_bytes, fixed=fixed)
        self._worker = WorkerHalf(
            self._node,
            rank=rank,
            num_ranks=size,
            num_layers=len(self._layer_numbers),
            after_forward=self._after_forward,
            pace=pace,
            on_paced=lambda pieces: stats.count_label(self._stats.data, stats.PUBLICATIONS, str(pieces)),
            num_groups=len(self._windows),
            fail_requests=self._windows != (None,),
            news=news,
            on_loaded=on_loaded,
            on_released=lambda reason: stats.count_release(self._stats.data, reason),
            trace=self._trace,
        )
        if size == 1:
            _WORKERS_HERE[self._engine_id] = self._worker
        if self._settings.pool is not None:
            self._start_pool_worker(kv_caches, geometry, news, None if hook is None else lambda b: hook(kv_caches, b))
        # The node's thread needs the interpreter for microseconds, in the middle of vLLM's long run of launches: by
        # default it would wait 5 ms for it.
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_INTERVAL_S))
        _log.info("rank %d of %d listens on %s", rank, size, self._node.address)

    def _start_pool_worker(
        self,
        kv_caches: dict[str, torch.Tensor],
        geometry: layouts.Geometry,
        news: threading.Event,
        on_loaded: Callable[[list[int]], None] | None,
    ) -> None:
        self._pool, self._pool_space = attach_memory(
            kv_caches,
            geometry,
            settings=self._settings,
            fingerprint=pool_fingerprint(self._vllm_config, self._fingerprint),
            wake=news.set,
        )
        self._pool_worker = PoolWorkerHalf(
            self._pool,
            after_forward=self._after_forward,
            on_loaded=on_loaded,
            count_load=lambda loaded, wanted: stats.count_load(self._stats.data, loaded, wanted),
            count_saved=lambda saved: stats.count_saved(self._stats.data, saved),
            trace=self._trace,
        )

    def get_handshake_metadata(self) -> KVFerryAddress | None:
        return KVFerryAddress(self._node.address, self._pool_space)

    def handle_preemptions(self, kv_connector_metadata: KVFerryMetadata) -> None:
        if self._worker is not None:
            self._worker.begin_step(kv_connector_metadata.plan)
        if self._pool_worker is not None:
            self._pool_worker.begin_step(kv_connector_metadata.plan)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker is not None:
            self._worker.start_pulls(self._plan())
        if self._pool_worker is not None:
            self._pool_worker.start_loads(self._plan())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: a request runs only after its whole load."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        if self._worker is not None and (number := self._layer_numbers.get(layer_name)):
            self._worker.layer_done(self._plan(), number)

    def wait_for_save(self) -> None:
        if self._worker is not None and self.has_connector_metadata():
            self._worker.publish(self._plan())
            if self._pool_worker is not None:
                self._pool_worker.save(self._plan())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        worker, pool = self._worker, self._pool_worker
        if worker is None:
            return None, None
        if self.has_connector_metadata() and self._plan().is_empty_step:
            worker.wait_for_news(EMPTY_STEP_S, also=pool is not None and not pool.is_idle())
        sent, loaded = worker.finished(finished_req_ids)
        if pool is None:
            return sent, loaded
        saved, from_pool = pool.finished(finished_req_ids)
        # A request's blocks may go when neither a target nor the pool reads them any more.
        self._released |= sent | saved
        free = {r for r in self._released if not worker.holds(r) and not pool.holds(r)}
        self._released -= free
        return free, loaded | from_pool

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        sent, loaded = self.get_finished(finished_req_ids)
        failed = self._worker.take_failed_requests() if self._worker is not None else set()
        return TRANSFER_RESULTS(sent or set(), loaded or set(), failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed = self._worker.take_failed_blocks() if self._worker is not None else set()
        return failed | self._pool_worker.take_failed_blocks() if self._pool_worker is not None else failed

    def build_connector_worker_meta(self) -> KVFerryReports | None:
        if self._worker is None:
            return None
        reports = self._worker.take_reports()
        # Of a step without a forward vLLM passes on only an output that holds something, and `update_connector_output`
        # has to be called while a load may end.
        wanted = self._worker.scheduler_is_here and self._worker.is_loading()
        return KVFerryReports(reports) if reports or wanted else None

    # Scheduler half

    def _start_scheduler(self, policy: str) -> None:
        config = self._vllm_config.kv_transfer_config
        if policy != "recompute":
            _log.warning(
                "kv_load_failure_policy is %r: a handoff that fails ends its request with an error; set it to "
                '"recompute" in --kv-transfer-config to compute the prompt here instead', policy,
            )  # fmt: skip
        self._registration = Registration(
            router=self._settings.router,
            secret=self._settings.secret(),
            url=self._settings.url or "",
            instance_id=self._instance_id(),
            incarnation=incarnation_of(self._vllm_config),
            role=ROLES[config.kv_role],
            model=model_name(self._vllm_config, self._settings),
            version=vllm_version,
            fingerprint=self._fingerprint,
        )
        self._registration.state.num_blocks = self._kv_cache_config.num_blocks
        self._trace = Trace(self._settings.trace, "scheduler")
        self._scheduler = SchedulerHalf(
            fingerprint=self._fingerprint,
            num_ranks=self._vllm_config.parallel_config.tensor_parallel_size,
            recompute=policy == "recompute",
            on_outcome=self._on_outcome,
            max_loading_blocks=int(self._kv_cache_config.num_blocks * self._settings.max_loading_share),
            namespace=self._settings.namespace,
            windows=self._windows,
            keep=lambda block_ids: self._blocks.touch([self._blocks.blocks[b] for b in block_ids]),
            let_go=lambda block_ids: self._blocks.free_blocks([self._blocks.blocks[b] for b in block_ids]),
        )

    @property
    def _book(self) -> SchedulerHalf:
        assert self._scheduler is not None, "only the scheduler's connector is asked this"
        return self._scheduler

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self._blocks = gpu_block_pool
        self._registration.state.free_blocks = gpu_block_pool.get_num_free_blocks

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVFerryAddress]) -> None:
        ranks = [metadata[rank] for rank in sorted(metadata)]
        # Taken out: an id that a user gave to two engines of one process must not show one the other's arrivals.
        self._worker_here = _WORKERS_HERE.pop(self._engine_id, None)
        if self._worker_here is not None:
            self._worker_here.scheduler_is_here = True
        self._registration.join(tuple(rank.address for rank in ranks))
        # All ranks save alike: what one of them has, the others had too, and a block that is gone is a failed load.
        if ranks[0].pool_space is not None:
            self._pool = attach_lookup(ranks[0].pool_space, self._settings)
            self._pool_scheduler = PoolSchedulerHalf(
                block_size=self._fingerprint.block_size,
                look_up=self._pool.lookup,
                prefetch=self._pool.prefetch,
                wait_s=self._settings.pool_wait_s,
                count=lambda result: stats.count_label(self._stats.data, stats.POOL_LOOKUPS, result),
            )

    def on_new_request(self, request: Any) -> None:
        self._registration.state.running += 1
        self._trace(request.request_id, "new")
        num_targets = self._book.num_targets
        self._book.on_new_request(request, identity=prompt_identity(request))
        if self._pool_scheduler is not None:
            self._pool_scheduler.on_new_request(
                request.request_id,
                request.block_hashes,
                request.num_tokens,
                is_brought=self._book.num_targets > num_targets,
            )

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        request_id, pool = request.request_id, self._pool_scheduler
        self._found_in_pool.discard(request_id)
        num_tokens = self._book.num_new_matched_tokens(request_id, num_computed_tokens)
        if num_tokens == 0 and pool is not None:
            # No handoff, or one that has failed.
            num_tokens = pool.num_new_matched_tokens(request_id, num_computed_tokens, request.num_tokens)
            if num_tokens:
                self._found_in_pool.add(request_id)
        return num_tokens, bool(num_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        request_id, (block_ids, *others) = request.request_id, blocks.get_block_ids()
        if num_external_tokens and request_id in self._found_in_pool and self._pool_scheduler is not None:
            self._pool_scheduler.allocated(request_id, block_ids, num_external_tokens)
            num_external_tokens = 0
        self._book.allocated(request_id, block_ids, num_external_tokens, other_groups=others)

    def build_connector_meta(self, scheduler_output: Any) -> KVFerryMetadata:
        self._registration.state.step += 1
        scheduled = scheduled_requests(scheduler_output)
        for item in scheduled:
            self._trace(item.request_id, f"scheduled from {item.num_computed}, {item.num_scheduled} tokens")
        preempted = scheduler_output.preempted_req_ids or ()
        plan = self._book.step(scheduled, preempted)
        if self._pool_scheduler is not None:
            self._pool_scheduler.step(plan, scheduled, preempted)
        return KVFerryMetadata(plan)

    def update_connector_output(self, connector_output: Any) -> None:
        meta = connector_output.kv_connector_worker_meta
        reports = list(meta.reports) if meta is not None else []
        if (worker := self._worker_here) is not None:
            # This output may be that of the step before, and vLLM reads it after this call: what has arrived since then
            # can be scheduled next.
            connector_output.finished_recving = (connector_output.finished_recving or set()) | worker.take_delivered()
            reports += worker.take_reports()
        for report in reports:
            self._trace(report.request_id, "reported")
        self._book.reported(reports)
        self._book.sent(connector_output.finished_sending or ())

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._registration.state.running -= 1
        self._trace(request.request_id, "finished")
        ending = ENDINGS.get(request.status.name, "answered")
        held = self._book.finished(request.request_id, ending, has_blocks=bool(block_ids))
        self._found_in_pool.discard(request.request_id)
        if self._pool_scheduler is not None:
            held |= self._pool_scheduler.finished(request.request_id, has_blocks=bool(block_ids))
        return held, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, [block_id for table in block_ids for block_id in table])

    def _on_outcome(self, outcome: Outcome, recomputed_tokens: int) -> None:
        stats.count_outcome(self._stats.data, outcome, recomputed_tokens)
        self._registration.report_outcome(outcome)

    # Both

    def get_kv_connector_stats(self) -> KVFerryStats | None:
        if self._stats.is_empty():
            return None
        taken, self._stats = self._stats, KVFerryStats()
        return taken

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVFerryStats:
        return KVFerryStats(data=data) if data is not None else KVFerryStats()

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any
    ) -> KVFerryPromMetrics:
        return KVFerryPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """A full CUDA graph replays attention without `save_kv_layer`, which publishing by layers needs."""
        wanted = settings_from_extra_config(extra_config).layers_a_publish
        return wanted != "auto" and wanted > 0

    def shutdown(self) -> None:
        if self._worker is not None:
            self._after_forward.close()
            self._node.close()
        if self._pool is not None:
            self._pool.close()
        if self._scheduler is not None:
            self._registration.close()
        if self._worker is not None or self._scheduler is not None:
            self._trace.close()

    @property
    def _engine_id(self) -> str:
        return str(self._vllm_config.kv_transfer_config.engine_id)

    def _instance_id(self) -> str:
        return self._settings.instance_id or f"vllm-{self._engine_id[:8]}"

    def _plan(self) -> StepPlan:
        plan: StepPlan = self._get_connector_metadata().plan
        return plan
