"""Real vLLM on the CPU: time to a pair's first token by how early the source publishes, interleaved.

    .venv-vllm/bin/python bench/vllm_publications.py [--out FILE] [--rounds N]

Four servers: three sources that publish whole chunks, each layer, and as they choose (`layers_a_publish` 0, 1, auto),
and one target. Every answer must be that of the source itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "vllm"))

from serving import PATIENT, Pair, Registry, Server, complete, kv_config, prompt_of, wait_for  # noqa: E402

KINDS = {"whole": 0, "layers": 1, "auto": "auto"}
LENGTHS = (128, 500, 1000, 1900)
WARM_UP = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--model", type=Path, default=ROOT / ".vllm" / "models" / "llama")
    options = parser.parse_args()
    registry, logs = Registry(), tempfile.mkdtemp()
    started = {name: Server(name, options.model, logs, kv=settings(registry, name)) for name in (*KINDS, "D")}
    try:
        for server in started.values():
            server.ready()
        wait_for(lambda: set(started) <= set(registry.reports), 30, "all register")
        rows = measure(registry, started, options.rounds)
    finally:
        for server in started.values():
            server.stop()
        registry.close()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    report = {
        "commit": commit,
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{os.cpu_count()} cores, no GPU; vLLM on the CPU",
        "rows": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def settings(registry: Registry, name: str) -> dict:
    return kv_config(registry, name, **PATIENT, **({} if name == "D" else {"layers_a_publish": KINDS[name]}))


def measure(registry: Registry, started: dict[str, Server], rounds: int) -> list[dict]:
    seen: dict[tuple[int, str], list[float]] = {}
    pairs = {kind: Pair(registry, started[kind], started["D"]) for kind in KINDS}
    for number in range(rounds + WARM_UP):
        for length in LENGTHS:
            for kind in rotated(list(KINDS), number):
                prompt = prompt_of(length, seed=100_000 + 1_000 * number + 10 * length + list(KINDS).index(kind))
                began_s = time.perf_counter()
                result = pairs[kind].complete(prompt, 1)
                seconds = time.perf_counter() - began_s
                assert result.outcome.state == "delivered", result.outcome
                assert result.token_ids == complete(started[kind].url, prompt, 1)
                if number >= WARM_UP:
                    seen.setdefault((length, kind), []).append(seconds * 1e3)
    rows = []
    for (length, kind), times in seen.items():
        rows.append({"tokens": length, "publishes": kind, "ms": round(statistics.median(times), 1), "all_ms": times})
        print(f"{length:5} tokens, {kind:6}: {rows[-1]['ms']:7.1f} ms")
    for kind in KINDS:
        lines = [x for x in started[kind].page().splitlines() if x.startswith("vllm:kvferry_publications_total{")]
        pieces = {x.partition('pieces="')[2].partition('"')[0]: float(x.rsplit(" ", 1)[1]) for x in lines}
        rows.append({"publishes": kind, "steps_by_pieces": pieces})
        print(kind, pieces)
    return rows


def rotated(names: list[str], number: int) -> list[str]:
    return names[number % len(names) :] + names[: number % len(names)]


if __name__ == "__main__":
    sys.exit(main())
