"""A local cluster of real processes, with small stand-ins for router and engine."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from kvferry.cluster import ClusterPlan, LocalCluster, instances, local
from kvferry.config import load
from kvferry.errors import ConfigError, PeerGone

FAKE = Path(__file__).with_name("fake_parts.py")


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real command lines, but for the program: settings, secrets and ports take the real way."""

    def faked(make: Callable[..., instances.Start], part: str) -> Callable[..., instances.Start]:
        def start(*args, **kwargs) -> instances.Start:
            real = make(*args, **kwargs)
            return instances.Start(real.name, (sys.executable, str(FAKE), part), real.environ)

        return start

    monkeypatch.setattr(local, "start_router", faked(instances.start_router, "router"))
    monkeypatch.setattr(local, "start_engine", faked(instances.start_engine, "engine"))


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Callable[..., LocalCluster]]:
    made: list[LocalCluster] = []

    def make(num_prefill: int = 1, num_decode: int = 1, port: int = 0) -> LocalCluster:
        settings = load(None, {"KVFERRY_ROUTER_PORT": str(port)})
        said: list[str] = []
        one = LocalCluster(ClusterPlan(num_prefill, num_decode, settings, logs_dir=tmp_path), said.append)
        one.said = said  # type: ignore[attr-defined]
        made.append(one)
        return one

    yield make
    for one in made:
        await one.stop()


def running(one: LocalCluster) -> list[int]:
    return [child.pid for child in one.children if child.pid and psutil.pid_exists(child.pid)]


async def test_start_waits_for_every_instance_and_stop_ends_all(cluster: Callable[..., LocalCluster]):
    one = cluster(2, 3)
    await one.start()
    names = {"prefill-0", "prefill-1", "decode-0", "decode-1", "decode-2"}
    assert {child.name for child in one.children} == names | {"router"}
    async with local.RouterView(one.router_url) as view:
        reports = await view.instances()
    assert {report.instance_id: report.role for report in reports} == {name: name[:-2] for name in names}
    assert sum("has joined" in line for line in one.said) == 5
    one.check()
    assert len(running(one)) == 6
    assert await one.start_alone("single") == "http://127.0.0.1:1"
    await one.stop()
    assert running(one) == []
    one.check()
    await one.stop()


async def test_each_cluster_has_a_secret_of_its_own(cluster: Callable[..., LocalCluster]):
    secrets = {cluster().settings.cluster.secret for _ in range(3)}
    assert len(secrets) == 3 and all(secret is not None and len(secret) == 64 for secret in secrets)


async def test_an_instance_that_dies_at_start_is_named_with_its_last_lines(
    cluster: Callable[..., LocalCluster], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("KVFERRY_TEST_DIE", "decode-0")
    one = cluster()
    with pytest.raises(PeerGone) as caught:
        await one.start()
    said = str(caught.value)
    assert "decode-0" in said and "loading the model" in said and "no such model; give a path" in said


async def test_a_later_death_is_seen(cluster: Callable[..., LocalCluster]):
    one = cluster()
    await one.start()
    victim = next(child for child in one.children if child.name == "prefill-0")
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    async with asyncio.timeout(60):
        while not victim.has_died:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    with pytest.raises(PeerGone, match=r"prefill-0 .* killed by SIGKILL"):
        one.check()


async def test_a_taken_port_names_its_holder_before_anything_starts(cluster: Callable[..., LocalCluster]):
    with socket.create_server(("127.0.0.1", 0)) as holder:
        one = cluster(port=holder.getsockname()[1])
        with pytest.raises(ConfigError, match=rf"router\.port: port \d+ .* \(pid {os.getpid()}"):
            await one.start()
    assert one.children == []


def test_a_held_port_is_nobody_elses_but_can_be_listened_on():
    held = local.hold_port("127.0.0.1", 0, "x")
    try:
        port = held.getsockname()[1]
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("127.0.0.1", port))
            server.listen()
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            with pytest.raises(ConfigError, match=rf"port {port} .* \(pid {os.getpid()}"):
                local.hold_port("127.0.0.1", port, "x")
    finally:
        held.close()


async def test_vllm_ports_move_to_where_all_are_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = 26000 + os.getpid() % 4000  # below the ports of outgoing connections, apart from other runs of this test
    with socket.create_server(("127.0.0.1", base)):
        bases = range(base, base + 200, 100)
        monkeypatch.setattr(local, "VLLM_PORT_BASES", bases)
        one = LocalCluster(ClusterPlan(1, 1, load(), engine="vllm", logs_dir=tmp_path), lambda line: None)
        try:
            ports = one._vllm_ports()
            assert ports["decode-0"].http == base + 100 and ports["prefill-0"].http >= base + 105
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind(("127.0.0.1", base + 100))
        finally:
            await one.stop()
        plan = ClusterPlan(1, 1, load(), engine="vllm", logs_dir=tmp_path, port_base=base)
        with pytest.raises(ConfigError, match=f"port {base}"):
            LocalCluster(plan, lambda line: None)._vllm_ports()


async def test_a_slow_start_is_not_silent_and_ends(
    cluster: Callable[..., LocalCluster], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("KVFERRY_TEST_DELAY_S", "60")
    monkeypatch.setattr(local, "TELL_EVERY_S", 0.1)
    monkeypatch.setitem(local.START_TIMEOUT_S, "transformers", 0.5)
    one = cluster()
    with pytest.raises(PeerGone, match="not ready"):
        await one.start()
    assert any("waiting for router" in line for line in one.said)


async def test_logs_of_its_own_are_removed_unless_kept(monkeypatch: pytest.MonkeyPatch):
    for keep in (False, True):
        one = LocalCluster(ClusterPlan(0, 0, load(None, {"KVFERRY_ROUTER_PORT": "0"})), lambda line: None)
        assert one.logs_dir.is_dir()
        await one.stop(keep_logs=keep)
        assert one.logs_dir.is_dir() == keep
    one.logs_dir.rmdir()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's watch on the parent is Linux's")
def test_a_killed_parent_leaves_no_process(tmp_path: Path):
    code = f"""
        import asyncio, pathlib, sys, time
        from kvferry.cluster import ClusterPlan, LocalCluster, instances, local
        from kvferry.config import load
        def fake(make, part):
            def start(*a, **k):
                real = make(*a, **k)
                return instances.Start(real.name, (sys.executable, {str(FAKE)!r}, part), real.environ)
            return start
        local.start_router = fake(instances.start_router, "router")
        local.start_engine = fake(instances.start_engine, "engine")
        async def main():
            settings = load(None, {{"KVFERRY_ROUTER_PORT": "0"}})
            plan = ClusterPlan(1, 1, settings, logs_dir=pathlib.Path({str(tmp_path)!r}))
            cluster = LocalCluster(plan, lambda line: None)
            await cluster.start()
            print(*(child.pid for child in cluster.children), flush=True)
            time.sleep(60)
        asyncio.run(main())
    """
    argv = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(pids) == 3
    give_up_s = time.monotonic() + 60
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        assert time.monotonic() < give_up_s, "children outlive their killed parent"
        time.sleep(0.05)
