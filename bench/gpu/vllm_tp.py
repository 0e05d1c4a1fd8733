"""Tensor parallelism and experts over two GPUs: KV handed over between them, tokens equal to one instance's. JSON.

    . /tmp/site.env; python3 bench/gpu/vllm_tp.py --out "$OUT/vllm_tp.json" [--cases 1to2,2to1,experts]

`1to2`: P with TP 1 on GPU 0, D with TP 2 over both; `2to1` the other way round. `experts`: a Qwen3-MoE-shaped model,
TP 2 and `--enable-expert-parallel` on both sides, which share the two GPUs. The reference is P itself, asked without a
ticket: a single instance of the same parallelism; over 1to2 and 2to1 sums round otherwise on the two sides, so that
float32 is used. The models are the tests' small saved ones: vLLM's dummy weights differ with the parallelism. `--cpu`
tries it out without expert parallelism: vLLM 0.32's CPU kernel for experts ends with a segmentation fault under
`--enable-expert-parallel`, without any connector too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from vllm_instances import ROOT, Registry, Server
from vllm_pd import KVFerryPair, Measured, body, environment, median_ms, post, tokens_of

LENGTHS = (1, 127, 128, 129, 1000, 4000)
MODELS = Path("/tmp/kvferry-tp-models")
NUM_TOKENS = 16
CPU_ENVIRON = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
CPU_ENVIRON |= {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}


class Case(NamedTuple):
    """Both sides' tensor-parallel sizes."""

    source: int
    target: int
    experts: bool = False


CASES = {"1to2": Case(1, 2), "2to1": Case(2, 1), "experts": Case(2, 2, experts=True)}


def start(options: argparse.Namespace, case: Case, registry: Registry) -> KVFerryPair:
    model = "qwen3moe" if case.experts else "llama"
    subprocess.run([sys.executable, str(ROOT / "tools" / "make_tiny_models.py"), str(MODELS), model], check=True)
    options.model = MODELS / model
    flags = ["--dtype", "bfloat16" if case.experts and not options.cpu else "float32"]
    if case.experts and not options.cpu:
        flags += ["--enable-expert-parallel"]
    servers = []
    try:
        for side, size in (("P", case.source), ("D", case.target)):
            kv = {
                "kv_connector": "KVFerryConnector",
                "kv_connector_module_path": "kvferry.connector.vllm",
                "kv_role": "kv_producer" if side == "P" else "kv_consumer",
                "kv_load_failure_policy": "fail",
                # First forwards compile for seconds, in which a worker answers nobody.
                "kv_connector_extra_config": {"router": registry.url, "instance_id": side, "lease_ttl_s": 20.0},
            }
            env = {"CUDA_VISIBLE_DEVICES": "0,1" if size == 2 else "0", **(CPU_ENVIRON if options.cpu else {})}
            servers.append(Server(side, options, kv, [*flags, "--tensor-parallel-size", str(size)], **env))
            # One after the other: two that measure the free memory of one GPU at a time disturb each other.
            servers[-1].wait_ready()
        while not {"P", "D"} <= set(registry.reports):
            time.sleep(0.1)
    except (RuntimeError, KeyboardInterrupt):
        for server in servers:
            server.stop()
        raise
    return KVFerryPair(servers[0], servers[1], registry, ThreadPoolExecutor(4))


def measure(pair: KVFerryPair, name: str, repeats: int, lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    rng, rows = random.Random(1), []
    for server in (pair.prefill, pair.decode):
        # The first forward compiles for seconds, in which no handoff would be answered.
        post(server, body([rng.randrange(10, 30000) for _ in range(700)], 2))
    for length in lengths:
        alone: list[float] = []
        over: list[Measured] = []
        equal = 0
        for number in range(repeats + 1):
            prompt = [rng.randrange(10, 30000) for _ in range(length)]
            result = pair.request(prompt, NUM_TOKENS)
            began_s = time.perf_counter()
            ended_s, answer = post(pair.prefill, body(prompt, NUM_TOKENS))
            if number:
                alone.append(ended_s - began_s)
                over.append(result)
                equal += result.token == tokens_of(answer)
        row = {
            "case": name,
            "prompt": length,
            "tokens_equal": f"{equal} of {repeats}",
            "pair_ms": median_ms([m.ttft_s for m in over]),
            "source_alone_ms": median_ms(alone),
            "last": over[-1].note,
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def main() -> int:
    ask = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ask.add_argument("--out", type=Path, default=Path("vllm_tp.json"))
    ask.add_argument("--cases", default=",".join(CASES))
    ask.add_argument("--repeats", type=int, default=3)
    ask.add_argument("--utilization", type=float, default=0.4, help="of GPU memory, for each instance")
    ask.add_argument("--cpu", action="store_true")
    options = ask.parse_args()
    options.graphs, options.load_format, options.max_model_len = False, "auto", 8192
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        for name in options.cases.split(","):
            registry = Registry()
            pair = start(options, CASES[name], registry)
            try:
                rows += measure(pair, name, options.repeats, LENGTHS[:5] if options.cpu else LENGTHS)
            finally:
                pair.prefill.stop()
                pair.decode.stop()
    finally:
        about = {} if options.cpu else environment()
        options.out.write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")
    return 0 if all(row["tokens_equal"] == f"{options.repeats} of {options.repeats}" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
