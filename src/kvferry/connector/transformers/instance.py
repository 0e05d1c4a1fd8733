"""One instance of the embedded engine as a process: model, KV memory, handoff node, HTTP server, registration."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import signal
import socket
from typing import Any

import msgspec
import torch
from aiohttp import web

from kvferry import __version__
from kvferry.addresses import is_wildcard
from kvferry.config import Settings, cluster_secret
from kvferry.connector.transformers.engine import Engine
from kvferry.connector.transformers.memory import KVMemory
from kvferry.connector.transformers.metrics import EngineMetrics
from kvferry.connector.transformers.model import load_model
from kvferry.connector.transformers.openai.app import OpenAIServer
from kvferry.errors import ConfigError
from kvferry.handoff.membership import RouterClient
from kvferry.handoff.node import HandoffNode
from kvferry.observe import get_log, port_taken, tell_listening
from kvferry.pool import BlockSpace, PoolAttachment
from kvferry.protocol.lease import HandoffSettings as ProtocolSettings
from kvferry.protocol.membership import InstanceReport
from kvferry.transfer import TransferSettings
from kvferry.types import Outcome

log = get_log(__name__)


class EngineInstance:
    """Everything of one instance. `serve` runs it on the caller's event loop until it is told to stop."""

    def __init__(self, settings: Settings) -> None:
        """Load the model and lay out the KV memory; takes seconds.

        Raises:
            ConfigError: the model cannot be loaded, or a setting does not fit it.
            CompatibilityError: the model's architecture is not one that this engine serves.
        """
        self.settings = settings
        engine = settings.engine
        if is_wildcard(engine.host) and settings.cluster.advertise_host is None:
            raise ConfigError(
                f"engine.host {engine.host} takes connections on every interface, but tells the router none of them: "
                "set cluster.advertise_host to a name or address at which the other machines reach this one"
            )
        if engine.num_threads is not None:
            torch.set_num_threads(engine.num_threads)
        self._secret = cluster_secret(settings)
        self._loaded = load_model(
            engine.model,
            served_name=engine.served_model_name,
            device=engine.device,
            dtype=engine.dtype,
            max_model_len=engine.max_model_len,
        )
        self.instance_id = engine.instance_id or f"{engine.role}-{socket.gethostname()}-{os.getpid()}"
        self._metrics = EngineMetrics()
        self._client: RouterClient | None = None
        self.node = HandoffNode(
            instance_id=self.instance_id,
            fingerprint=self._loaded.fingerprint(engine.block_size),
            listen=settings.handoff.listen,
            advertise_host=settings.cluster.advertise_host,
            secret=self._secret,
            settings=ProtocolSettings(
                lease_ttl_s=settings.handoff.lease_ttl_s,
                heartbeat_s=settings.handoff.heartbeat_s,
                max_per_peer=settings.handoff.max_parked,
                num_slots=settings.handoff.max_handoffs,
                recompute_on_failure=settings.handoff.on_failure == "recompute",
            ),
            transfer=_transfer_settings(settings),
            transports=settings.transfer.transports,
            digest=settings.handoff.digest,
            wake=lambda: self.engine.wake(),
        )
        self._memory = self._make_memory()
        self._pool = self._join_pool()
        if self._pool is not None:
            self._metrics.watch_pool(self._pool.stats)
        self.engine = Engine(
            self._loaded,
            self._memory,
            engine,
            handoff=settings.handoff,
            port=self.node,
            pool=self._pool,
            report=self._report_outcome,
        )
        self._server = OpenAIServer(
            self.engine,
            namespace=settings.cluster.namespace,
            incarnation=self.node.incarnation,
            render_metrics=lambda: self._metrics.render(self.engine.snapshot),
            debug_kv=self.debug_kv,
        )
        self._url = ""
        self._stop = asyncio.Event()

    async def serve(self) -> None:
        """Start everything, tell the URL on standard output, and serve until SIGTERM, SIGINT or `stop`.

        Raises: ConfigError: a port is taken (names its holder), or the secret is missing beyond loopback.
        """
        runner = web.AppRunner(
            self._server.make_app(), handler_cancellation=True, access_log=None, shutdown_timeout=2.0
        )
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._stop.set)
        try:
            self.node.start(self._memory.layout(region=0))
            self.engine.start()
            await runner.setup()
            self._url = await self._bind(runner)
            self._join_router()
            log.info(
                "instance serves",
                instance=self.instance_id,
                role=self.settings.engine.role,
                model=self._loaded.name,
                url=self._url,
                handoffs=self.node.address,
                device=str(self._loaded.device),
                blocks=self._memory.num_blocks,
            )
            # What was loaded stays until the end: the collector need not look at it again, at the end neither.
            gc.collect()
            gc.freeze()
            tell_listening(self._url)
            await self._wait_for_end()
        finally:
            if self._client is not None:
                await asyncio.to_thread(self._client.close)
            self.engine.close()
            await runner.cleanup()
            if self._pool is not None:
                self._pool.close()
            self.node.close()

    def stop(self) -> None:
        """Make `serve` return. Call it on its event loop."""
        self._stop.set()

    def report(self) -> InstanceReport:
        """What the router learns at each heartbeat."""
        now, engine = self.engine.snapshot, self.settings.engine
        return InstanceReport(
            instance_id=self.instance_id,
            incarnation=self.node.incarnation,
            role=engine.role,
            url=self._url,
            addresses=(self.node.address,),
            model=self._loaded.name,
            fingerprint=self.node.fingerprint,
            engine="transformers",
            version=__version__,
            num_blocks=now.num_blocks,
            free_blocks=now.free_blocks,
            running=now.running,
            waiting=now.waiting + now.parked,
            step=now.step,
            handoffs=tuple(self.node.views()),
        )

    def debug_kv(self) -> dict[str, Any]:
        """The body of /debug/kv."""
        snapshot: dict[str, Any] = msgspec.to_builtins(self.engine.snapshot)
        return {
            "instance_id": self.instance_id,
            "incarnation": self.node.incarnation,
            "role": self.settings.engine.role,
            "address": self.node.address,
            **snapshot,
            "held": snapshot["held_blocks"],
            "num_handoffs": snapshot["handoffs"],
            "handoffs": msgspec.to_builtins(self.node.views()),
            "pool": msgspec.to_builtins(self._pool and self._pool.stats()),
        }

    def _make_memory(self) -> KVMemory:
        """KV memory that peers can reach: shared memory of this host, or the GPU's."""
        engine = self.settings.engine
        geometry = self._loaded.geometry(engine.block_size)
        nbytes = geometry.arena_bytes(engine.num_blocks)
        if self._loaded.device.type == "cuda":
            arena = torch.zeros(nbytes, dtype=torch.uint8, device=self._loaded.device)
            self.node.register(arena)
        else:
            arena = torch.from_numpy(self.node.allocate(nbytes))
        return KVMemory(geometry, engine.num_blocks, arena)

    def _join_pool(self) -> PoolAttachment | None:
        """The tie to the KV pool. Raises: ConfigError for memory that no pool serves; no node need be there yet."""
        engine, layout = self.settings.engine, self._memory.layout(region=0)
        if not engine.pool:
            return None
        return PoolAttachment(
            engine.pool,
            BlockSpace.of(self.node.fingerprint, layout, self.settings.cluster.namespace),
            layout,
            {0: self._memory.arena},
            secret=self._secret,
            directory=self.settings.pool.directory,
            listen=self.settings.handoff.listen,
            deadline_s=engine.pool_deadline_s,
            staging_bytes=engine.pool_staging_bytes,
            # Blocks that wait to be saved are missing to new requests.
            max_saving_bytes=min(engine.pool_saving_bytes, self._memory.arena.numel() // 4),
            wake=lambda: self.engine.wake(),
        )

    def _join_router(self) -> None:
        url = self.settings.cluster.router_url
        if url is not None:
            self._client = RouterClient(url, self._secret, self.report)
            self._client.start()

    def _report_outcome(self, outcome: Outcome) -> None:
        log.info(
            "handoff ended",
            handoff=outcome.handoff,
            state=str(outcome.state),
            stage=outcome.stage,
            cause=outcome.cause,
            detail=outcome.detail,
            tokens_computed=outcome.tokens_computed,
            bytes=outcome.bytes_moved,
            seconds=outcome.duration_s,
            transport=outcome.transport,
        )
        self._metrics.handoffs.count_end(outcome)
        if self._client is not None:
            self._client.report_outcome(outcome)

    async def _bind(self, runner: web.AppRunner) -> str:
        engine, advertised = self.settings.engine, self.settings.cluster.advertise_host
        site = web.TCPSite(runner, engine.host, engine.port)
        try:
            await site.start()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise port_taken(engine.host, engine.port, "engine.port") from error
            raise ConfigError(f"engine.host: cannot bind {engine.host} port {engine.port}: {error.strerror}") from error
        host, port = runner.addresses[0][:2]
        shown = advertised or host
        return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"

    async def _wait_for_end(self) -> None:
        """Until told to stop, or the serving thread has died: a process that cannot serve must not look alive."""
        while not self._stop.is_set() and self.engine.healthy:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await self._stop.wait()
        if not self._stop.is_set():
            logging.getLogger(__name__).critical("the engine's serving loop has died; this process ends")
            raise RuntimeError("the engine's serving loop has died; its traceback is in the log above")


def _transfer_settings(settings: Settings) -> TransferSettings:
    """The transfer engine's settings from the tree. A setting that the engine does not know is a TypeError here."""
    given = msgspec.structs.asdict(settings.transfer)
    del given["transports"]
    return TransferSettings(max_bytes_in_flight=given.pop("max_in_flight_bytes"), **given)
