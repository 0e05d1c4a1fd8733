"""Stand-ins for router and engine: `python fake_parts.py router|engine`, with the settings of the real ones.

The router keeps a table of what engines report and answers /ready and /debug/handoffs; an engine reports itself once.
KVFERRY_TEST_DIE names an engine that ends at its start with a message.
"""

from __future__ import annotations

import http.server
import json
import os
import sys
import threading
import time
import urllib.request

from kvferry.config import load_settings
from kvferry.observe import port_taken, tell_listening

INSTANCES: dict[str, dict[str, object]] = {}


class Router(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = {"instances": list(INSTANCES.values()), "requests": [], "recent": []}
        self.send_response(200 if self.path != "/ready" or INSTANCES else 503)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def do_POST(self) -> None:
        report = json.loads(self.rfile.read(int(self.headers["content-length"])))
        INSTANCES[report["instance_id"]] = report
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        sys.stderr.write(f"router: {format % args}\n")


def router() -> None:
    settings = load_settings().router
    try:
        server = http.server.ThreadingHTTPServer((settings.host, settings.port), Router)
    except OSError:
        sys.exit(f"kvferry: {port_taken(settings.host, settings.port, 'router.port')}")
    tell_listening(f"http://{settings.host}:{server.server_port}")
    server.serve_forever()


def engine() -> None:
    settings = load_settings()
    name = settings.engine.instance_id
    sys.stderr.write("loading the model\n")
    if os.environ.get("KVFERRY_TEST_DIE") == name:
        sys.exit("kvferry: engine.model: no such model; give a path")
    report = {"instance_id": name, "incarnation": 1, "role": settings.engine.role, "url": "http://x", "model": "m"}
    if settings.cluster.router_url:
        body = json.dumps(report).encode()
        urllib.request.urlopen(f"{settings.cluster.router_url}/kvferry/v1/instances", body, timeout=60).close()
    tell_listening("http://127.0.0.1:1")
    threading.Event().wait(60)


if __name__ == "__main__":
    time.sleep(float(os.environ.get("KVFERRY_TEST_DELAY_S", "0")))
    {"router": router, "engine": engine}[sys.argv[1]]()
