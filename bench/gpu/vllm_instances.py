"""vLLM instances for the benches here, on GPUs or to try them out on a CPU, and the registry they report to.

Each instance is told how much memory its KV cache takes (`--kv-cache-memory-bytes`): then vLLM measures nothing at its
start, which several at once on one GPU would disturb for each other, and all of them start at the same time.
"""

from __future__ import annotations

import argparse
import contextlib
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
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "src"))

import msgspec  # noqa: E402

from kvferry.protocol.membership import InstanceReport, Lease  # noqa: E402
from kvferry.types import InstanceRef, Outcome  # noqa: E402

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_bias": False,
}
START_LIMIT_S = 130
GPU_ENVIRON = {
    # Each of these puts the host's GPUs at risk or asks a network that is not there.
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
CPU_ENVIRON = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOOPBACK_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
}
CPU_KV_BYTES = 64 << 20


@dataclass(frozen=True)
class Site:
    """What all instances of a run share.

    Args:
        logs: folder for their logs.
        kv_bytes: of each instance's KV cache, on each GPU.
        decode_graphs: sizes of decode batches that get a CUDA graph; none: `--enforce-eager`.
    """

    model: Path
    logs: Path
    kv_bytes: int
    max_model_len: int
    flags: tuple[str, ...] = ()
    decode_graphs: tuple[int, ...] = ()
    cpu: bool = False

    @property
    def patience(self) -> int:
        """By which limits of time are multiplied: a few cores start instances slowly."""
        return 4 if self.cpu else 1

    def arguments(self) -> list[str]:
        """Of `vllm serve`, but for the model, its name and its port."""
        memory = CPU_KV_BYTES if self.cpu else self.kv_bytes
        # The share of all memory is only what must be free at the start.
        chosen = ["--kv-cache-memory-bytes", str(memory), "--gpu-memory-utilization", "0.05", *self.flags]
        chosen += ["--skip-tokenizer-init", "--no-enable-log-requests"]
        # Graphs of decode steps alone: a prefill's shapes are not captured, and nothing is compiled at the start.
        graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": list(self.decode_graphs)}
        eager = self.cpu or not self.decode_graphs
        return [*chosen, *(["--enforce-eager"] if eager else ["--compilation-config", json.dumps(graphs)])]

    def environ(self, **more: str) -> dict[str, str]:
        """This process's, so that kvferry is found and nothing asks for what is not there."""
        path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
        return {**os.environ, **GPU_ENVIRON, **(CPU_ENVIRON if self.cpu else {}), "PYTHONPATH": path, **more}


def dummy_model(folder: Path) -> Path:
    """The configuration of an 8B-sized Qwen3; its weights are made up by vLLM (`--load-format dummy`)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def tiny_models(folder: Path, *names: str) -> None:
    """Save the tests' small models where they are not yet, all at once.

    Raises: RuntimeError names those that could not be made; the others are there.
    """
    tool = ROOT / "tools" / "make_tiny_models.py"
    wanted = [name for name in names if not (folder / name / "tokenizer_config.json").exists()]
    making = {name: subprocess.Popen([sys.executable, str(tool), str(folder), name]) for name in wanted}
    failed = [name for name, process in making.items() if process.wait(120)]
    if failed:
        raise RuntimeError(f"tools/make_tiny_models.py could not make {', '.join(failed)}")


class Registry:
    """What of a router the instances need: it keeps their latest reports, and the handoffs' outcomes."""

    def __init__(self) -> None:
        self.reports: dict[str, InstanceReport] = {}
        self.outcomes: dict[str, Outcome] = {}
        registry = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.path.endswith("/outcomes"):
                    registry.outcomes |= {o.handoff: o for o in msgspec.json.decode(body, type=list[Outcome])}
                    self.answer(b"{}")
                else:
                    report = msgspec.json.decode(body, type=InstanceReport)
                    registry.reports[report.instance_id] = report
                    self.answer(msgspec.json.encode(Lease(ttl_s=3.0, heartbeat_s=1.0)))

            def do_DELETE(self) -> None:
                registry.reports.pop(self.path.rsplit("/", 1)[1].partition("?")[0], None)
                self.answer(b"{}")

            def answer(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def ref(self, name: str) -> InstanceRef:
        report = self.reports[name]
        return InstanceRef(name, report.incarnation, report.addresses)

    def outcome(self, handoff: str, within_s: float = 3.0) -> Outcome | None:
        """None where none was reported in time."""
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: handoff in self.outcomes, within_s, "an outcome")
        return self.outcomes.get(handoff)

    def connector(self, name: str, role: str, *, policy: str = "recompute", **extra: Any) -> dict[str, Any]:
        """`--kv-transfer-config` of an instance that reports here, less its URL."""
        return {
            "kv_connector": "KVFerryConnector",
            "kv_connector_module_path": "kvferry.connector.vllm",
            "kv_role": role,
            "kv_load_failure_policy": policy,
            "kv_connector_extra_config": {"router": self.url, "instance_id": name, **extra},
        }


class Server:
    """One `vllm serve` on the GPUs named, in a process group of its own, that ends with this process."""

    def __init__(
        self,
        name: str,
        site: Site,
        kv: dict[str, Any] | None = None,
        *,
        gpus: str = "0",
        flags: Sequence[str] = (),
        **env: str,
    ) -> None:
        port = free_port()
        self.name, self.gpus, self.url = name, gpus, f"http://127.0.0.1:{port}"
        self.log = site.logs / f"vllm-{name}.log"
        self._command = ["vllm", "serve", str(site.model), "--served-model-name", "m", "--host", "127.0.0.1"]
        self.connector = "" if kv is None else str(kv["kv_connector"])
        self._command += ["--port", str(port), "--max-model-len", str(site.max_model_len), *site.arguments(), *flags]
        if kv is not None:
            if kv["kv_connector"] == "KVFerryConnector":
                kv["kv_connector_extra_config"]["url"] = self.url
            self._command += ["--kv-transfer-config", json.dumps(kv)]
        self._environ = site.environ(CUDA_VISIBLE_DEVICES=gpus, **env)
        self.start()

    def start(self) -> None:
        """Also once it has ended."""
        self.began_s = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environ,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def wait_ready(self, within_s: float) -> None:
        """Raises: RuntimeError with the log's end where it ended or took too long."""

        def is_over() -> bool:
            return self.process.poll() is not None or self.is_healthy()

        with contextlib.suppress(TimeoutError):
            wait_for(is_over, within_s, "ready")
        if not self.is_healthy():
            log = self.log.read_text(errors="replace")
            causes = "\n".join([line for line in log.splitlines() if "Error" in line][-12:])
            raise RuntimeError(f"{self.name} is not ready (exit {self.process.poll()}):\n{causes}\n{log[-1500:]}")
        print(f"{self.name}: ready after {time.monotonic() - self.began_s:.0f} s", flush=True)

    def is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                return True
        except OSError:
            return False

    def signal(self, number: signal.Signals) -> None:
        """To all of its processes at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """kill -9, and wait until the server's own process is gone."""
        self.signal(signal.SIGKILL)
        self.process.wait(20)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels; 0 where it is not there."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + "{", name + " ")))

    def is_all_free(self) -> bool:
        """No block is held, and no request is left, as vLLM said in its last step."""
        names = ("vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:num_requests_waiting")
        return all(self.metric(name) == 0 for name in names)


def start(servers: Iterable[Server], registry: Registry | None = None, *, patience: int = 1) -> list[Server]:
    """Wait until these, just started, serve and have registered: those that do. One that ends is started once more."""
    until_s = time.monotonic() + START_LIMIT_S * patience
    serving = []
    for server in servers:
        for is_last in (False, True):
            try:
                server.wait_ready(max(1.0, until_s - time.monotonic()))
                serving.append(server)
                break
            except RuntimeError as error:
                print(error, flush=True)
                server.kill()
                if not is_last:
                    server.start()
    if registry is not None:
        ferries = {s.name for s in serving if s.connector == "KVFerryConnector"}
        wait_for(lambda: ferries <= set(registry.reports), 30, f"{ferries} register")
    return serving


def stop(servers: Iterable[Server]) -> None:
    """End all of them at once, by force where SIGTERM takes long."""
    running = [server for server in servers if server.process.poll() is None]
    for server in running:
        server.signal(signal.SIGCONT)
        server.signal(signal.SIGTERM)
    until_s = time.monotonic() + 5
    for server in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(max(0.1, until_s - time.monotonic()))
        server.kill()


def wait_for(probe: Callable[[], bool], within_s: float, what: str, every_s: float = 0.1) -> float:
    """Seconds until `probe` was true. Raises: TimeoutError."""
    began_s = time.monotonic()
    while not probe():
        if time.monotonic() - began_s > within_s:
            raise TimeoutError(f"{what}: not within {within_s:.0f} s")
        time.sleep(every_s)
    return time.monotonic() - began_s


def free_port() -> int:
    """One that nobody has, and that the system gives nobody who asks for any: servers take seconds to bind it."""
    first_of_any = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(first_of_any // 2, first_of_any)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


def add_common(ask: argparse.ArgumentParser, name: str) -> None:
    """The options that every script here has."""
    ask.add_argument("--out", type=Path, default=Path(f"{name}.json"))
    ask.add_argument("--models", type=Path, default=Path("/tmp/kvferry-models"), help="made here where absent")
    ask.add_argument("--cpu", action="store_true", help="try it out with vLLM for the CPU and a small model")


def die_with_parent() -> None:
    """In a child, before it runs: the kernel ends it when this process dies, however that dies."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
