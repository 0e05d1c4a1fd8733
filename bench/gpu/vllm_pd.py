"""Real vLLM on one or two GPUs: time to first token of one instance, a kvferry pair, a NixlConnector pair. Writes JSON.

    . /tmp/site.env; python3 bench/gpu/vllm_pd.py --out "$OUT/vllm_pd.json" [--gpus 2] [--pairs kvferry,nixl] [--trace]

An 8B-sized Qwen3 with dummy weights: 36 layers, 8 KV heads of 128, bfloat16, 147 KB of KV a token. With one GPU all
instances share it; with two, the single instance and both sources are on GPU 0, the targets on GPU 1. All start at once
and stay up; the requests of the systems alternate, so that all see the same machine. Each instance takes some 24 GiB
(16.4 GB of weights, 6.5 GB of KV): three fit into 80 GB. Figures:

- `ttft_ratio`: from sending the request to the pair to the target's first token, over one instance's;
- `first_token_streamed_ratio`: the same to the source's first token, as a router gives it that streams it at once;
- `prefill_pulled_ratio`: the source's speed on its prompt while it is pulled from, over that without a handoff;
- `itl_ratio`: gaps between tokens that the target streams to another client while it pulls, over those while the same
  prompt is computed by the source without a handoff;
- with `--trace`, where a handoff's milliseconds go (vllm_timeline.py).
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from vllm_instances import Registry, Server, Site, add_common, dummy_model, start, stop, tiny_models, wait_for
from vllm_report import Report
from vllm_requests import KVFerryPair, Measured, NixlPair, Pair, body, complete, median_ms, post, random_prompt
from vllm_timeline import num_warm, timeline

KV_BYTES_A_TOKEN = 36 * 2 * 8 * 128 * 2
KV_BYTES = 6_500_000_000
"""44,000 tokens: a prompt of 30,000 beside a running request, within the share that may wait for handoffs (0.8)."""
PROMPTS = (1000, 8000, 30000)
CPU_PROMPTS = (100, 400, 1200)


def connectors(options: argparse.Namespace, registry: Registry) -> list[tuple[str, dict[str, Any] | None, str]]:
    """(name, connector, GPU) of each instance."""
    target_gpu = "1" if options.gpus == 2 else "0"
    wanted: list[tuple[str, dict[str, Any] | None, str]] = [("single", None, "0")]
    if "kvferry" in options.pairs:
        for name, role, gpu in (("P", "kv_producer", "0"), ("D", "kv_consumer", target_gpu)):
            extra: dict[str, Any] = {"digest": options.digest}
            if options.trace:
                extra["trace"] = str(trace_of(options, name))
            if options.layers:
                extra["layers_a_publish"] = options.layers
            wanted.append((name, registry.connector(name, role, **extra), gpu))
    if "nixl" in options.pairs:
        nixl = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
        wanted += [("nixl-P", dict(nixl), "0"), ("nixl-D", dict(nixl), target_gpu)]
    return wanted


def trace_of(options: argparse.Namespace, name: str) -> Path:
    return Path(options.out.parent / f"trace-{name}.txt")


def environ_of(name: str) -> dict[str, str]:
    if not name.startswith("nixl"):
        return {}
    port = "5600" if name == "nixl-P" else "5700"
    return {"VLLM_NIXL_SIDE_CHANNEL_PORT": port, "UCX_TLS": "cuda_ipc,cuda_copy,tcp,sm,self"}


def measure_one_token(servers: list[Server], rng: random.Random) -> dict[str, Any]:
    """What a prompt of one token takes on each instance alone: the least that a decode leg can take."""
    taken: dict[str, list[float]] = {s.name: [] for s in servers}
    for _ in range(12):
        for server in servers:
            taken[server.name].append(complete(server, random_prompt(rng, 1), 1)[0])
    return {"section": "one token", "ms": {name: median_ms(values[2:]) for name, values in taken.items()}}


def measure_prompt(
    single: Server, pairs: list[Pair], num_tokens: int, repeats: int, rng: random.Random
) -> list[dict[str, Any]]:
    """A row for each pair."""
    alone: list[float] = []
    over: dict[str, list[Measured]] = {p.name: [] for p in pairs}
    same = {p.name: 0 for p in pairs}
    for number in range(repeats + num_warm(num_tokens)):
        prompt = random_prompt(rng, num_tokens)
        seconds: float = 0.0
        token: list[int] = []
        results: dict[str, Measured] = {}
        # Each system goes first as often as the others: the one after a pause finds a GPU with lower clocks.
        order: list[Pair | None] = [None, *pairs]
        for pair in order[number % len(order) :] + order[: number % len(order)]:
            if pair is None:
                seconds, token = complete(single, prompt, 1)
            else:
                results[pair.name] = pair.request(prompt)
        if number < num_warm(num_tokens):
            continue
        alone.append(seconds)
        for name, result in results.items():
            over[name].append(result)
            same[name] += result.token == token == result.source_token
    rows = []
    for name, found in over.items():
        ttft, source = [m.ttft_s for m in found], [m.source_s for m in found]
        row = {
            "section": "ttft",
            "system": name,
            "prompt": num_tokens,
            "kv_mb": round(num_tokens * KV_BYTES_A_TOKEN / 1e6, 1),
            "single_ms": median_ms(alone),
            "ttft_ms": median_ms(ttft),
            "source_ms": median_ms(source),
            "ttft_ratio": round(statistics.median(ttft) / statistics.median(alone), 4),
            "first_token_streamed_ratio": round(statistics.median(source) / statistics.median(alone), 4),
            "tokens_equal": f"{same[name]} of {repeats}",
            "all_ttft_ms": [round(v * 1e3, 2) for v in ttft],
            "all_single_ms": [round(v * 1e3, 2) for v in alone],
            "last": found[-1].note,
        }
        rows.append(row)
    return rows


class TokenGaps:
    """Streams a long answer from a server on a thread of its own and notes when each token came."""

    def __init__(self, server: Server, prompt: list[int], num_tokens: int) -> None:
        self.moments: list[float] = []
        self._data = body(prompt, num_tokens, stream=True)
        self._url = f"{server.url}/v1/completions"
        threading.Thread(target=self._run, daemon=True).start()
        wait_for(lambda: len(self.moments) >= 20, 30, "20 tokens of the running request")

    def _run(self) -> None:
        request = urllib.request.Request(self._url, self._data, headers={"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    self.moments.append(time.perf_counter())

    def between(self, began_s: float, ended_s: float) -> list[float]:
        inside = [m for m in list(self.moments) if began_s <= m <= ended_s]
        return [b - a for a, b in itertools.pairwise(inside)]


def measure_interference(pair: KVFerryPair, num_tokens: int, repeats: int, rng: random.Random) -> dict[str, Any]:
    """What a handoff costs the source's prefill and the target's running request."""
    gaps: dict[str, list[float]] = {"without": [], "with": []}
    prefill: dict[str, list[float]] = {"without": [], "with": []}
    stream = TokenGaps(pair.decode, random_prompt(rng, 200), 1800)
    for i in range(2 * repeats):
        prompt = random_prompt(rng, num_tokens)
        kind = "with" if i % 2 else "without"
        began_s = time.perf_counter()
        if i % 2:
            result = pair.request(prompt)
            ended_s = began_s + result.source_s
        else:
            ended_s, _ = post(pair.prefill, body(prompt, 1))
        prefill[kind].append(ended_s - began_s)
        gaps[kind] += stream.between(began_s, ended_s)
        time.sleep(0.2)
    ordered = {k: sorted(v) for k, v in gaps.items()}
    return {
        "section": "interference",
        "system": pair.name,
        "prompt": num_tokens,
        "prefill_ms": {k: median_ms(v) for k, v in prefill.items()},
        "prefill_pulled_ratio": round(statistics.median(prefill["without"]) / statistics.median(prefill["with"]), 4),
        "itl_ms": {k: median_ms(v) for k, v in gaps.items()},
        "itl_p99_ms": {k: round(v[int(len(v) * 0.99)] * 1e3, 2) for k, v in ordered.items()},
        "itl_ratio": round(statistics.median(gaps["with"]) / statistics.median(gaps["without"]), 4),
        "num_gaps": {k: len(v) for k, v in gaps.items()},
    }


def measure(options: argparse.Namespace, report: Report, servers: dict[str, Server], registry: Registry) -> None:
    rng = random.Random(0)
    prompts = CPU_PROMPTS if options.cpu else PROMPTS
    ferries = [KVFerryPair(servers["P"], servers["D"], registry)] if {"P", "D"} <= set(servers) else []
    pairs: list[Pair] = [*ferries]
    if {"nixl-P", "nixl-D"} <= set(servers):
        pairs.append(NixlPair(servers["nixl-P"], servers["nixl-D"]))
    with report.section("one token", 60):
        report.add(measure_one_token(list(servers.values()), rng))
    for num_tokens in prompts:
        with report.section(f"ttft {num_tokens}", 120):
            for row in measure_prompt(servers["single"], pairs, num_tokens, options.repeats, rng):
                report.add(row)
    if ferries and options.trace:
        with report.section("timeline", 20):
            source, target = trace_of(options, "P"), trace_of(options, "D")
            for row in timeline(source, target, list(prompts), options.repeats):
                report.add(row)
    for pair in ferries:
        with report.section("interference", 60):
            report.add(measure_interference(pair, prompts[-1], 5, rng))


def main() -> int:
    ask = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_common(ask, "vllm_pd")
    ask.add_argument("--gpus", type=int, choices=(1, 2), default=1)
    ask.add_argument("--graphs", action="store_true", help="with CUDA graphs of decode steps")
    ask.add_argument("--pairs", default="kvferry,nixl", type=lambda s: s.split(","))
    ask.add_argument("--repeats", type=int, default=5)
    layers = "kvferry: publish so many layers at a time (0: as it chooses; 36: whole chunks)"
    ask.add_argument("--layers", type=int, default=0, help=layers)
    ask.add_argument("--digest", default="xxh3", help="kvferry: of the blocks; sum is what GPUs take")
    ask.add_argument("--trace", action="store_true", help="kvferry: each instance writes its moments beside OUT")
    options = ask.parse_args()
    flags = ["--max-num-seqs", "16", "--no-enable-prefix-caching"]
    if options.cpu:
        tiny_models(options.models, "llama")
        model = options.models / "llama"
        flags += ["--dtype", "bfloat16", "--max-num-batched-tokens", "512"]
    else:
        model = dummy_model(options.models / "qwen3-8b-dummy")
        flags += ["--load-format", "dummy"]
    about = {"num_gpus": options.gpus, "graphs": options.graphs, "layers": options.layers, "digest": options.digest}
    graphs = (1, 2, 4, 8, 16) if options.graphs else ()
    length = 4096 if options.cpu else 33000
    site = Site(model, options.out.parent, KV_BYTES, length, tuple(flags), graphs, options.cpu)
    report = Report(options.out, patience=site.patience, **about)
    for name in ("P", "D"):
        trace_of(options, name).unlink(missing_ok=True)
    registry = Registry()
    servers: dict[str, Server] = {}
    try:
        for name, kv, gpu in connectors(options, registry):
            servers[name] = Server(name, site, kv, gpus=gpu, **environ_of(name))
        serving: dict[str, Server] = {}
        with report.section("start", 240):
            serving = {server.name: server for server in start(servers.values(), registry, patience=report.patience)}
            if missing := set(servers) - set(serving):
                raise RuntimeError(f"{', '.join(sorted(missing))} did not start")
        if "single" in serving:
            measure(options, report, serving, registry)
    finally:
        stop(servers.values())
        report.finish(cpu=options.cpu)
    return 1 if report.num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
