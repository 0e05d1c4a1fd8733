"""A cluster of local processes: router first, then all instances at once, watched until the router can serve."""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from kvferry.cluster.instances import (
    NUM_INTERNAL_PORTS,
    EngineKind,
    Start,
    VllmOptions,
    assign_gpus,
    start_engine,
    start_router,
    start_vllm,
    threads_each,
    visible_gpus,
)
from kvferry.cluster.processes import Child
from kvferry.cluster.router_view import RouterView
from kvferry.config import Settings
from kvferry.errors import ConfigError, KVError, PeerGone
from kvferry.observe import port_taken
from kvferry.policy.ports import InstancePorts, plan_ports
from kvferry.types import Role

POLL_S = 0.1
TELL_EVERY_S = 2.0
TELL_AGAIN_EVERY_S = 5.0
STOP_GRACE_S = 6.0
START_TIMEOUT_S: dict[EngineKind, float] = {"transformers": 180.0, "vllm": 900.0}
VLLM_PORT_BASES = range(21000, 32000, 1000)
"""Below the ports that Linux gives to outgoing connections (32768 and up)."""


@dataclass(frozen=True)
class ClusterPlan:
    """What to start.

    Args:
        settings: the tree that every process gets; the secret is made here if it has none.
        extra_roles: further instances that join the router, beyond `num_prefill` and `num_decode`.
    """

    num_prefill: int
    num_decode: int
    settings: Settings
    engine: EngineKind = "transformers"
    vllm: VllmOptions = field(default_factory=VllmOptions)
    share_gpus: bool = False
    logs_dir: Path | None = None
    port_base: int | None = None

    @property
    def instances(self) -> tuple[tuple[str, Role], ...]:
        """Names and roles of the instances that join the router."""
        prefill: list[tuple[str, Role]] = [(f"prefill-{i}", "prefill") for i in range(self.num_prefill)]
        return (*prefill, *((f"decode-{i}", "decode") for i in range(self.num_decode)))


class LocalCluster:
    """The running processes. `stop` ends all of them; so does the end of this process, however it ends.

    Args:
        tell: gets a line of text for each step of the start, and at least every few seconds.
        num_alone: instances of role `both` that `start_alone` will add; they are counted when threads are spread.
    Raises:
        ConfigError: the directory for the logs cannot be made.
    """

    def __init__(self, plan: ClusterPlan, tell: Callable[[str], None], *, num_alone: int = 0) -> None:
        replace = msgspec.structs.replace
        settings = threads_each(plan.settings, len(plan.instances) + num_alone, os.cpu_count() or 1)
        # A pool's node was started by someone else, with the secret that these settings have, if any.
        if settings.cluster.secret is None and settings.cluster.secret_file is None and not settings.engine.pool:
            settings = replace(settings, cluster=replace(settings.cluster, secret=secrets.token_hex(32)))
        self.plan = plan
        self.settings = settings
        self.children: list[Child] = []
        self.router_url = ""
        self._tell = tell
        self._told: dict[str, str] = {}
        self._held_ports: list[socket.socket] = []
        self._own_logs = plan.logs_dir is None
        self.logs_dir = plan.logs_dir or Path(tempfile.mkdtemp(prefix="kvferry-"))
        try:
            self.logs_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--logs {self.logs_dir}: {error.strerror}; name a directory to write into") from error

    async def start(self) -> None:
        """Start everything and wait until the router serves and knows every instance.

        Raises:
            ConfigError: a port is taken; the message names the process that holds it.
            PeerGone: a process ended or was not ready in time; the message has its last log lines.
        After failure: `stop` must still be called.
        """
        router = self.settings.router
        if router.port:
            # Found out before anything starts, so that the message comes at once.
            hold_port(router.host, router.port, "router.port").close()
        gpus = self._gpus()
        ports = self._vllm_ports() if self.plan.engine == "vllm" else {}
        child = self._launch(start_router(self.settings, os.environ))
        deadline_s = time.monotonic() + START_TIMEOUT_S[self.plan.engine]
        self.router_url = await self._url_of(child, deadline_s)
        self._tell(f"router listens on {self.router_url}")
        for name, role in self.plan.instances:
            self._launch(self._instance_start(name, role, gpus[name], ports.get(name)))
        await self._wait_joined({name for name, _ in self.plan.instances}, deadline_s)

    async def start_alone(self, name: str) -> str:
        """Start an instance of role `both` that joins no router, and give its URL when it serves.

        Raises:
            PeerGone: as `start`.
        """
        gpus = assign_gpus(visible_gpus(os.environ), 1, share=True, needed=False)
        start = start_engine(self.settings, os.environ, name=name, role="both", router_url=None, gpus=gpus[0])
        return await self._url_of(self._launch(start), time.monotonic() + START_TIMEOUT_S["transformers"])

    def check(self) -> None:
        """Raise if a process has died.

        Raises:
            PeerGone: names it, with its last log lines.
        """
        for child in self.children:
            if child.has_died:
                raise PeerGone(child.why_it_died(), peer=child.name)

    async def stop(self, *, keep_logs: bool = False) -> None:
        """End every process, instances before the router so that they can leave it. Idempotent."""
        instances = [child for child in self.children if child.name != "router"]
        try:
            await asyncio.gather(*(child.stop(STOP_GRACE_S) for child in instances))
            await asyncio.gather(*(child.stop(STOP_GRACE_S) for child in self.children))
        finally:
            self.kill()
            self._let_go_of_ports()
            if self._own_logs and not keep_logs:
                shutil.rmtree(self.logs_dir, ignore_errors=True)

    def kill(self) -> None:
        """End every process at once."""
        for child in self.children:
            child.kill()

    def _launch(self, start: Start) -> Child:
        child = Child(
            start.name, start.argv, start.environ, self.logs_dir / f"{start.name}.log", death_signal=start.death_signal
        )
        child.url = start.url
        child.start()
        self.children.append(child)
        return child

    def _gpus(self) -> dict[str, list[str] | None]:
        names = [name for name, _ in self.plan.instances]
        needed = self.plan.engine == "vllm"
        gpus = assign_gpus(visible_gpus(os.environ), len(names), share=self.plan.share_gpus, needed=needed)
        return dict(zip(names, gpus, strict=True))

    def _instance_start(self, name: str, role: Role, gpus: list[str] | None, ports: InstancePorts | None) -> Start:
        settings, url = self.settings, self.router_url
        if ports is None:
            return start_engine(settings, os.environ, name=name, role=role, router_url=url, gpus=gpus)
        options = self.plan.vllm
        return start_vllm(
            settings, os.environ, name=name, role=role, router_url=url, ports=ports, gpus=gpus, options=options
        )

    def _vllm_ports(self) -> dict[str, InstancePorts]:
        """Ports for every instance: from the given base, else from the first where all are free; HTTP ports held."""
        bases = [self.plan.port_base] if self.plan.port_base is not None else VLLM_PORT_BASES
        for base in bases:
            plan = plan_ports(
                base,
                num_prefill=self.plan.num_prefill,
                num_decode=self.plan.num_decode,
                num_internal=NUM_INTERNAL_PORTS,
            )
            try:
                for ports in (*plan.prefill, *plan.decode):
                    self._held_ports.append(self._hold(ports))
            except ConfigError:
                self._let_go_of_ports()
                if base == bases[-1]:
                    raise
            else:
                break
        by_role = {"prefill": plan.prefill, "decode": plan.decode}
        return {name: by_role[role][int(name.rpartition("-")[2])] for name, role in self.plan.instances}

    def _hold(self, ports: InstancePorts) -> socket.socket:
        host = self.settings.engine.host
        hold_port(host, ports.master, "MASTER_PORT").close()
        return hold_port(host, ports.http, "HTTP port of vLLM")

    def _let_go_of_ports(self) -> None:
        for held in self._held_ports:
            held.close()
        self._held_ports = []

    async def _url_of(self, child: Child, deadline_s: float) -> str:
        told_s = time.monotonic()
        while (url := child.told_url()) is None:
            self.check()
            told_s = self._tell_now_and_then([child], told_s)
            self._require_time(deadline_s, [child])
            await asyncio.sleep(POLL_S)
        return url

    async def _wait_joined(self, names: set[str], deadline_s: float) -> None:
        """Until the router has all of them in its table and says that it is ready."""
        told_s, joined = time.monotonic(), set[str]()
        async with RouterView(self.router_url) as router:
            while True:
                self.check()
                try:
                    here = {report.instance_id for report in await router.instances()}
                    ready = here >= names and await router.is_ready()
                except KVError:
                    here, ready = joined, False
                for name in sorted((here & names) - joined):
                    self._tell(f"{name} has joined")
                joined = here
                if ready:
                    return
                waiting = [child for child in self.children if child.name in names - joined]
                told_s = self._tell_now_and_then(waiting, told_s)
                self._require_time(deadline_s, waiting)
                await asyncio.sleep(POLL_S)

    def _tell_now_and_then(self, waiting: Sequence[Child], told_s: float) -> float:
        """Say who is waited for and what it said last; often while that is news, now and then when it is not."""
        silent_s = time.monotonic() - told_s
        if not waiting or silent_s < TELL_EVERY_S:
            return told_s
        names = ", ".join(child.name for child in waiting)
        last = waiting[0].tail(1)
        news = last[0][:120] if last else "starting Python and importing its libraries"
        if news == self._told.get(names) and silent_s < TELL_AGAIN_EVERY_S:
            return told_s
        self._told[names] = news
        self._tell(f"{waiting[0].age_s:.0f} s, waiting for {names}: {news}")
        return time.monotonic()

    def _require_time(self, deadline_s: float, waiting: Sequence[Child]) -> None:
        if time.monotonic() < deadline_s:
            return
        said = "".join(
            f"\n{child.name}, {child.log_path}:" + "".join(f"\n  {line}" for line in child.tail(6)) for child in waiting
        )
        names = ", ".join(child.name for child in waiting) or "the router"
        raise PeerGone(f"not ready {START_TIMEOUT_S[self.plan.engine]:.0f} s after the start: {names}{said}")


def hold_port(host: str, port: int, what: str) -> socket.socket:
    """Bind a port without listening: nobody gets it by chance meanwhile, and who asks for it by number still can.

    That is Linux's rule for sockets with SO_REUSEADDR of which only one listens.

    Raises:
        ConfigError: the port is taken; the message names the process that holds it.
    """
    held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        held.bind((host, port))
    except OSError as error:
        held.close()
        if error.errno != errno.EADDRINUSE:
            raise ConfigError(f"{what}: port {port} on {host} can't be bound: {error}") from error
        raise port_taken(host, port, what) from error
    return held
