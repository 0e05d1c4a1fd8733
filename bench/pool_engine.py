"""What the KV pool costs an engine that saves, and what it spares one that loads.

    python bench/pool_engine.py [--json FILE] [--rounds N]

Three embedded engines with the demo's model answer the same prompts, one engine after the other in each round: `alone`
has no pool, `saves` computes and saves everything, `loads` finds it there. The node is a process of its own. Ratios are
taken within a round, and their median counts.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from kvferry.config import EngineSettings
from kvferry.connector.transformers.engine import Engine
from kvferry.connector.transformers.memory import KVMemory
from kvferry.connector.transformers.model import LoadedModel, load_model
from kvferry.connector.transformers.params import SamplingParams
from kvferry.connector.transformers.sequence import Event, GenerationRequest, Piece
from kvferry.observe import LISTENING
from kvferry.pool import BlockSpace, PoolAttachment

PROMPT_TOKENS, ANSWER_TOKENS, REQUESTS, NUM_BLOCKS = 960, 48, 4, 512


class Node:
    """`kvferry node` in a process of its own."""

    def __init__(self, slab_bytes: int, *, slabs: int) -> None:
        flags = ["--arena-bytes", str(slabs * slab_bytes + (1 << 20)), "--slab-bytes", str(slab_bytes)]
        command = [sys.executable, "-m", "kvferry", "node", *flags, "--log-level", "warning"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().removeprefix(LISTENING).strip()

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


class Served:
    """One engine on a thread of its own."""

    def __init__(self, loaded: LoadedModel, node: str | None) -> None:
        settings = EngineSettings(num_blocks=NUM_BLOCKS)
        geometry = loaded.geometry(settings.block_size)
        arena = torch.zeros(geometry.arena_bytes(NUM_BLOCKS), dtype=torch.uint8)
        memory = KVMemory(geometry, NUM_BLOCKS, arena)
        self.pool: PoolAttachment | None = None
        if node is not None:
            layout = memory.layout(region=0)
            space = BlockSpace.of(loaded.fingerprint(settings.block_size), layout)
            self.pool = PoolAttachment([node], space, layout, {0: arena}, wake=lambda: self.engine.wake())
        self.engine = Engine(loaded, memory, settings, pool=self.pool)
        self.engine.start()

    def answer(self, prompts: list[list[int]]) -> dict[str, float]:
        """Milliseconds: median time to first token, median and worst gap between tokens, all of it."""
        told: list[list[float]] = [[] for _ in prompts]
        ended = threading.Semaphore(0)
        began_s = time.perf_counter()

        def sink_of(times: list[float]) -> Any:
            def sink(event: Event) -> None:
                assert isinstance(event, Piece), event
                times.append(time.perf_counter())
                if event.finish_reason is not None:
                    ended.release()

            return sink

        params = SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS, ignore_eos=True)
        for i, prompt in enumerate(prompts):
            request = GenerationRequest(
                request_id=f"{began_s}-{i}", prompt=prompt, params=params, sink=sink_of(told[i])
            )
            self.engine.submit(request)
        for _ in prompts:
            assert ended.acquire(timeout=120)
        wall_s = time.perf_counter() - began_s
        while self.pool is not None and self.engine.snapshot.pool_transfers:
            time.sleep(0.001)
        gaps = [b - a for times in told for a, b in itertools.pairwise(times)]
        figures = {
            "ttft": statistics.median(times[0] - began_s for times in told),
            "itl": statistics.median(gaps),
            "worst_gap": max(gaps),
            "wall": wall_s,
        }
        return {name: 1000 * value for name, value in figures.items()}

    def close(self) -> None:
        self.engine.close()
        if self.pool is not None:
            self.pool.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="The KV pool under the embedded engine")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_model(None, device="cpu")
    slab_bytes = loaded.num_layers * loaded.geometry(16).block_bytes
    rng, rounds = random.Random(1), list[dict[str, dict[str, float]]]()
    with contextlib.closing(Node(slab_bytes, slabs=4096)) as node:
        engines = {"alone": Served(loaded, None), "saves": Served(loaded, node.address)}
        engines["loads"] = Served(loaded, node.address)
        for _ in range(args.rounds + 1):
            prompts = [[rng.randrange(loaded.vocab_size) for _ in range(PROMPT_TOKENS)] for _ in range(REQUESTS)]
            rounds.append({name: engine.answer(prompts) for name, engine in engines.items()})
        snapshots = {name: engine.engine.snapshot for name, engine in engines.items()}
        for engine in engines.values():
            engine.close()
    del rounds[0]
    full = (PROMPT_TOKENS - 1) // 16 * 16 * REQUESTS * (args.rounds + 1)
    assert (snapshots["saves"].pooled_prompt_tokens, snapshots["loads"].pooled_prompt_tokens) == (0, full)
    results = {
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "prompt_tokens": PROMPT_TOKENS,
        "block_bytes": slab_bytes,
        "requests_a_round": REQUESTS,
        "ms": {
            name: {what: statistics.median(r[name][what] for r in rounds) for what in rounds[0][name]}
            for name in engines
        },
        "ratio_to_alone": {
            name: {
                what: statistics.median(r[name][what] / r["alone"][what] for r in rounds) for what in rounds[0][name]
            }
            for name in ("saves", "loads")
        },
        "all": rounds,
    }
    print(json.dumps({name: value for name, value in results.items() if name != "all"}, indent=1))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
