"""Goodput of one prefill and one decode instance against two plain ones, at rising request rates. Writes JSON.

    . /tmp/site.env; python3 bench/gpu/vllm_load.py --out "$OUT/load.json" --trace conversation_trace.jsonl

Two GPUs: each system has both to itself in turn, `kvferry up --engine vllm` with its router, and two `vllm serve`
without any connector that get the requests in turns. An open-loop client sends the trace's prompts (lengths scaled,
shared prefixes kept) at Poisson times; per rate and system: goodput under the TTFT and TPOT limits, p50, p90 and p99.
`--cpu` runs it with vLLM for the CPU and a small model, to try the script out.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "src"))

import msgspec  # noqa: E402
from vllm_instances import CONFIG  # noqa: E402

from kvferry.cluster.arrivals import Load  # noqa: E402
from kvferry.cluster.load import run_load  # noqa: E402

START_LIMIT_S = 300
COMMON = "--no-enable-log-requests --max-num-seqs 128"
ON_GPU = f"{COMMON} --load-format dummy --skip-tokenizer-init --max-model-len 33000 --gpu-memory-utilization 0.85"
ON_CPU = f"{COMMON} --enforce-eager --dtype bfloat16 --max-model-len 4096 --num-gpu-blocks-override 256"
CPU_ENVIRON = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def environ(options: argparse.Namespace, **more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **(CPU_ENVIRON if options.cpu else {}), **more}


def end(process: subprocess.Popen[Any], by: signal.Signals) -> None:
    """End the process and its group."""
    if process.poll() is None:
        process.send_signal(by)
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def await_ready(process: subprocess.Popen[Any], log: Path, ready: Any) -> Any:
    began_s = time.monotonic()
    while not (found := ready()):
        if process.poll() is not None or time.monotonic() - began_s > START_LIMIT_S:
            raise RuntimeError(f"not ready (exit {process.poll()}):\n{log.read_text(errors='replace')[-5000:]}")
        time.sleep(0.2)
    print(f"{log.stem}: ready after {time.monotonic() - began_s:.0f} s", flush=True)
    return found


@contextlib.contextmanager
def prefill_and_decode(options: argparse.Namespace) -> Iterator[list[str]]:
    """One of each behind the router."""
    log = options.out.parent / "up.log"
    arguments = ON_CPU if options.cpu else ON_GPU
    command = [sys.executable, "-m", "kvferry", "up", "--engine", "vllm", "--model", str(options.model), "--port", "0"]
    command += ["--logs", str(options.out.parent / "up"), "--vllm-args", f"{arguments} {options.vllm_args}"]
    command += ["--engine-max-model-len", "4096" if options.cpu else "33000", "--engine-served-model-name", "m"]
    command += [*shlex.split(options.up_args)]
    with log.open("w") as out:
        up = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environ(options))
    try:
        ready = await_ready(up, log, lambda: re.search(r"ready: OpenAI API at (\S+)/v1", log.read_text()))
        yield [ready[1]]
    finally:
        end(up, signal.SIGINT)


@contextlib.contextmanager
def two_plain(options: argparse.Namespace) -> Iterator[list[str]]:
    """Two instances without a connector."""
    servers: list[subprocess.Popen[Any]] = []
    urls: list[str] = []
    try:
        for number in range(2):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            arguments = shlex.split(f"{ON_CPU if options.cpu else ON_GPU} {options.vllm_args}")
            command = ["vllm", "serve", str(options.model), "--host", "127.0.0.1", "--port", str(port)]
            command += ["--served-model-name", "m", *arguments]
            with (options.out.parent / f"plain-{number}.log").open("w") as out:
                servers.append(
                    subprocess.Popen(
                        command,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        env=environ(options, CUDA_VISIBLE_DEVICES=str(number)),
                        start_new_session=True,
                    )
                )
            urls.append(f"http://127.0.0.1:{port}")
        for number, (server, url) in enumerate(zip(servers, urls, strict=True)):

            def healthy(url: str = url) -> bool:
                try:
                    with urllib.request.urlopen(f"{url}/health", timeout=2):
                        return True
                except OSError:
                    return False

            await_ready(server, options.out.parent / f"plain-{number}.log", healthy)
        yield urls
    finally:
        for server in servers:
            end(server, signal.SIGTERM)


SYSTEMS = {"kvferry 1P1D": prefill_and_decode, "two plain": two_plain}


def sweep(options: argparse.Namespace, name: str, urls: list[str]) -> list[dict[str, Any]]:
    """One row for each rate, after a warm-up; it ends where hardly a request is good any more."""
    rows: list[dict[str, Any]] = []
    limits = {"ttft_limit_s": options.ttft_limit, "tpot_limit_s": options.tpot_limit}
    for number, rate in enumerate([options.rates[0], *options.rates]):
        load = Load(options.requests, seed=number, rate=rate, trace=options.trace, scale=options.scale, **limits)
        measured = asyncio.run(run_load(urls, load, lambda line: None))
        if number == 0:
            continue
        row = {"system": name, "rate": rate, **msgspec.to_builtins(measured)}
        rows.append(row)
        shown = {k: row[k] for k in ("system", "rate", "goodput_per_s", "good", "ttft_ms", "itl_ms", "outcomes")}
        print(json.dumps({**shown, "errors": row["errors"]}), flush=True)
        if measured.good < options.requests // 20:
            break
    return rows


def main() -> int:
    ask = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ask.add_argument("--out", type=Path, default=Path("vllm_load.json"))
    ask.add_argument("--trace", required=True)
    ask.add_argument("--scale", type=float, default=0.25, help="of the trace's lengths")
    ask.add_argument("--requests", type=int, default=200, help="at each rate")
    ask.add_argument("--rates", type=lambda s: [float(r) for r in s.split(",")], default=[1.0, 2.0, 4.0, 8.0, 12.0])
    ask.add_argument("--ttft-limit", type=float, default=1.0, help="seconds")
    ask.add_argument("--tpot-limit", type=float, default=0.025, help="seconds")
    ask.add_argument("--systems", default=",".join(SYSTEMS))
    ask.add_argument("--model", type=Path, default=Path("/tmp/qwen3-8b-dummy"))
    ask.add_argument("--vllm-args", default="", help="further arguments of every instance")
    ask.add_argument("--up-args", default="", help="further arguments of kvferry up")
    ask.add_argument("--cpu", action="store_true")
    options = ask.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if not options.cpu:
        options.model.mkdir(exist_ok=True)
        (options.model / "config.json").write_text(json.dumps(CONFIG))
    rows: list[dict[str, Any]] = []
    try:
        for name in options.systems.split(","):
            with SYSTEMS[name](options) as urls:
                rows += sweep(options, name, urls)
    finally:
        commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
        about = {"commit": commit.stdout.strip() or os.environ.get("COMMIT", ""), "command": shlex.join(sys.argv)}
        options.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
