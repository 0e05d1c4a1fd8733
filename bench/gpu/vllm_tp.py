"""Tensor parallelism and experts over two GPUs: KV handed over between them, tokens equal to one instance's. JSON.

    . /tmp/site.env; python3 bench/gpu/vllm_tp.py --out "$OUT/vllm_tp.json" [--cases 1to2,2to1,experts]

`1to2`: P with TP 1 on GPU 0, D with TP 2 over both; `2to1` the other way round. `experts`: a Qwen3-MoE-shaped model,
TP 2 and `--enable-expert-parallel` on both sides, which share the two GPUs. `hybrid`: full attention with sliding
windows, TP 1 to 2; not by default, as vLLM 0.26 refuses to start it without its hybrid KV cache manager. The
instances of all cases start at once and stay up; cases are measured one after the other.

The models are the tests' small saved ones, whose output depends on every part of the KV cache (vLLM's dummy weights
differ with the parallelism). The references are P itself and D itself, each asked without a ticket: single instances of
the two parallelisms. Over two ranks sums round otherwise than within one, and those of the last token otherwise where
it is computed alone, so that float32 is used; `references_equal` says how often the two references were the same.
`--cpu` tries it out without expert parallelism: vLLM 0.32's CPU kernel for experts ends with a segmentation fault under
it, without any connector too.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
from typing import Any, NamedTuple

from vllm_instances import Registry, Server, Site, add_common, start, stop, tiny_models
from vllm_report import Report
from vllm_requests import KVFerryPair, Measured, complete, median_ms, random_prompt

LENGTHS = (1, 127, 128, 129, 1000, 4000)
NUM_TOKENS = 16
KV_BYTES = 1 << 30


class Case(NamedTuple):
    """Both sides' tensor-parallel sizes."""

    model: str
    source: int
    target: int
    experts: bool = False


CASES = {
    "1to2": Case("llama", 1, 2),
    "2to1": Case("llama", 2, 1),
    "experts": Case("qwen3moe", 2, 2, experts=True),
    "hybrid": Case("gemma3", 1, 2),
}


def launch(options: argparse.Namespace, name: str, site: Site, registry: Registry) -> list[Server]:
    """P and D of a case, starting."""
    case = CASES[name]
    flags = ["--dtype", "float32"]
    if case.experts and not options.cpu:
        flags += ["--enable-expert-parallel"]
    servers = []
    for side, role, size in (("P", "kv_producer", case.source), ("D", "kv_consumer", case.target)):
        instance = f"{name}-{side}"
        # First forwards compile for seconds, in which a worker answers nobody.
        kv = registry.connector(instance, role, policy="fail", lease_ttl_s=20.0)
        gpus = "0,1" if size == 2 else "0"
        # vLLM's own all-reduce tests peer access at its start, in a file that all instances would share.
        more = ["--tensor-parallel-size", str(size), "--disable-custom-all-reduce"]
        own = dataclasses.replace(site, model=options.models / case.model)
        servers.append(Server(instance, own, kv, gpus=gpus, flags=[*flags, *more]))
    return servers


def measure(pair: KVFerryPair, name: str, length: int, repeats: int, rng: random.Random) -> dict[str, Any]:
    alone: list[float] = []
    over: list[Measured] = []
    equal, references_equal = {"source": 0, "target": 0}, 0
    for number in range(repeats + 1):
        prompt = random_prompt(rng, length)
        result = pair.request(prompt, NUM_TOKENS)
        seconds, by_source = complete(pair.prefill, prompt, NUM_TOKENS)
        _, by_target = complete(pair.decode, prompt, NUM_TOKENS)
        if number:  # the first of each length is a warm-up
            alone.append(seconds)
            over.append(result)
            equal["source"] += result.token == by_source
            equal["target"] += result.token == by_target
            references_equal += by_source == by_target
    return {
        "section": "tokens",
        "case": name,
        "prompt": length,
        "tokens_equal": f"{equal['source']} of {repeats}",
        "tokens_equal_target_alone": f"{equal['target']} of {repeats}",
        "references_equal": f"{references_equal} of {repeats}",
        "delivered": sum(m.note.startswith("delivered") for m in over),
        "pair_ms": median_ms([m.ttft_s for m in over]),
        "source_alone_ms": median_ms(alone),
        "last": over[-1].note,
    }


def main() -> int:
    ask = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_common(ask, "vllm_tp")
    ask.add_argument("--cases", default=["1to2", "2to1", "experts"], type=lambda s: s.split(","))
    ask.add_argument("--repeats", type=int, default=3)
    options = ask.parse_args()
    flags = ("--max-num-seqs", "16", "--no-enable-prefix-caching", "--max-num-batched-tokens", "2048")
    site = Site(options.models, options.out.parent, KV_BYTES, 8192, flags, cpu=options.cpu)
    report = Report(options.out, patience=site.patience)
    registry = Registry()
    servers: list[Server] = []
    try:
        with report.section("models", 130):
            tiny_models(options.models, *{CASES[name].model for name in options.cases})
        serving: dict[str, Server] = {}
        with report.section("start", 260):
            for name in options.cases:
                servers += launch(options, name, site, registry)
            serving = {server.name: server for server in start(servers, registry, patience=report.patience)}
        for name in options.cases:
            with report.section(name, 80):
                pair = KVFerryPair(serving[f"{name}-P"], serving[f"{name}-D"], registry)
                rng = random.Random(1)
                for server in (pair.prefill, pair.decode):
                    # The first forward compiles for seconds, in which no handoff would be answered.
                    complete(server, random_prompt(rng, 700), 2)
                for length in LENGTHS[:5] if options.cpu else LENGTHS:
                    report.add(measure(pair, name, length, options.repeats, rng))
    finally:
        stop(servers)
        report.finish(cpu=options.cpu)
    return 1 if report.num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
