"""Real vLLM on one GPU: time to first token of one instance, of a kvferry pair, of a NixlConnector pair. Writes JSON.

    . /tmp/site.env; python3 bench/gpu/vllm_pd.py --out "$OUT/vllm_pd.json" [--graphs] [--pairs kvferry,nixl]

An 8B-sized Qwen3 with dummy weights: 36 layers, 8 KV heads of 128, bfloat16, 147 KB of KV a token. All instances share
GPU 0 and stay up; the requests of the systems alternate, so that all see the same GPU. Figures:

- `ttft_ratio`: from sending the request to the pair to the target's first token, over one instance's;
- `first_token_streamed_ratio`: the same to the source's first token, as a router gives it that streams it at once;
- `prefill_pulled_ratio`: the source's time for its prompt while it is pulled from, over the same without a handoff;
- `itl_ratio`: gaps between tokens that the target streams to another client while it pulls, over those while the same
  prompt is computed beside it without a handoff.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
from vllm_instances import CONFIG, ROOT, Registry, Server, start_all

from kvferry.types import HandoffId, HandoffTicket, new_handoff_id

KV_BYTES_A_TOKEN = 36 * 2 * 8 * 128 * 2
PROMPTS = (1000, 8000, 30000)

Token = list[int]


def body(prompt: Token, num_tokens: int, **more: Any) -> bytes:
    options = {"temperature": 0, "ignore_eos": True, "detokenize": False, "return_token_ids": True}
    return json.dumps({"model": "m", "prompt": prompt, "max_tokens": num_tokens, **options, **more}).encode()


def post(server: Server, data: bytes) -> tuple[float, dict[str, Any]]:
    """(moment of the answer, answer)."""
    request = urllib.request.Request(f"{server.url}/v1/completions", data, headers={"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=90) as answer:
            raw = answer.read()
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{server.name}: {error.code} {error.read().decode()[:2000]}") from error
    return time.perf_counter(), json.loads(raw)


def tokens_of(answer: dict[str, Any]) -> Token:
    return list(answer["choices"][0]["token_ids"])


class Single:
    """One instance without a connector: the measure of all things."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def first_token(self, prompt: Token) -> tuple[float, Token]:
        data = body(prompt, 1)
        began_s = time.perf_counter()
        ended_s, answer = post(self.server, data)
        return ended_s - began_s, tokens_of(answer)


class Measured(msgspec.Struct):
    """One request over a pair: seconds from its sending, and both sides' first token."""

    ttft_s: float
    source_s: float
    token: Token
    source_token: Token
    note: str = ""


class KVFerryPair:
    """Both legs at once."""

    name = "kvferry"

    def __init__(self, prefill: Server, decode: Server, registry: Registry, pool: ThreadPoolExecutor) -> None:
        self.prefill, self.decode, self._registry, self._pool = prefill, decode, registry, pool

    def request(self, prompt: Token, num_tokens: int = 1) -> Measured:
        """With more than one token, `ttft_s` is the time to the last of them."""
        handoff = new_handoff_id()
        source, target = (self._registry.ref(s.name) for s in (self.prefill, self.decode))
        to_source, to_target = (
            body(prompt, count, kv_transfer_params=HandoffTicket(handoff, side, source, target, 60.0).as_params())
            for side, count in (("source", 1), ("target", num_tokens))
        )
        began_s = time.perf_counter()
        prefill: Future[Any] = self._pool.submit(post, self.prefill, to_source)
        decode: Future[Any] = self._pool.submit(post, self.decode, to_target)
        try:
            ended_s, answer = decode.result(90)
        except RuntimeError as error:
            raise RuntimeError(f"{error}: {self._how_it_ended(handoff)}") from error
        source_s, source_answer = prefill.result(90)
        note = self._how_it_ended(handoff)
        return Measured(ended_s - began_s, source_s - began_s, tokens_of(answer), tokens_of(source_answer), note)

    def _how_it_ended(self, handoff: HandoffId) -> str:
        until_s = time.monotonic() + 3
        while handoff not in self._registry.outcomes and time.monotonic() < until_s:
            time.sleep(0.01)
        outcome = self._registry.outcomes.get(handoff)
        if outcome is None:
            return "no outcome"
        return f"{outcome.as_header()}; {outcome.transport}; {outcome.duration_s * 1e3:.1f} ms"


class NixlPair:
    """First the prefill leg, then the decode leg with what the first one answered, as NixlConnector wants it."""

    name = "nixl"

    def __init__(self, prefill: Server, decode: Server) -> None:
        self.prefill, self.decode = prefill, decode

    def request(self, prompt: Token) -> Measured:
        keys = ("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")
        ask = {"do_remote_decode": True, "do_remote_prefill": False, **dict.fromkeys(keys)}
        data = body(prompt, 1, kv_transfer_params=ask)
        began_s = time.perf_counter()
        source_s, source = post(self.prefill, data)
        ended_s, answer = post(self.decode, body(prompt, 1, kv_transfer_params=source["kv_transfer_params"]))
        return Measured(ended_s - began_s, source_s - began_s, tokens_of(answer), tokens_of(source))


Pair = KVFerryPair | NixlPair


def median_ms(values: list[float]) -> float:
    return round(statistics.median(values) * 1e3, 3)


def measure_one_token(servers: list[Server], rng: random.Random) -> dict[str, Any]:
    """What a prompt of one token takes on each instance alone: the least that a decode leg can take."""
    taken: dict[str, list[float]] = {s.name: [] for s in servers}
    for _ in range(12):
        for server in servers:
            data = body([rng.randrange(10, 150000)], 1)
            began_s = time.perf_counter()
            ended_s, _ = post(server, data)
            taken[server.name].append(ended_s - began_s)
    row = {"section": "one token", "ms": {name: median_ms(values[2:]) for name, values in taken.items()}}
    print(json.dumps(row), flush=True)
    return row


def measure_prompts(single: Single, pairs: list[Pair], repeats: int, rng: random.Random) -> list[dict[str, Any]]:
    rows = []
    for num_tokens in PROMPTS:
        alone: list[float] = []
        over: dict[str, list[Measured]] = {p.name: [] for p in pairs}
        same = {p.name: 0 for p in pairs}
        for i in range(repeats + 1):
            prompt = [rng.randrange(10, 150000) for _ in range(num_tokens)]
            seconds, token = single.first_token(prompt)
            results = {p.name: p.request(prompt) for p in pairs}
            if i == 0:  # warm-up: connections, kernels
                continue
            alone.append(seconds)
            for name, result in results.items():
                over[name].append(result)
                same[name] += result.token == token == result.source_token
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
            print(json.dumps(row), flush=True)
    return rows


class TokenGaps:
    """Streams a long answer from a server on a thread of its own and notes when each token came."""

    def __init__(self, server: Server, prompt: Token, num_tokens: int) -> None:
        self.moments: list[float] = []
        self._data = body(prompt, num_tokens, stream=True)
        self._url = f"{server.url}/v1/completions"
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        while len(self.moments) < 20:
            time.sleep(0.01)

    def _run(self) -> None:
        request = urllib.request.Request(self._url, self._data, headers={"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    self.moments.append(time.perf_counter())

    def between(self, began_s: float, ended_s: float) -> list[float]:
        inside = [m for m in list(self.moments) if began_s <= m <= ended_s]
        return [b - a for a, b in itertools.pairwise(inside)]


def measure_interference(pair: KVFerryPair, repeats: int, rng: random.Random) -> dict[str, Any]:
    """What a handoff of 30,000 tokens costs the source's prefill and the target's running request."""
    gaps: dict[str, list[float]] = {"without": [], "with": []}
    prefill: dict[str, list[float]] = {"without": [], "with": []}
    stream = TokenGaps(pair.decode, [rng.randrange(10, 150000) for _ in range(200)], 1500)
    for i in range(2 * repeats):
        prompt = [rng.randrange(10, 150000) for _ in range(30000)]
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
    row = {
        "section": "interference",
        "system": pair.name,
        "prompt": 30000,
        "prefill_ms": {k: median_ms(v) for k, v in prefill.items()},
        "prefill_pulled_ratio": round(statistics.median(prefill["without"]) / statistics.median(prefill["with"]), 4),
        "itl_ms": {k: median_ms(v) for k, v in gaps.items()},
        "itl_p99_ms": {k: round(v[int(len(v) * 0.99)] * 1e3, 2) for k, v in ordered.items()},
        "itl_ratio": round(statistics.median(gaps["with"]) / statistics.median(gaps["without"]), 4),
        "num_gaps": {k: len(v) for k, v in gaps.items()},
    }
    print(json.dumps(row), flush=True)
    return row


def environment() -> dict[str, Any]:
    import torch
    from vllm.version import __version__ as vllm_version

    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "gpu": torch.cuda.get_device_name(0),
        "vllm": vllm_version,
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or os.environ.get("COMMIT", "unknown"),
    }


def main() -> int:
    ask = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ask.add_argument("--out", type=Path, default=Path("vllm_pd.json"))
    ask.add_argument(
        "--graphs", action="store_true", help="with CUDA graphs and compilation, as vLLM starts by default"
    )
    ask.add_argument("--pairs", default="kvferry,nixl", type=lambda s: s.split(","))
    ask.add_argument("--repeats", type=int, default=5)
    ask.add_argument(
        "--layers",
        type=int,
        default=0,
        help="kvferry: publish so many layers at a time (0: as it chooses; 36: whole chunks)",
    )
    ask.add_argument("--trace", action="store_true", help="kvferry: each instance writes its moments beside OUT")
    ask.add_argument("--utilization", type=float, default=0.18, help="of GPU memory, for each instance")
    ask.add_argument("--model", type=Path, default=Path("/tmp/qwen3-8b-dummy"))
    options = ask.parse_args()
    options.load_format, options.max_model_len = "dummy", 33000
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.model.mkdir(exist_ok=True)
    (options.model / "config.json").write_text(json.dumps(CONFIG))
    registry, rng = Registry(), random.Random(0)
    rows: list[dict[str, Any]] = []
    servers = start_all(options, registry)
    try:
        pool = ThreadPoolExecutor(8)
        pairs: list[Pair] = []
        if "P" in servers:
            pairs.append(KVFerryPair(servers["P"], servers["D"], registry, pool))
        if "nixl-P" in servers:
            pairs.append(NixlPair(servers["nixl-P"], servers["nixl-D"]))
        rows.append(measure_one_token(list(servers.values()), rng))
        rows += measure_prompts(Single(servers["single"]), pairs, options.repeats, rng)
        rows += [measure_interference(p, 3, rng) for p in pairs if isinstance(p, KVFerryPair)]
    finally:
        for server in servers.values():
            server.stop()
        report = {"environment": environment(), "graphs": options.graphs, "layers": options.layers, "rows": rows}
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
