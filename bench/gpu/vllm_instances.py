"""vLLM instances on one GPU for vllm_pd.py, and the registry that kvferry's ones report to."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
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
START_LIMIT_S = 200
PROFILED = "GPU KV cache size"
"""vLLM logs this once it has measured the free memory: the next instance may start to use the GPU."""


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
                answer = b"{}"
                if self.path.endswith("/outcomes"):
                    registry.outcomes |= {o.handoff: o for o in msgspec.json.decode(body, type=list[Outcome])}
                else:
                    report = msgspec.json.decode(body, type=InstanceReport)
                    registry.reports[report.instance_id] = report
                    answer = msgspec.json.encode(Lease(ttl_s=3.0, heartbeat_s=1.0))
                self.send_response(200)
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def ref(self, name: str) -> InstanceRef:
        report = self.reports[name]
        return InstanceRef(name, report.incarnation, report.addresses)


class Server:
    """One `vllm serve` on GPU 0 unless `env` says otherwise, in a process group of its own."""

    def __init__(
        self,
        name: str,
        options: argparse.Namespace,
        kv: dict[str, Any] | None = None,
        flags: Sequence[str] = (),
        **env: str,
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.name, self.url = name, f"http://127.0.0.1:{port}"
        self.log = options.out.parent / f"vllm-{name}.log"
        command = ["vllm", "serve", str(options.model), "--skip-tokenizer-init", "--load-format", options.load_format]
        command += [
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--served-model-name",
            "m",
            "--max-model-len",
            str(options.max_model_len),
        ]
        command += ["--gpu-memory-utilization", str(options.utilization), "--no-enable-prefix-caching"]
        command += ["--no-enable-log-requests", "--max-num-seqs", "16"]
        # Graphs of decode steps alone: a prefill's shapes are not captured, and nothing is compiled at the start.
        graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16]}
        command += ["--compilation-config", json.dumps(graphs)] if options.graphs else ["--enforce-eager"]
        if kv is not None:
            if kv["kv_connector"] == "KVFerryConnector":
                kv["kv_connector_extra_config"]["url"] = self.url
            command += ["--kv-transfer-config", json.dumps(kv)]
        command += flags
        path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0", "PYTHONPATH": path, **env}
        self.began_s = time.monotonic()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def wait(self, what: str, probe: Callable[[], bool]) -> None:
        while not probe():
            if self.process.poll() is not None or time.monotonic() - self.began_s > START_LIMIT_S:
                tail = self.log.read_text(errors="replace")[-5000:]
                raise RuntimeError(f"{self.name}: not {what} (exit {self.process.poll()}):\n{tail}")
            time.sleep(0.2)
        print(f"{self.name}: {what} after {time.monotonic() - self.began_s:.0f} s", flush=True)

    def wait_profiled(self) -> None:
        self.wait("profiled", lambda: PROFILED in self.log.read_text(errors="replace"))

    def wait_ready(self) -> None:
        def healthy() -> bool:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                    return True
            except OSError:
                return False

        self.wait("ready", healthy)

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)


def start_all(options: argparse.Namespace, registry: Registry) -> dict[str, Server]:
    """One instance after the other: two that measure the free memory of one GPU at a time disturb each other."""

    def ferry(name: str) -> dict[str, Any]:
        extra: dict[str, Any] = {"router": registry.url, "instance_id": name}
        if options.trace:
            extra["trace"] = str(options.out.parent / f"trace-{name}.txt")
        if options.layers:
            extra["layers_a_publish"] = options.layers
        role = "kv_producer" if name == "P" else "kv_consumer"
        return {
            "kv_connector": "KVFerryConnector",
            "kv_connector_module_path": "kvferry.connector.vllm",
            "kv_role": role,
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": extra,
        }

    nixl = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
    ucx = {"UCX_TLS": "cuda_ipc,cuda_copy,tcp,sm,self"}
    wanted: list[tuple[str, dict[str, Any] | None, dict[str, str]]] = [("single", None, {})]
    if "kvferry" in options.pairs:
        wanted += [("P", ferry("P"), {}), ("D", ferry("D"), {})]
    if "nixl" in options.pairs:
        wanted += [("nixl-P", nixl, {"VLLM_NIXL_SIDE_CHANNEL_PORT": "5600", **ucx})]
        wanted += [("nixl-D", nixl, {"VLLM_NIXL_SIDE_CHANNEL_PORT": "5700", **ucx})]
    servers: dict[str, Server] = {}
    try:
        for name, kv, env in wanted:
            servers[name] = Server(name, options, kv, **env)
            servers[name].wait_profiled()
        for server in servers.values():
            server.wait_ready()
        while not {"P", "D"} & set(servers) <= set(registry.reports):
            time.sleep(0.1)
    except (RuntimeError, KeyboardInterrupt):
        for server in servers.values():
            server.stop()
        raise
    return servers
