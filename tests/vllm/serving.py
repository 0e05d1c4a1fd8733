"""Real `vllm serve` processes for tests, the registry they report to, and requests over a prefill/decode pair."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import psutil

from kvferry.pool import BlockSpace, PoolClient
from kvferry.protocol.membership import InstanceReport, Lease
from kvferry.types import HandoffTicket, InstanceRef, Outcome, new_handoff_id

HERE = Path(__file__).parent
START_LIMIT_S = 400
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOOPBACK_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONHASHSEED": "0",
}
# float32, so that tokens are equal whatever else is in the batch: in bfloat16 plain vLLM, too, computes a prompt among
# others a step of a logit away from the same alone, and the two best logits are that near in one token of ten.
FLAGS = [
    *("--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--served-model-name", "m"),
    *("--max-model-len", "2048", "--max-num-seqs", "8", "--max-num-batched-tokens", "512"),
    *("--num-gpu-blocks-override", "128", "--no-enable-log-requests"),
]
BLOCK = 128
PATIENCE_S = 120.0
"""How long a test waits for what must come: two busy cores may not run a process for seconds, ten have been seen."""


def die_with_parent():
    """In a child, before it runs: the kernel ends it when the test process dies, however that dies."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def free_port():
    """A port that nobody has, and that the system gives nobody who asks for any: servers take seconds to bind it."""
    first_of_any = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in random.sample(range(first_of_any // 2, first_of_any), 100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise RuntimeError("100 ports below the system's own range are taken")


def call(url, body=None, timeout_s=PATIENCE_S):
    """(status, JSON or text) of a GET, or of a POST where there is a body."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            status, raw = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        status, raw = error.code, error.read()
    return status, json.loads(raw) if raw[:1] in (b"{", b"[") else raw.decode()


class Registry:
    """What of the router an instance talks to: it keeps the latest report of each instance, and all outcomes."""

    def __init__(self):
        self.reports: dict[str, InstanceReport] = {}
        self.outcomes: dict[str, Outcome] = {}
        registry = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.path.endswith("/outcomes"):
                    for outcome in msgspec.json.decode(body, type=list[Outcome]):
                        registry.outcomes[outcome.handoff] = outcome
                    self.answer(b"{}")
                else:
                    report = msgspec.json.decode(body, type=InstanceReport)
                    registry.reports[report.instance_id] = report
                    self.answer(msgspec.json.encode(Lease(ttl_s=3.0, heartbeat_s=1.0)))

            def do_DELETE(self):
                registry.reports.pop(self.path.rsplit("/", 1)[1].partition("?")[0], None)
                self.answer(b"{}")

            def answer(self, body):
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def ref(self, name) -> InstanceRef:
        report = self.reports[name]
        return InstanceRef(name, report.incarnation, report.addresses)

    def outcome(self, handoff) -> Outcome:
        return wait_for(lambda: self.outcomes.get(handoff), f"outcome of {handoff}")

    def close(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def wait_for(probe, what, timeout_s=PATIENCE_S):
    """The first true value of `probe`. Raises: TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while not (value := probe()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s} s")
        time.sleep(0.05)
    return value


class Server:
    """One `vllm serve` in a process group of its own. Start, `ready`, use, `stop`."""

    def __init__(self, name, model, logs, *, flags=(), kv=None, environment=None):
        self.name, self.port = name, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = Path(logs) / f"{name}.log"
        command = [
            str(Path(sys.executable).parent / "vllm"),
            "serve",
            str(model),
            "--port",
            str(self.port),
            *FLAGS,
            *flags,
        ]
        if kv is not None:
            kv["kv_connector_extra_config"].setdefault("url", self.url)
            command += ["--kv-transfer-config", json.dumps(kv)]
        self._command = command
        wanted = {
            **os.environ,
            **ENVIRONMENT,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
            **(environment or {}),
        }
        self._environment = {name: value for name, value in wanted.items() if value is not None}
        self.start()

    def start(self):
        self._began = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def ready(self):
        while time.monotonic() - self._began < START_LIMIT_S:
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.name} ended with {self.process.returncode}:\n{self.tail()}")
            try:
                if call(f"{self.url}/health", timeout_s=2.0)[0] == 200:
                    return self
            except OSError:
                time.sleep(0.2)
        raise TimeoutError(f"{self.name} is not up after {START_LIMIT_S} s:\n{self.tail()}")

    def tail(self):
        return self.log.read_text(errors="replace")[-6000:]

    def signal(self, number):
        """To every process of this server, by id."""
        for process in self.processes():
            process.send_signal(number)

    def processes(self):
        top = psutil.Process(self.process.pid)
        return [*top.children(recursive=True), top]

    def kill(self):
        processes = self.processes()
        for process in processes:
            process.kill()
        self.process.wait(10)
        psutil.wait_procs(processes, timeout=10)

    def stop(self):
        if self.process.poll() is not None:
            return
        processes = self.processes()
        for process in processes:
            process.send_signal(signal.SIGCONT)
        self.process.terminate()
        _, alive = psutil.wait_procs(processes, timeout=20)
        for process in alive:
            process.kill()
        self.process.wait(10)

    def page(self):
        """vLLM's `/metrics`."""
        return call(f"{self.url}/metrics")[1]

    def metric(self, name):
        """The sum of a metric over its labels; 0 where it is not there."""
        lines = self.page().splitlines()
        values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + "{", name + " "))]
        return sum(values)

    def forget_prefixes(self):
        """Empty the instance's own prefix cache; needs VLLM_SERVER_DEV_MODE."""
        status, answer = call(f"{self.url}/reset_prefix_cache", {})
        has_said = isinstance(answer, dict)  # vLLM 0.26 tells nothing
        assert status == 200 and (not has_said or answer["success"]), (
            f"{status} {answer}: {self.name} still holds blocks\n{self.tail()}"
        )

    def wait_all_free(self):
        """No block is held, and no request is left."""

        def free():
            names = ("vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:num_requests_waiting")
            return all(self.metric(name) == 0 for name in names)

        # vLLM updates its gauges when it steps: a request without a ticket makes it do so.
        complete(self.url, [7, 8, 9], 1)
        try:
            wait_for(free, f"all blocks of {self.name} free", 30.0)
        except TimeoutError:
            complete(self.url, [7, 8, 9], 1)
            assert free(), f"{self.name} still holds blocks:\n{self.tail()}"


def complete(url, prompt, num_tokens, **options):
    """Token ids of the answer. Raises: AssertionError with the answer where it is no success."""
    status, answer = post_completion(url, prompt, num_tokens, **options)
    assert status == 200, f"{status}: {answer}"
    return answer["choices"][0]["token_ids"]


def complete_alone(url, prompt, num_tokens, **options):
    """`complete` as a reference: no block in the instance's cache is used, as a handoff may have brought it."""
    return complete(url, prompt, num_tokens, cache_salt="computed alone", **options)


def post_completion(url, prompt, num_tokens, **options):
    body = {
        "model": "m",
        "prompt": prompt,
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **options,
    }
    return call(f"{url}/v1/completions", body)


DEADLINE_S = 60.0
"""Of a handoff that is not to end with it."""


class PoolNode:
    """`kvferry node` on a port, and with a disk tier, that stay the same when it is killed and started again."""

    def __init__(self, logs):
        self._log = Path(logs) / "node.log"
        self._disk = Path(logs) / "node-disk"
        self._port = free_port()
        self.address = f"tcp://127.0.0.1:{self._port}"
        self.start()

    def start(self):
        command = [str(Path(sys.executable).parent / "kvferry"), "node", "--listen", self.address]
        command += ["--arena-bytes", "128MiB", "--disk-path", str(self._disk), "--disk-bytes", "128MiB"]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, preexec_fn=die_with_parent)
        wait_for(self._listens, "the pool's node listens")

    def _listens(self):
        assert self.process.poll() is None, self._log.read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0

    def counts(self):
        """What the node has counted since its start."""

        async def ask():
            client = PoolClient(self.address, BlockSpace(bytes(32), "tests"))
            await client.start()
            try:
                return (await client.stat()).counts
            finally:
                await client.close()

        return asyncio.run(ask())

    def kill(self):
        self.process.kill()
        self.process.wait(10)

    def stop(self):
        self.process.terminate()
        self.process.wait(20)


@dataclass
class Result:
    """What came of one request over the pair."""

    handoff: str
    token_ids: list[int]
    outcome: Outcome


@dataclass
class Pair:
    """A prefill and a decode server that know each other through a registry."""

    registry: Registry
    prefill: Server
    decode: Server
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(32))

    def swapped(self):
        return Pair(self.registry, self.decode, self.prefill, self._pool)

    def tickets(self, deadline_s=DEADLINE_S):
        source, target = self.registry.ref(self.prefill.name), self.registry.ref(self.decode.name)
        handoff = new_handoff_id()
        return tuple(HandoffTicket(handoff, side, source, target, deadline_s) for side in ("source", "target"))

    def send(self, prompt, num_tokens, *, deadline_s=DEADLINE_S, only_decode=False, **options):
        """Both legs at once, as the router sends them; (prefill's, decode's) futures and the handoff's id."""
        source, target = self.tickets(deadline_s)
        prefill = None
        if not only_decode:
            prefill = self._pool.submit(
                post_completion, self.prefill.url, prompt, 1, kv_transfer_params=source.as_params(), **options
            )
        decode = self._pool.submit(
            post_completion, self.decode.url, prompt, num_tokens, kv_transfer_params=target.as_params(), **options
        )
        return prefill, decode, source.handoff

    def complete(self, prompt, num_tokens=16, **options) -> Result:
        """Raises: AssertionError where either leg is no success."""
        prefill, decode, handoff = self.send(prompt, num_tokens, **options)
        for leg in (prefill, decode):
            if leg is not None:
                status, answer = leg.result(PATIENCE_S)
                assert status == 200, f"{status}: {answer}"
        return Result(handoff, answer["choices"][0]["token_ids"], self.registry.outcome(handoff))

    def close(self):
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.prefill.stop()
        self.decode.stop()


# For tests of tokens alone: on two busy cores vLLM's first steps can hold the interpreter longer than a lease.
PATIENT = {"lease_ttl_s": 30.0}
PATIENT_POOL = {"pool_wait_s": 20.0, "pool_deadline_s": 20.0}


def kv_config(registry, name, *, role="kv_both", policy="recompute", **extra):
    return {
        "kv_connector": "KVFerryConnector",
        "kv_connector_module_path": "kvferry.connector.vllm",
        "kv_role": role,
        "kv_load_failure_policy": policy,
        "kv_connector_extra_config": {"router": registry.url, "instance_id": name, **extra},
    }


def prompt_of(num_tokens, seed):
    """Token ids that no other seed shares a block with."""
    return [(7919 * seed + 31 * i + i * i * 13) % 31000 + 300 for i in range(num_tokens)]


def blocks_pulled(num_tokens):
    """Blocks that hold all of a prompt but its last token."""
    return -(-(num_tokens - 1) // BLOCK)
