"""Command lines and environments of the processes of a cluster. Pure, so that a test can read what would be started."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from kvferry.addresses import is_loopback
from kvferry.config import ENVIRONMENT_PREFIX, Settings, to_environ
from kvferry.errors import ConfigError
from kvferry.policy.ports import InstancePorts
from kvferry.types import Role

EngineKind = Literal["transformers", "vllm"]
KV_ROLES: dict[str, str] = {"prefill": "kv_producer", "decode": "kv_consumer", "both": "kv_both"}
NUM_INTERNAL_PORTS = 16
"""Ports that one vLLM instance may take upward from VLLM_PORT."""


@dataclass(frozen=True)
class Start:
    """What it takes to start one process."""

    name: str
    argv: tuple[str, ...]
    environ: dict[str, str]
    url: str | None = None
    death_signal: signal.Signals = signal.SIGKILL


@dataclass(frozen=True)
class VllmOptions:
    """How vLLM is started. `arguments` are its own, added to every instance's command line."""

    command: tuple[str, ...] = ("vllm",)
    arguments: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)


def start_router(settings: Settings, inherited: Mapping[str, str]) -> Start:
    """The router, bound to `settings.router`."""
    argv = (sys.executable, "-m", "kvferry", "router")
    return Start("router", argv, _environ(settings, inherited))


def start_engine(
    settings: Settings,
    inherited: Mapping[str, str],
    *,
    name: str,
    role: Role,
    router_url: str | None,
    gpus: Sequence[str] | None,
) -> Start:
    """An instance of the embedded engine on ports of the system's choice, which it tells.

    Args:
        router_url: the router to join; None for an instance that stands alone.
        gpus: what CUDA_VISIBLE_DEVICES shall name; None leaves it alone.
    """
    replace = msgspec.structs.replace
    settings = replace(
        settings,
        cluster=replace(settings.cluster, router_url=router_url),
        engine=replace(settings.engine, instance_id=name, role=role, port=0),
    )
    argv = (sys.executable, "-m", "kvferry", "engine")
    return Start(name, argv, _environ(settings, inherited) | _visible(gpus))


def start_vllm(
    settings: Settings,
    inherited: Mapping[str, str],
    *,
    name: str,
    role: Role,
    router_url: str | None,
    ports: InstancePorts,
    gpus: Sequence[str] | None,
    options: VllmOptions,
) -> Start:
    """A vLLM server with kvferry's connector, on fixed ports of the plan.

    Every address variable names the same host on both sides of a pair, and no two instances share a port: the
    mismatches that hang other set-ups can't be written down here.

    Raises:
        ConfigError: no model is set.
    """
    if settings.engine.model is None:
        raise ConfigError("--engine vllm needs --model PATH_OR_HF_NAME: vLLM can't serve the model of the demo")
    host = settings.engine.host
    url = f"http://{host}:{ports.http}"
    extra: dict[str, Any] = {
        "listen": f"tcp://{host}:0",
        "transports": list(settings.transfer.transports),
        "router": router_url,
        "url": url,
        "instance_id": name,
        "namespace": settings.cluster.namespace,
        "lease_ttl_s": settings.handoff.lease_ttl_s,
        "heartbeat_s": settings.handoff.heartbeat_s,
        "digest": settings.handoff.digest,
        "pool": next(iter(settings.engine.pool), None),
        "pool_directory": settings.pool.directory if settings.engine.pool else None,
    }
    transfer = {
        "kv_connector": "KVFerryConnector",
        "kv_connector_module_path": "kvferry.connector.vllm",
        "kv_role": KV_ROLES[role],
        "kv_load_failure_policy": settings.handoff.on_failure,
        "kv_connector_extra_config": {key: value for key, value in extra.items() if value is not None},
    }
    argv = [*options.command, "serve", settings.engine.model, "--host", host, "--port", str(ports.http)]
    argv += ["--kv-transfer-config", msgspec.json.encode(transfer).decode()]
    if settings.engine.served_model_name is not None:
        argv += ["--served-model-name", settings.engine.served_model_name]
    if settings.engine.max_model_len is not None:
        argv += ["--max-model-len", str(settings.engine.max_model_len)]
    if settings.engine.dtype != "auto":
        argv += ["--dtype", settings.engine.dtype]
    environ = {
        "VLLM_HOST_IP": host,
        "VLLM_PORT": str(ports.internal[0]),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(ports.master),
        **options.environ,
    }
    if gpus is None:
        # On a CPU vLLM binds its threads to all cores by itself, so that two instances on one machine fight for them.
        cpu = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(settings.engine.num_threads or 1)}
        environ |= {key: inherited.get(key, value) for key, value in cpu.items()}
    if is_loopback(host):
        environ |= {"VLLM_LOOPBACK_IP": host, "GLOO_SOCKET_IFNAME": inherited.get("GLOO_SOCKET_IFNAME", "lo")}
    whole = _environ(settings, inherited) | environ | _visible(gpus)
    # vLLM ends its own processes on SIGTERM, which it could not do when killed.
    return Start(name, (*argv, *options.arguments), whole, url, signal.SIGTERM)


def assign_gpus(available: Sequence[str], num_instances: int, *, share: bool, needed: bool) -> list[list[str] | None]:
    """One list of GPUs for each instance, in order; None where there are no GPUs at all.

    Args:
        share: several instances may be given the same GPU.
        needed: instances that can't run on a CPU when there are too few GPUs.
    Raises:
        ConfigError: fewer GPUs than instances, though each needs its own.
    """
    if not available:
        return [None] * num_instances
    if len(available) < num_instances and needed and not share:
        raise ConfigError(
            f"{num_instances} instances need a GPU each and {len(available)} can be seen ({','.join(available)}); "
            "start fewer, show more of them in CUDA_VISIBLE_DEVICES, or let them share with --share-gpus"
        )
    return [[available[at % len(available)]] for at in range(num_instances)]


def visible_gpus(inherited: Mapping[str, str], driver: Path = Path("/proc/driver/nvidia/gpus")) -> list[str]:
    """The GPUs that this process may use: what CUDA_VISIBLE_DEVICES names, else all that the driver shows."""
    named = inherited.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu for gpu in (part.strip() for part in named.split(",")) if gpu and gpu != "-1"]
    return [str(index) for index, _ in enumerate(driver.glob("*"))]


def threads_each(settings: Settings, num_instances: int, num_cpus: int) -> Settings:
    """The settings with torch's threads spread over the instances, unless the user has set them."""
    if settings.engine.num_threads is not None:
        return settings
    replace = msgspec.structs.replace
    return replace(settings, engine=replace(settings.engine, num_threads=max(1, num_cpus // max(1, num_instances))))


def as_shell(start: Start) -> str:
    """The command line as one would type it, for messages."""
    return shlex.join(start.argv)


def _visible(gpus: Sequence[str] | None) -> dict[str, str]:
    return {} if gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}


def _environ(settings: Settings, inherited: Mapping[str, str]) -> dict[str, str]:
    """The inherited environment, with this tree of settings in place of whatever settings were in it."""
    kept = {key: value for key, value in inherited.items() if not key.startswith(ENVIRONMENT_PREFIX)}
    foreign = {key: value for key, value in inherited.items() if key.startswith("KVFERRY_TEST_")}
    # Without it a child's last words stay in its buffer when it is killed.
    return kept | foreign | to_environ(settings) | {"PYTHONUNBUFFERED": "1"}
