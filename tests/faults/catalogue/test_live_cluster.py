"""A real cluster of kvferry's own: healthy it gives no finding; stopped, it neither hangs nor lies, and is named."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import psutil
import pytest

from catalogue.bench import fields
from kvferry.doctor import Facts, examine, gather
from kvferry.doctor.live import look_at_router
from kvferry.doctor.logs import read_logs
from kvferry.doctor.passage import probe_passage

pytest.importorskip("torch")
READY_S = 100.0


class Cluster(NamedTuple):
    url: str
    pids: dict[str, int]
    logs: list[str]
    secret: bytes


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """One prefill and one decode instance behind a router, started as a user would."""
    logs, told = tmp_path / "logs", tmp_path / "up.out"
    counts = ["--prefill", "1", "--decode", "1", "--port", "0"]
    with told.open("w") as out:
        up = subprocess.Popen(
            [sys.executable, "-m", "kvferry.cli", "up", *counts, "--logs", str(logs)],
            cwd=tmp_path,
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
    import urllib.request

    body = {"model": "kvferry-demo", "prompt": "a prompt of some blocks, " * 8, "max_tokens": 4}
    request = urllib.request.Request(
        f"{url}/v1/completions", msgspec.json.encode(body), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        results.append((answer.status, answer.headers.get("x-kvferry-outcome", "").encode()))


@pytest.mark.timeout(200)
def test_a_real_cluster_healthy_stopped_and_dead(cluster: Cluster) -> None:
    prefill, decode = str(cluster.pids["prefill-0"]), str(cluster.pids["decode-0"])
    results: list[tuple[int, bytes]] = []
    _complete(cluster.url, results)
    assert results[0][0] == 200
    assert results[0][1].startswith(b"delivered")

    facts = look_at_router(gather(prefill=[prefill], decode=[decode]), cluster.url)
    facts = msgspec.structs.replace(
        facts, router_probe=probe_passage(cluster.url, cluster.secret), logs=read_logs(cluster.logs).findings
    )
    assert fields(examine(facts)) == []

    os.kill(int(prefill), signal.SIGSTOP)
    request = threading.Thread(target=_complete, args=(cluster.url, results))
    request.start()
    time.sleep(1.0)
    by_router = examine(look_at_router(Facts(), cluster.url))
    by_pid = examine(gather(prefill=[prefill], decode=[decode]))
    assert by_pid[0].id == "KVF001"
    assert {f.id for f in by_pid} == {"KVF001"}
    # The stopped instance is silent at first, and its lease at the router then ends.
    assert by_router[0].id in ("KVF106", "KVF107", "KVF108"), fields(by_router)
    assert {f.id for f in by_router} <= {"KVF105", "KVF106", "KVF107", "KVF108"}
    request.join(60)
    assert not request.is_alive(), "the request hangs"
    assert results[1][0] == 200
    assert results[1][1].startswith(b"recomputed")

    os.kill(int(prefill), signal.SIGCONT)
    os.kill(int(decode), signal.SIGKILL)
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        said = examine(look_at_router(Facts(), cluster.url))
        if said and said[0].id == "KVF105" and "decode" in said[0].seen:
            break
        time.sleep(0.5)
    assert [f.id for f in said] == ["KVF105"], fields(said)
