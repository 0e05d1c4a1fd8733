"""A real cluster of kvferry's own: healthy it gives no finding; stopped, it neither hangs nor lies, and is named."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import psutil
import pytest

from catalogue.bench import fields
from kvferry.doctor import Facts, Finding, examine, gather
from kvferry.doctor.live import look_at_router
from kvferry.doctor.logs import read_logs
from kvferry.doctor.passage import probe_passage
from kvferry.doctor.rendezvous import probe_transports

pytest.importorskip("torch")
READY_S = 100.0


class Cluster(NamedTuple):
    url: str
    pids: dict[str, int]
    logs: list[str]
    secret: bytes


@contextmanager
def a_cluster(directory: Path, num_each: int, transports: str, ttl_s: int = 3) -> Iterator[Cluster]:
    """Prefill and decode instances behind a router, started as a user would."""
    logs, told = directory / "logs", directory / "up.out"
    counts = ["--prefill", str(num_each), "--decode", str(num_each), "--port", "0"]
    with told.open("w") as out:
        up = subprocess.Popen(
            [sys.executable, "-m", "kvferry.cli", "up", *counts, "--logs", str(logs)],
            cwd=directory,
            env={**os.environ, "KVFERRY_TRANSFER_TRANSPORTS": transports, "KVFERRY_ROUTER_TTL_S": f"{ttl_s}s"},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        yield _when_ready(up, told, logs)
    finally:
        children = psutil.Process(up.pid).children(recursive=True) if up.poll() is None else []
        for child in children:
            child.send_signal(signal.SIGCONT)
        up.send_signal(signal.SIGINT)
        try:
            up.wait(30)
        except subprocess.TimeoutExpired:
            for child in children:
                child.kill()
            up.kill()
            up.wait()


def _when_ready(up: subprocess.Popen[bytes], out: Path, logs: Path) -> Cluster:
    end = time.monotonic() + READY_S
    while "ready:" not in out.read_text():
        assert up.poll() is None, out.read_text()
        assert time.monotonic() < end, out.read_text()
        time.sleep(0.2)
    address = re.search(r"http://[\d.:]+", out.read_text())
    assert address is not None
    pids: dict[str, int] = {}
    secret = b""
    for child in psutil.Process(up.pid).children():
        environment = child.environ()
        secret = environment["KVFERRY_CLUSTER_SECRET"].encode()
        if name := environment.get("KVFERRY_ENGINE_INSTANCE_ID"):
            pids[name] = child.pid
    return Cluster(address[0], pids, [str(p) for p in sorted(logs.glob("*.log"))], secret)


def _complete(url: str, results: list[tuple[int, bytes]]) -> None:
    body = {"model": "kvferry-demo", "prompt": "a prompt of some blocks, " * 8, "max_tokens": 4}
    request = urllib.request.Request(
        f"{url}/v1/completions", msgspec.json.encode(body), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        results.append((answer.status, answer.headers.get("x-kvferry-outcome", "").encode()))


def _everything(cluster: Cluster) -> list[Finding]:
    """What the doctor says when it is given all there is: pids, router, probes, logs."""
    pids = {role: [str(p) for n, p in cluster.pids.items() if n.startswith(role)] for role in ("prefill", "decode")}
    facts = look_at_router(gather(prefill=pids["prefill"], decode=pids["decode"]), cluster.url)
    facts = msgspec.structs.replace(
        facts,
        router_probe=probe_passage(cluster.url, cluster.secret),
        probe=probe_transports(facts),
        logs=read_logs(cluster.logs).findings,
    )
    return examine(facts)


def _finds_nothing(cluster: Cluster) -> None:
    """The doctor finds nothing. On a busy machine a heartbeat may be late when it looks; what is false stays."""
    for _ in range(5):
        if not (said := _everything(cluster)):
            return
    raise AssertionError(fields(said))


@pytest.mark.timeout(200)
def test_two_pairs_over_tcp_give_no_finding(tmp_path: Path) -> None:
    # Four engines on a busy machine: one may be silent for longer than the usual three seconds.
    with a_cluster(tmp_path, 2, "tcp", ttl_s=30) as cluster:
        results: list[tuple[int, bytes]] = []
        for _ in range(4):
            _complete(cluster.url, results)
        assert all(status == 200 and outcome.startswith(b"delivered") for status, outcome in results), results
        assert len(cluster.pids) == 4
        _finds_nothing(cluster)


@pytest.mark.timeout(300)
def test_a_real_cluster_healthy_stopped_and_dead(tmp_path: Path) -> None:
    with a_cluster(tmp_path, 1, "shm,tcp") as cluster:
        prefill, decode = cluster.pids["prefill-0"], cluster.pids["decode-0"]
        results: list[tuple[int, bytes]] = []
        _complete(cluster.url, results)
        assert results[0][0] == 200
        assert results[0][1].startswith(b"delivered")
        _finds_nothing(cluster)

        by_router, by_pid = _said_while_stopped(cluster, prefill, results)
        assert [f.id for f in by_pid] == ["KVF001"]
        # The stopped instance is silent at first, and its lease at the router then ends.
        assert by_router[0].id in ("KVF106", "KVF107", "KVF108", "KVF114"), fields(by_router)
        assert "prefill-0" in by_router[0].seen
        assert {f.id for f in by_router} <= {"KVF105", "KVF106", "KVF107", "KVF108", "KVF114"}, fields(by_router)
        assert results[1][0] == 200
        assert results[1][1].startswith(b"recomputed")
        (told,) = _until(cluster.url, "KVF115")
        assert "source_silent (prefill-0 to decode-0)" in told.seen

        by_router, by_pid = _said_while_stopped(cluster, decode, results)
        assert [f.id for f in by_pid] == ["KVF001"]
        assert by_router[0].id in ("KVF106", "KVF107", "KVF108", "KVF114"), fields(by_router)
        assert "decode-0" in by_router[0].seen
        assert {f.id for f in by_router} <= {"KVF105", "KVF106", "KVF107", "KVF108", "KVF114", "KVF115"}

        os.kill(decode, signal.SIGKILL)
        assert "nothing listens there any more" in _until(cluster.url, "KVF114")[0].seen
        gone = _until(cluster.url, "KVF105")
        assert "decode-0 was one" in gone[0].seen
        assert {f.id for f in gone} <= {"KVF105", "KVF108", "KVF110", "KVF115"}, fields(gone)


def _said_while_stopped(
    cluster: Cluster, pid: int, results: list[tuple[int, bytes]]
) -> tuple[list[Finding], list[Finding]]:
    """What the doctor says by router and by pid while an instance is stopped and a request waits for it."""
    os.kill(pid, signal.SIGSTOP)
    _wait_until_stopped(pid)
    request = threading.Thread(target=_complete, args=(cluster.url, results))
    request.start()
    _wait_until_in_hand(cluster.url)
    by_router = examine(look_at_router(Facts(), cluster.url))
    pids = {role: [str(p) for n, p in cluster.pids.items() if n.startswith(role)] for role in ("prefill", "decode")}
    by_pid = examine(gather(prefill=pids["prefill"], decode=pids["decode"]))
    if pid == cluster.pids["decode-0"]:
        os.kill(pid, signal.SIGCONT)
    request.join(110)
    assert not request.is_alive(), "the request hangs"
    os.kill(pid, signal.SIGCONT)
    return by_router, by_pid


def _wait_until_stopped(pid: int) -> None:
    end = time.monotonic() + 60
    while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < end
        time.sleep(0.02)


def _wait_until_in_hand(url: str) -> None:
    """Until the router has a request that is older than the doctor's patience."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with urllib.request.urlopen(f"{url}/debug/handoffs", timeout=60) as answer:
            if any(r["age_s"] > 0.5 for r in msgspec.json.decode(answer.read())["requests"]):
                return
        time.sleep(0.05)
    raise AssertionError("no request is in hand")


def _until(url: str, finding_id: str) -> list[Finding]:
    """What the doctor says of a router, as soon as its first finding is this one."""
    end = time.monotonic() + 90
    while time.monotonic() < end:
        said = examine(look_at_router(Facts(), url))
        if said and said[0].id == finding_id:
            return said
        time.sleep(0.2)
    raise AssertionError(f"{finding_id} is not said, but {fields(said)}")
