"""A real router, stand-in instances that report to it, and proxies in front of it that do what proxies do."""

from __future__ import annotations

import http.client
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any, ClassVar, Literal
from unittest.mock import patch

import msgspec

from catalogue.bench import Bench
from kvferry.doctor import Facts, Finding, examine, live
from kvferry.doctor.echo import EchoServer
from kvferry.doctor.live import look_at_router
from kvferry.doctor.passage import probe_passage
from kvferry.layout import Fingerprint
from kvferry.protocol.membership import HandoffView, InstanceReport
from kvferry.types import HandoffId, Outcome, Role, TerminalState, new_incarnation, ticket_from_params

MODEL = "stand-in"
FINGERPRINT = Fingerprint(MODEL, "bfloat16", 16, 2, 2, 8)
Mode = Literal["plain", "mangle", "buffer", "drop", "status"]


def start_router(bench: Bench, *more: str) -> str:
    """A router of its own process; its URL."""
    process = subprocess.Popen(
        [sys.executable, "-m", "kvferry.cli", "router", "--port", "0", "--ttl-s", "60s", *more],
        cwd=bench.directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    bench.processes.append(process)
    assert process.stdout is not None
    for line in process.stdout:
        if "listening" in line:
            return line.split()[-1]
    raise AssertionError("the router did not start")


def wait_for_instances(url: str, count: int) -> None:
    """Until so many are in the router's table."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with urllib.request.urlopen(url + "/kvferry/v1/instances", timeout=60) as answer:
            if len(msgspec.json.decode(answer.read())["instances"]) >= count:
                return
        time.sleep(0.05)
    raise AssertionError(f"there are no {count} instances")


class Fleet:
    """Stand-in instances that report to a router when they are told to, however busy the machine is."""

    of_router: ClassVar[dict[str, list[Fleet]]] = {}

    def __init__(self, bench: Bench, url: str) -> None:
        self._url = url
        self._reports: dict[str, InstanceReport] = {}
        self._moving: set[str] = set()
        self._http = EchoServer("127.0.0.1", lambda request: None)
        self._http.__enter__()
        self.of_router.setdefault(url, []).append(self)
        bench.undo.append(self._end)

    def join(self, name: str, role: Role, *, url: str = "", moving: bool = True, **more: Any) -> None:
        """Register an instance; `moving` ones count a step with each report. Without a `url` our server is its."""
        report = InstanceReport(
            instance_id=name,
            incarnation=int(new_incarnation()),
            role=role,
            url=url or self._http.url,
            model=MODEL,
            addresses=("tcp://127.0.0.1:9",),
            engine="stand-in",
            **{"fingerprint": FINGERPRINT, "num_blocks": 64, "free_blocks": 64, **more},
        )
        self._reports[name] = report
        if moving:
            self._moving.add(name)
        self._send(report)

    def beat(self) -> None:
        """A heartbeat of each instance."""
        for name in self._moving:
            report = self._reports[name]
            self._reports[name] = msgspec.structs.replace(report, step=report.step + 1)
        for report in self._reports.values():
            self._send(report)

    def _send(self, report: InstanceReport) -> None:
        post(self._url + "/kvferry/v1/instances", report)

    def _end(self) -> None:
        self.of_router.pop(self._url, None)
        self._http.__exit__()


def post(url: str, body: Any) -> None:
    """POST JSON; a router that is gone is none of our business."""
    request = urllib.request.Request(url, msgspec.json.encode(body), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer.read()
    except OSError:
        pass


def view(handoff: str, side: Literal["source", "target"], stage: str, age_s: float, peer: str, detail: str = "") -> Any:
    """One open handoff in a report."""
    return HandoffView(HandoffId(handoff), side, stage, age_s, 30.0 - age_s, peer, detail)


def run_requests(bench: Bench, url: str, state: TerminalState, cause: str, count: int) -> None:
    """Requests through the router to stand-ins whose decode ends each handoff in `state`."""

    def report(request: dict[str, Any]) -> None:
        ticket = ticket_from_params(request.get("kv_transfer_params"))
        assert ticket is not None
        outcome = Outcome(ticket.handoff, state, stage="waiting", cause=cause, attempt=ticket.attempt)  # type: ignore[arg-type]
        post(url + "/kvferry/v1/outcomes", [outcome])

    echo = EchoServer("127.0.0.1", report)
    echo.__enter__()
    bench.undo.append(lambda: echo.__exit__(None, None, None))
    fleet = Fleet(bench, url)
    fleet.join("prefill-0", "prefill", url=echo.url)
    fleet.join("decode-0", "decode", url=echo.url)
    threads = [
        threading.Thread(
            target=post,
            args=(url + "/v1/completions", {"model": MODEL, "prompt": f"{i}", "max_tokens": 4, "stream": True}),
        )
        for i in range(count)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


def ask_doctor(url: str) -> list[Finding]:
    """What the doctor says of a running router, to which its stand-ins report before each look."""
    fleets = Fleet.of_router.get(url, [])

    def beat(_seconds: float = 0.0) -> None:
        for fleet in fleets:
            fleet.beat()

    beat()
    with patch.object(live, "time", SimpleNamespace(sleep=beat)):
        return examine(look_at_router(Facts(), url))


def probe(url: str) -> list[Finding]:
    """What the doctor says of the way through a URL."""
    return examine(Facts(router_probe=probe_passage(url)))


def start_proxy(bench: Bench, upstream: str, mode: Mode) -> str:
    """A proxy in front of `upstream`; its URL. `plain` passes bytes through, the others spoil them."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._forward()

        def do_POST(self) -> None:
            self._forward()

        def do_DELETE(self) -> None:
            self._forward()

        def _forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            if mode == "drop" and self.path.startswith("/v1/"):
                known = ("model", "prompt", "max_tokens", "stream")
                body = msgspec.json.encode({k: v for k, v in msgspec.json.decode(body).items() if k in known})
            host, _, port = upstream.removeprefix("http://").partition(":")
            connection = http.client.HTTPConnection(host, int(port), timeout=20)
            try:
                connection.request(self.command, self.path, body, {"content-type": "application/json"})
                answer = connection.getresponse()
                status = 500 if mode == "status" and answer.status >= 400 else answer.status
                self.send_response(status)
                self.send_header("content-type", answer.headers.get("content-type") or "application/json")
                self.send_header("transfer-encoding", "chunked")
                self.send_header("connection", "close")
                self.end_headers()
                self._copy(answer)
            finally:
                connection.close()

        def _copy(self, answer: http.client.HTTPResponse) -> None:
            if mode == "buffer":
                self._chunk(answer.read())
            else:
                while part := answer.read1(65536):
                    self._chunk(part.decode(errors="replace").encode() if mode == "mangle" else part)
            self.wfile.write(b"0\r\n\r\n")

        def _chunk(self, part: bytes) -> None:
            if part:
                self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
                self.wfile.flush()

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = False

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that leaves is no news."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    bench.undo.append(stop)
    return f"http://127.0.0.1:{server.server_address[1]}"
