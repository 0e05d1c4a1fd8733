"""Goodput of one prefill and one decode instance against two plain ones, at rising request rates. Writes JSON.

    . /tmp/site.env; python3 bench/gpu/vllm_load.py --out "$OUT/load.json" --trace conversation_trace.jsonl

Two GPUs: each system has both to itself in turn, `kvferry up --engine vllm` with its router, and two `vllm serve`
without any connector that get the requests in turns. An open-loop client sends the trace's prompts (lengths scaled,
shared prefixes kept) at Poisson times; per rate and system: goodput under the TTFT and TPOT limits, p50, p90 and p99.
Of the trace only the first requests are used, as many as the highest rate sends: its first 1,000 lines do.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import msgspec
from vllm_instances import Server, Site, add_common, die_with_parent, dummy_model, start, stop, tiny_models, wait_for
from vllm_report import Report

from kvferry.cluster.arrivals import Load
from kvferry.cluster.load import run_load

START_LIMIT_S = 150
KV_BYTES = 40_000_000_000
GRAPHS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)


@contextlib.contextmanager
def prefill_and_decode(options: argparse.Namespace, site: Site) -> Iterator[list[str]]:
    """One of each behind the router."""
    log = options.out.parent / "up.log"
    command = [sys.executable, "-m", "kvferry", "up", "--engine", "vllm", "--model", str(site.model), "--port", "0"]
    command += ["--logs", str(options.out.parent / "up"), "--vllm-args", shlex.join(site.arguments())]
    command += ["--engine-max-model-len", str(site.max_model_len), "--engine-served-model-name", "m"]
    command += shlex.split(options.up_args)
    began_s = time.monotonic()
    with log.open("w") as out:
        environ = site.environ() if site.cpu else site.environ(CUDA_VISIBLE_DEVICES="0,1")
        up = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environ, preexec_fn=die_with_parent)
    try:

        def told() -> str | None:
            found = re.search(r"ready: OpenAI API at (\S+)/v1", log.read_text())
            return found[1] if found else None

        wait_for(
            lambda: told() is not None or up.poll() is not None,
            START_LIMIT_S * site.patience,
            "kvferry up",
        )
        if (url := told()) is None:
            raise RuntimeError(f"kvferry up ended with {up.poll()}:\n{log.read_text()[-5000:]}")
        print(f"kvferry up: ready after {time.monotonic() - began_s:.0f} s", flush=True)
        yield [url]
    finally:
        up.send_signal(signal.SIGINT)
        try:
            up.wait(25)
        except subprocess.TimeoutExpired:
            up.kill()


@contextlib.contextmanager
def two_plain(options: argparse.Namespace, site: Site) -> Iterator[list[str]]:
    """Two instances without a connector."""
    servers = [Server(f"plain-{number}", site, gpus=str(number)) for number in range(2)]
    try:
        if len(start(servers, patience=site.patience)) < len(servers):
            raise RuntimeError("not both plain instances started")
        yield [server.url for server in servers]
    finally:
        stop(servers)


SYSTEMS = {"kvferry 1P1D": prefill_and_decode, "two plain": two_plain}


def sweep(options: argparse.Namespace, report: Report, name: str, urls: list[str]) -> None:
    """One row for each rate, after a warm-up; it ends where hardly a request is good any more."""

    def run(load: Load) -> Any:
        return asyncio.run(run_load(urls, load, lambda line: print(f"  {line}", flush=True)))

    with report.section(f"{name}: warm-up", 60):
        for tokens in (options.warm_up_tokens, 200):
            run(Load(8, 4, tokens, 16, seed=1000 + tokens))
    for number, rate in enumerate(options.rates):
        with report.section(f"{name}: {rate:g} requests/s", round(3 * options.seconds) + 30):
            count = round(rate * options.seconds)
            load = Load(
                count,
                seed=number,
                rate=rate,
                trace=options.trace,
                scale=options.scale,
                ttft_limit_s=options.ttft_limit,
                tpot_limit_s=options.tpot_limit,
            )
            measured = run(load)
            report.add({"system": name, "rate": rate, **msgspec.to_builtins(measured)})
            if measured.good < count // 20:
                break


def main() -> int:
    ask = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_common(ask, "vllm_load")
    ask.add_argument("--trace", required=True)
    ask.add_argument("--scale", type=float, default=0.25, help="of the trace's lengths")
    ask.add_argument("--seconds", type=float, default=25.0, help="of sending, at each rate")
    ask.add_argument("--rates", type=lambda s: [float(r) for r in s.split(",")], default=[2.0, 5.0, 8.0])
    ask.add_argument("--ttft-limit", type=float, default=1.0, help="seconds")
    ask.add_argument("--tpot-limit", type=float, default=0.02, help="seconds")
    ask.add_argument("--systems", default=",".join(SYSTEMS), type=lambda s: s.split(","))
    ask.add_argument("--up-args", default="", help="further arguments of kvferry up")
    options = ask.parse_args()
    flags = ["--max-num-seqs", "128"]
    if options.cpu:
        tiny_models(options.models, "llama")
        model = options.models / "llama"
        flags += ["--dtype", "bfloat16"]
    else:
        model = dummy_model(options.models / "qwen3-8b-dummy")
        flags += ["--load-format", "dummy"]
    length, options.warm_up_tokens = (4096, 500) if options.cpu else (33000, 8000)
    site = Site(model, options.out.parent, KV_BYTES, length, tuple(flags), GRAPHS, options.cpu)
    report = Report(options.out, patience=site.patience)
    try:
        for name in options.systems:
            with report.section(f"{name}: start", START_LIMIT_S + 30), SYSTEMS[name](options, site) as urls:
                sweep(options, report, name, urls)
    finally:
        report.finish(cpu=options.cpu)
    return 1 if report.num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
