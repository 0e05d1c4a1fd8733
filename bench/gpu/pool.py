"""The pool over one GPU's memory: GB/s of saves and loads, and what they cost a decode beside them. Writes JSON.

    . /tmp/site.env; python3 bench/gpu/pool.py --out "$OUT/pool.json"

An 8B-sized KV cache (36 layers, blocks of 16 tokens of 64 KiB a layer), a `kvferry node` of this host, batches of
shuffled blocks, every byte compared. Beside them: one contiguous copy between the GPU and pinned host memory. The
decode is a CUDA graph of matrix products that read 4.8 GB of weights; its steps alone, and while blocks are saved or
loaded, in turns. `--cpu` runs it in host memory, to try the script out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "src"))

from kvferry.layout import Fingerprint, KVLayout, LayerLayout  # noqa: E402
from kvferry.observe import LISTENING  # noqa: E402
from kvferry.pool import BlockSpace, PoolAttachment  # noqa: E402

LAYER_BYTES = 65536
WAIT_S = 60.0
PIN_LIMIT_S = 60.0
SWITCH_INTERVAL_S = 0.0005
"""As the connector for vLLM sets it: loads and the decode beside them share an interpreter, here and there."""


class Bench:
    """A KV cache, its attachment, and a node."""

    def __init__(self, options: argparse.Namespace) -> None:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self.on_gpu, self.num_layers, self.num_blocks = not options.cpu, options.layers, options.blocks
        self.block_bytes = LAYER_BYTES * self.num_layers
        arena = (2 * options.rounds + 4) * options.batch * self.block_bytes
        command = [sys.executable, "-m", "kvferry", "node", "--slab-bytes", str(self.block_bytes)]
        command += ["--arena-bytes", str(arena), "--log-level", "warning"]
        path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path}
        self.node = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.node.stdout is not None
        line = self.node.stdout.readline()
        assert line.startswith(LISTENING), line
        # Half of it is saved from, half is loaded into.
        self.memory = torch.zeros(2 * self.num_blocks * self.block_bytes, dtype=torch.uint8, device=self.device)
        self.memory[: self.memory.numel() // 2].random_(0, 256)
        stride = 2 * self.num_blocks * LAYER_BYTES
        layers = tuple(LayerLayout(0, i * stride, LAYER_BYTES) for i in range(self.num_layers))
        layout = KVLayout(2 * self.num_blocks, 16, LAYER_BYTES, 8, layers)
        for layer in range(self.num_layers):
            self.memory[layer * stride : layer * stride + stride // 2].random_(0, 256)
        space = BlockSpace.of(Fingerprint("bench", "bfloat16", 16, self.num_layers, 8, 128), layout)
        self.pool = PoolAttachment(
            [line.removeprefix(LISTENING).strip()], space, layout, {0: self.memory}, deadline_s=WAIT_S
        )
        self.view = self.memory.view(self.num_layers, 2 * self.num_blocks, LAYER_BYTES)
        self.random = np.random.default_rng(1)
        self._names = 0
        self.sync()

    @property
    def device(self) -> str:
        return "cuda" if self.on_gpu else "cpu"

    def sync(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def names(self, count: int) -> list[bytes]:
        """Blocks that the pool never saw."""
        self._names += count
        return [i.to_bytes(32, "big") for i in range(self._names - count, self._names)]

    def sources(self, count: int) -> list[int]:
        return [int(i) for i in self.random.permutation(self.num_blocks)[:count]]

    def targets(self, count: int) -> list[int]:
        return [self.num_blocks + i for i in self.sources(count)]

    def save(self, names: list[bytes], ids: list[int]) -> float:
        """Seconds."""
        began_s = time.perf_counter()
        saved = self.pool.save(names, ids).result(WAIT_S)
        assert (saved.stored, saved.cause) == (len(names), None), saved
        return time.perf_counter() - began_s

    def load(self, names: list[bytes], ids: list[int]) -> float:
        began_s = time.perf_counter()
        loaded = self.pool.load(names, ids).result(WAIT_S)
        assert (loaded.num_blocks, loaded.cause) == (len(names), None), loaded
        return time.perf_counter() - began_s

    def same(self, sources: list[int], targets: list[int]) -> bool:
        return torch.equal(self.view[:, sources], self.view[:, targets])

    def clear(self, targets: list[int]) -> None:
        self.view[:, targets] = 0
        self.sync()

    def arena_is_pinned(self) -> bool:
        device: Any = self.pool._device
        return device is not None and any(device._arenas._pinned.values())

    def close(self) -> None:
        self.pool.close()
        self.node.terminate()
        self.node.wait(30)


class Decode:
    """Steps of matrix products, as decoding reads its weights."""

    def __init__(self, bench: Bench) -> None:
        layers, wide = (36, 16384) if bench.on_gpu else (2, 1024)
        dtype = torch.bfloat16 if bench.on_gpu else torch.float32
        self._x = torch.randn(16, 4096, device=bench.device, dtype=dtype)
        self._weights = [torch.randn(4096, wide, device=bench.device, dtype=dtype) for _ in range(layers)]
        self._bench, self._graph = bench, None
        self._work()
        bench.sync()
        if bench.on_gpu:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._work()

    def _work(self) -> None:
        for weight in self._weights:
            torch.matmul(self._x, weight)

    def step_s(self) -> float:
        began_s = time.perf_counter()
        if self._graph is not None:
            self._graph.replay()
        else:
            self._work()
        self._bench.sync()
        return time.perf_counter() - began_s

    def steps(self, seconds: float) -> list[float]:
        until_s = time.perf_counter() + seconds
        taken: list[float] = []
        while time.perf_counter() < until_s:
            taken.append(self.step_s())
        return taken


def contiguous(bench: Bench, nbytes: int) -> dict[str, float]:
    """One copy between the GPU and pinned memory, each way, GB/s."""
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=bench.on_gpu)
    there = bench.memory[:nbytes].clone()

    def median_s(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(7):
            bench.sync()
            began_s = time.perf_counter()
            work()
            bench.sync()
            times.append(time.perf_counter() - began_s)
        return statistics.median(times)

    return {
        "device_to_host_GBps": nbytes / 1e9 / median_s(lambda: host.copy_(there)),
        "host_to_device_GBps": nbytes / 1e9 / median_s(lambda: there.copy_(host)),
    }


def throughput(bench: Bench, batch: int, rounds: int) -> dict[str, Any]:
    """Medians over the rounds; each round saves blocks, loads them staged, then straight from the node's memory."""
    nbytes = batch * bench.block_bytes
    device: Any = bench.pool._device
    times: dict[str, list[float]] = {"save": [], "load_staged": [], "load_direct": []}
    equal = True
    warm, sources = bench.names(batch), bench.sources(batch)
    bench.save(warm, sources)
    until_s = time.monotonic() + PIN_LIMIT_S
    while bench.on_gpu and not bench.arena_is_pinned() and time.monotonic() < until_s:
        bench.load(warm, bench.targets(batch))
        time.sleep(0.05)
    for _ in range(rounds):
        names, sources = bench.names(batch), bench.sources(batch)
        times["save"].append(bench.save(names, sources))
        kinds = ["load_staged", "load_direct"] if bench.arena_is_pinned() else ["load_staged"]
        for kind in kinds:
            targets = bench.targets(batch)
            bench.clear(targets)
            if device is not None and kind == "load_staged":
                find, device._arenas.find = device._arenas.find, lambda *_: None
                times[kind].append(bench.load(names, targets))
                device._arenas.find = find
            else:
                times[kind].append(bench.load(names, targets))
            equal = equal and bench.same(sources, targets)
    figures: dict[str, Any] = {"blocks": batch, "MiB": nbytes >> 20, "bytes_equal": equal}
    for kind, seconds in times.items():
        if seconds:
            figures[f"{kind}_GBps"] = nbytes / 1e9 / statistics.median(seconds)
    return figures


def beside_decode(bench: Bench, batch: int, rounds: int) -> dict[str, Any]:
    """Decode steps alone, while saving, while loading; ratios of the medians within a round."""
    decode = Decode(bench)
    known, ids = bench.names(batch), bench.sources(batch)
    bench.save(known, ids)
    ratios: dict[str, list[float]] = {"saving": [], "loading": []}
    worst: dict[str, list[float]] = {"saving": [], "loading": []}
    alone_ms: list[float] = []
    for _ in range(rounds):
        alone = decode.steps(0.5)
        alone_ms.append(1e3 * statistics.median(alone))
        for what in ratios:
            stop = threading.Event()

            def move(what: str = what, stop: threading.Event = stop) -> None:
                while not stop.is_set():
                    if what == "saving":
                        bench.save(bench.names(batch), bench.sources(batch))
                    else:
                        bench.load(known, bench.targets(batch))

            mover = threading.Thread(target=move)
            mover.start()
            steps = decode.steps(0.5)
            stop.set()
            mover.join(WAIT_S)
            ratios[what].append(statistics.median(steps) / statistics.median(alone))
            worst[what].append(statistics.quantiles(steps, n=100)[98] / statistics.median(alone))
    return {
        "step_alone_ms": statistics.median(alone_ms),
        **{f"step_ratio_{what}": statistics.median(r) for what, r in ratios.items()},
        **{f"step_p99_over_median_alone_{what}": statistics.median(r) for what, r in worst.items()},
    }


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--out", type=Path, required=True)
    ask.add_argument("--layers", type=int, default=36)
    ask.add_argument("--blocks", type=int, default=2048, help="of the cache's half that is saved from (default 2048)")
    ask.add_argument("--batch", type=int, default=512, help="blocks in one save or load (default 512: 1.1 GiB)")
    ask.add_argument("--rounds", type=int, default=5)
    ask.add_argument("--cpu", action="store_true", help="in host memory, to try the script out")
    options = ask.parse_args()
    bench = Bench(options)
    try:
        about = {
            "commit": os.environ.get("COMMIT", ""),
            "machine": {
                "gpu": torch.cuda.get_device_name(0) if bench.on_gpu else None,
                "cores": len(os.sched_getaffinity(0)),
                "kernel": platform.release(),
            },
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "command": " ".join(["python3", *sys.argv]),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        report: dict[str, Any] = {
            "about": about,
            "contiguous": contiguous(bench, 256 << 20 if bench.on_gpu else 1 << 20),
        }
        for batch in (16, options.batch):
            report[f"batch_{batch}"] = throughput(bench, min(batch, options.batch), options.rounds)
            print(json.dumps(report[f"batch_{batch}"]), flush=True)
        report["arena_pinned"] = bench.arena_is_pinned()
        report["decode"] = beside_decode(bench, options.batch, options.rounds)
        report["failures"] = bench.pool.stats().failures
        print(json.dumps(report, indent=1), flush=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    finally:
        bench.close()


if __name__ == "__main__":
    main()
