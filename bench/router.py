"""What a router costs: kvferry's, and the proxies beside it, before one fake upstream that streams 64 chunks.

    python bench/router.py [--rounds 5] [--seconds 3] [--peers-python PATH] [--out bench/results/router.json]

All systems run in the same process layout (load generator, proxy, upstream: a process each) and take turns within each
round. Each answer's bytes are verified. The upstream stands for a prefill and a decode instance; towards kvferry it
also reports each handoff's outcome, as real instances do. Nothing is asserted about times.

vLLM's toy proxy ships in the wheel of mooncake-transfer-engine-non-cuda (install it with --no-deps, and fastapi, httpx,
uvicorn, into an environment of its own); a peer that is not installed is said so and skipped.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httptools
import msgspec
import uvloop

from kvferry.types import Outcome, TerminalState, ticket_from_params

ROOT = Path(__file__).resolve().parent.parent
NUM_CHUNKS = 64
WARM_UP_REQUESTS = 20


def chunk(index: int) -> bytes:
    """One event as vLLM sends it; the text is not all ASCII."""
    body = {
        "id": "cmpl-0123456789abcdef",
        "object": "text_completion",
        "created": 1,
        "model": "fake",
        "choices": [{"index": 0, "text": f" wörd{index}", "logprobs": None, "finish_reason": None}],
        "usage": None,
    }
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


CHUNKS = [chunk(i) for i in range(NUM_CHUNKS)] + [b"data: [DONE]\n\n"]
FRAMED = [b"%x\r\n%b\r\n" % (len(c), c) for c in CHUNKS]
STREAM = b"".join(CHUNKS)
PREFILLED = json.dumps(
    {
        "id": "cmpl-0",
        "object": "text_completion",
        "created": 1,
        "model": "fake",
        "choices": [{"index": 0, "text": " x", "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 128, "completion_tokens": 1, "total_tokens": 129},
        "kv_transfer_params": {"do_remote_prefill": True, "remote_block_ids": [1, 2, 3]},
    }
).encode()


# The fake upstream -------------------------------------------------------------------------------------------------


class Reporter(asyncio.Protocol):
    """Reports outcomes to the router over one kept connection, as many at a time as have come up."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._waiting: list[Outcome] = []
        self._transport: asyncio.Transport | None = None
        self._busy = True

    async def connect(self) -> None:
        await asyncio.get_running_loop().create_connection(lambda: self, *self._address)

    def connection_made(self, transport: Any) -> None:
        self._transport, self._busy = transport, False

    def report(self, outcome: Outcome) -> None:
        self._waiting.append(outcome)
        if not self._busy:
            self._send()

    def _send(self) -> None:
        assert self._transport is not None
        body = msgspec.json.encode(self._waiting)
        self._waiting.clear()
        self._busy = True
        head = b"POST /kvferry/v1/outcomes HTTP/1.1\r\nhost: r\r\ncontent-length: %d\r\n\r\n" % len(body)
        self._transport.write(head + body)

    def data_received(self, data: bytes) -> None:
        self._busy = False
        if self._waiting:
            self._send()


class Upstream(asyncio.Protocol):
    """Answers prefill requests at once and streams the rest, a chunk each turn of the loop or each `interval_s`."""

    reporter: Reporter | None = None
    interval_s = 0.0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._parser = httptools.HttpRequestParser(self)
        self._body: list[bytes] = []

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        body = msgspec.json.decode(b"".join(self._body)) if self._body else {}
        self._body.clear()
        if self._parser.get_method() == b"GET":
            self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        elif body.get("max_tokens") == 1:
            head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(PREFILLED)
            self._transport.write(head + PREFILLED)
        else:
            self._transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
                b"transfer-encoding: chunked\r\n\r\n" + FRAMED[0]
            )
            ticket = ticket_from_params(body.get("kv_transfer_params"))
            if ticket is not None and self.reporter is not None:
                self.reporter.report(Outcome(ticket.handoff, TerminalState.DELIVERED, bytes_moved=1 << 20))
            self._later(1)

    def _later(self, index: int) -> None:
        loop = asyncio.get_running_loop()
        if self.interval_s:
            loop.call_later(self.interval_s, self._chunk, index)
        else:
            loop.call_soon(self._chunk, index)

    def _chunk(self, index: int) -> None:
        if self._transport.is_closing():
            return
        if index == len(FRAMED) - 1:
            self._transport.write(FRAMED[index] + b"0\r\n\r\n")
        else:
            self._transport.write(FRAMED[index])
            self._later(index + 1)


async def serve_upstream(ports: list[int], router_port: int, interval_s: float) -> None:
    Upstream.interval_s = interval_s
    loop = asyncio.get_running_loop()
    for port in ports:
        await loop.create_server(Upstream, "127.0.0.1", port, backlog=1024)
    print("ready", flush=True)
    if router_port:
        while Upstream.reporter is None:
            reporter = Reporter("127.0.0.1", router_port)
            try:
                await reporter.connect()
                Upstream.reporter = reporter
            except OSError:
                await asyncio.sleep(0.1)
    await asyncio.Event().wait()


# The load generator ------------------------------------------------------------------------------------------------


class Client(asyncio.Protocol):
    """One client: request, verify, request again, until told to stop."""

    def __init__(self, request: bytes, done: asyncio.Event, num_requests: int | None) -> None:
        self._request = request
        self._done = done
        self._left = num_requests
        self.stopping = False
        self.ttft_s: list[float] = []
        self.total_s: list[float] = []
        self.wrong = 0
        self.outcomes = 0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._next()

    def _next(self) -> None:
        if self.stopping or self._left == 0:
            self._transport.close()
            return
        if self._left is not None:
            self._left -= 1
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._complete = False
        self._sent_s = time.perf_counter()
        self._first_s = 0.0
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)
        if self._complete:
            self._finish()

    def on_body(self, body: bytes) -> None:
        if not self._first_s:
            self._first_s = time.perf_counter()
        self._parts.append(body)

    def on_message_complete(self) -> None:
        self._complete = True

    def _finish(self) -> None:
        self.total_s.append(time.perf_counter() - self._sent_s)
        self.ttft_s.append(self._first_s - self._sent_s)
        body = b"".join(self._parts)
        at = body.find(b": kvferry-outcome ")
        if at >= 0:
            end = body.index(b"\n\n", at) + 2
            self.outcomes += b"delivered;" in body[at:end]
            body = body[:at] + body[end:]
        self.wrong += body != STREAM
        self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.stopping and self._left != 0:
            self.wrong += 1
        self._done.set()


class Load(NamedTuple):
    """What one run of the load generator measured."""

    requests: int
    seconds: float
    wrong: int
    outcomes: int
    ttft_ms: list[float]
    total_ms: list[float]


async def generate(port: int, clients: int, seconds: float, num_requests: int | None = None) -> Load:
    body = json.dumps({"model": "fake", "prompt": "tell " * 100, "max_tokens": NUM_CHUNKS, "stream": True}).encode()
    request = (
        b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        b"authorization: Bearer x\r\ncontent-length: %d\r\n\r\n" % len(body)
    ) + body
    loop = asyncio.get_running_loop()
    made = []
    begun_s = time.perf_counter()
    for _ in range(clients):
        done = asyncio.Event()
        _, client = await loop.create_connection(
            lambda done=done: Client(request, done, num_requests), "127.0.0.1", port
        )  # fmt: skip
        made.append((client, done))
    if num_requests is None:
        await asyncio.sleep(seconds)
    for client, done in made:
        client.stopping = num_requests is None
        async with asyncio.timeout(120):
            await done.wait()
    took_s = time.perf_counter() - begun_s
    ttft = [t * 1000 for client, _ in made for t in client.ttft_s]
    total = [t * 1000 for client, _ in made for t in client.total_s]
    wrong = sum(client.wrong for client, _ in made)
    return Load(len(total), took_s, wrong, sum(client.outcomes for client, _ in made), ttft, total)


# The systems -------------------------------------------------------------------------------------------------------


def free_ports(num: int) -> list[int]:
    held = [socket.socket() for _ in range(num)]
    for s in held:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in held]
    for s in held:
        s.close()
    return ports


def wait_listening(port: int, process: subprocess.Popen[bytes], what: str) -> None:
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise SystemExit(f"{what} ended with {process.returncode} before it listened")
        try:
            socket.create_connection(("127.0.0.1", port), 0.2).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise SystemExit(f"{what} does not listen on port {port} after 60 s")


def spawn(arguments: list[str], quiet: bool = True) -> subprocess.Popen[bytes]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("KVFERRY_")} | {"KVFERRY_CONFIG": ""}
    out = subprocess.DEVNULL if quiet else None
    return subprocess.Popen(arguments, stdout=out, stderr=out, env=environ)


@contextmanager
def system(name: str, peers_python: Path, interval_s: float) -> Iterator[int]:
    """The port to load: the upstream's own, or that of a proxy before it."""
    prefill, decode, router = free_ports(3)
    router_port = router if name == "kvferry" else 0
    upstream = f"upstream {prefill},{decode} {router_port} {interval_s}"
    running = [spawn([sys.executable, str(Path(__file__).resolve()), *upstream.split()])]
    try:
        wait_listening(decode, running[0], "the fake upstream")
        if name == "kvferry":
            flags = (
                f"-m kvferry router --port {router} --log-level warning "
                f"--prefill http://127.0.0.1:{prefill},handoff=tcp://127.0.0.1:1 --decode http://127.0.0.1:{decode}"
            )
            running.append(spawn([sys.executable, *flags.split()]))
        elif name == "vllm-toy":
            flags = (
                f"--host 127.0.0.1 --port {router} --prefiller-hosts 127.0.0.1 --prefiller-ports {prefill} "
                f"--decoder-hosts 127.0.0.1 --decoder-ports {decode}"
            )
            running.append(spawn([str(peers_python), str(toy_proxy(peers_python)), *flags.split()]))
        port = decode if name == "none" else router
        wait_listening(port, running[-1], name)
        yield port
    finally:
        for process in reversed(running):
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def toy_proxy(peers_python: Path) -> Path | None:
    """vLLM's toy proxy, where it is installed with what it needs."""
    if not peers_python.exists():
        return None
    code = "import fastapi, httpx, uvicorn, sysconfig; print(sysconfig.get_path('purelib'))"
    found = subprocess.run([str(peers_python), "-c", code], capture_output=True, text=True, check=False)
    path = Path(found.stdout.strip()) / "mooncake" / "vllm_v1_proxy_server.py"
    return path if found.returncode == 0 and path.exists() else None


def measure(port: int, clients: int, seconds: float, settle: bool) -> dict[str, Any]:
    """One measurement in a fresh load generator process."""
    me = [sys.executable, str(Path(__file__).resolve()), "load", str(port), str(clients), str(seconds)]
    if settle:
        time.sleep(1.5)
    found = subprocess.run(me, capture_output=True, text=True, check=True, timeout=300)
    measured: dict[str, Any] = json.loads(found.stdout)
    return measured


def run_load(port: int, clients: int, seconds: float) -> dict[str, Any]:
    uvloop.run(generate(port, clients, 0, max(1, WARM_UP_REQUESTS // clients)))
    load = uvloop.run(generate(port, clients, seconds))
    if load.wrong or not load.requests:
        raise SystemExit(f"{load.wrong} of {load.requests} answers differ from what the upstream sent")
    ttft, total = sorted(load.ttft_ms), sorted(load.total_ms)
    return {
        "requests": load.requests,
        "requests_per_s": load.requests / load.seconds,
        "verified": load.requests - load.wrong,
        "delivered_outcomes": load.outcomes,
        "ttft_ms": {"p50": percentile(ttft, 50), "p99": percentile(ttft, 99)},
        "total_ms": {"p50": percentile(total, 50), "p99": percentile(total, 99)},
    }


def percentile(ordered: list[float], percent: float) -> float:
    return round(ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))], 4)


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False)
    return found.stdout.strip() or "unknown"


def machine() -> dict[str, Any]:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0].partition(": ")[2] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_before": os.getloadavg(),
    }


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, with the range of the rate."""
    rates = [r["requests_per_s"] for r in rounds]
    out: dict[str, Any] = {
        "requests_per_s": round(statistics.median(rates), 1),
        "requests_per_s_range": [round(min(rates), 1), round(max(rates), 1)],
        "verified": sum(r["verified"] for r in rounds),
    }
    for key in ("ttft_ms", "total_ms"):
        out[key] = {p: round(statistics.median(r[key][p] for r in rounds), 3) for p in ("p50", "p99")}
    return out


def main() -> None:
    if sys.argv[1:2] == ["upstream"]:
        ports = [int(p) for p in sys.argv[2].split(",")]
        uvloop.run(serve_upstream(ports, int(sys.argv[3]), float(sys.argv[4])))
        return
    if sys.argv[1:2] == ["load"]:
        print(json.dumps(run_load(int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--peers-python", type=Path, default=ROOT / ".venv-peers" / "bin" / "python")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    names = ["none", "kvferry", "vllm-toy"]
    skipped = {"mooncake-demo": "its proxy is no part of its wheel"}
    if toy_proxy(args.peers_python) is None:
        skipped["vllm-toy"] = f"not installed for {args.peers_python.name} of the peers' environment"
        names.remove("vllm-toy")
    for name, why in skipped.items():
        print(f"{name} is skipped: {why}")
    before = machine()
    scenarios = {"1 client": (1, 0.0), "32 clients": (32, 0.0), "16 clients, a chunk every 5 ms": (16, 0.005)}
    results: dict[str, dict[str, list[dict[str, Any]]]] = {s: {n: [] for n in names} for s in scenarios}
    for turn in range(args.rounds):
        for scenario, (clients, interval_s) in scenarios.items():
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                with system(name, args.peers_python, interval_s) as port:
                    got = measure(port, clients, args.seconds, settle=name == "kvferry")
                results[scenario][name].append(got)
                print(
                    f"round {turn + 1}  {scenario:<32} {name:<9} {got['requests_per_s']:8.1f} requests/s   "
                    f"ttft p50 {got['ttft_ms']['p50']:7.2f} p99 {got['ttft_ms']['p99']:7.2f} ms   "
                    f"total p50 {got['total_ms']['p50']:7.2f} p99 {got['total_ms']['p99']:7.2f} ms",
                    flush=True,
                )
    best = results["32 clients"]
    if "vllm-toy" in names:
        ratio = summary(best["kvferry"])["requests_per_s"] / summary(best["vllm-toy"])["requests_per_s"]
        print(f"32 clients: {ratio:.1f} times the requests a second of vLLM's toy proxy")
    alone = results["1 client"]
    added = summary(alone["kvferry"])["total_ms"]["p50"] - summary(alone["none"])["total_ms"]["p50"]
    print(f"1 client: {added:.2f} ms added to the p50 of a whole answer")
    report = {
        "what": f"{NUM_CHUNKS} server-sent chunks a request through each system; medians over the rounds",
        "command": "python bench/router.py " + " ".join(sys.argv[1:]),
        "commit": commit(),
        "machine": before | {"load_after": os.getloadavg()},
        "rounds": args.rounds,
        "seconds": args.seconds,
        "skipped": skipped,
        "bytes_per_answer": len(STREAM),
        "results": {s: {n: summary(r) for n, r in by_name.items()} for s, by_name in results.items()},
    }
    print(json.dumps(report["results"], indent=1))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
