"""Faults of the pool: its nodes, their secret and slabs, its directory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from catalogue.bench import Bench
from catalogue.table import fault, healthy
from kvferry.doctor import Finding

SECRET = "s" * 32


def start_node(bench: Bench, *more: str, secret: str = SECRET, stopped: bool = False) -> str:
    """A node of the pool, as `kvferry node` starts it; its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "kvferry.cli", "node", "--arena-bytes", "16MiB", *more],
        cwd=bench.directory,
        env={**os.environ, "KVFERRY_CLUSTER_SECRET": secret},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    bench.processes.append(process)
    assert process.stdout is not None
    for line in process.stdout:
        if "listening" in line:
            if stopped:
                process.send_signal(signal.SIGSTOP)
                os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
            return line.split()[-1]
    raise AssertionError("the node did not start")


def _examine(bench: Bench, **variables: str) -> list[Finding]:
    """Two of kvferry's instances that are configured with the pool."""
    files = []
    for role in ("prefill", "decode"):
        lines = [f"{name}={value}" for name, value in variables.items()]
        command = f"COMMAND=kvferry engine --role {role} --port {bench.port()}"
        files.append(bench.file(f"{role}.env", "\n".join([*lines, f"KVFERRY_CLUSTER_SECRET={SECRET}", command, ""])))
    return bench.examine(prefill=files[:1], decode=files[1:])


@healthy
def engines_with_a_pool(bench: Bench) -> list[Finding]:
    directory = f"redis://127.0.0.1:{bench.server('redis')}/0"
    return _examine(bench, KVFERRY_ENGINE_POOL=start_node(bench), KVFERRY_POOL_DIRECTORY=directory)


@fault("KVF090", "the pool's hit rate is zero")
def a_pool_node_is_not_there(bench: Bench) -> list[Finding]:
    return _examine(bench, KVFERRY_ENGINE_POOL=f"tcp://127.0.0.1:{bench.port()}")


@fault("KVF090", "each prompt waits two seconds before it is computed")
def a_pool_node_is_stopped(bench: Bench) -> list[Finding]:
    return _examine(bench, KVFERRY_ENGINE_POOL=start_node(bench, stopped=True))


@fault("KVF090", "the pool's address belongs to something else")
def a_pool_node_is_a_web_server(bench: Bench) -> list[Finding]:
    return _examine(bench, KVFERRY_ENGINE_POOL=f"tcp://127.0.0.1:{bench.server('http')}")


@fault("KVF091", "the pool refuses every engine since the secret was renewed")
def a_pool_node_has_another_secret(bench: Bench) -> list[Finding]:
    return _examine(bench, KVFERRY_ENGINE_POOL=start_node(bench, secret="t" * 32))


@fault("KVF092", "the pool stays empty")
def slabs_are_smaller_than_blocks(bench: Bench) -> list[Finding]:
    return _examine(bench, KVFERRY_ENGINE_POOL=start_node(bench, "--slab-bytes", "16KiB"))


@fault("KVF093", "each node finds its own blocks only")
def the_directory_is_absent(bench: Bench) -> list[Finding]:
    directory = f"redis://127.0.0.1:{bench.port()}/0"
    return _examine(bench, KVFERRY_ENGINE_POOL=start_node(bench), KVFERRY_POOL_DIRECTORY=directory)


@fault("KVF093", "each node finds its own blocks only, told by the settings file")
def the_directory_of_the_settings_file_is_stopped(bench: Bench) -> list[Finding]:
    directory = f"redis://127.0.0.1:{bench.server('redis', stopped=True)}/0"
    return bench.examine(config=bench.file("kvferry.toml", f'[pool]\ndirectory = "{directory}"\n'))
