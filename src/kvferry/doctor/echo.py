"""Stand-in instances for the passage probe: they answer with bytes that the probe knows, cut where proxies stumble."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec

PAUSE_S = 0.08
TEXT = "你好，世界 😀 ありがとう été"
LONG = "漢字" * 40000
"""A router may put cut characters together again, event by event; whoever reads this long one in parts cuts it anew."""

BAD_REQUEST_STATUS = 422
HANDLER_S = 10.0
"""A connection on which nothing moves for so long is over, so that the server can always end."""


def script() -> list[bytes]:
    """The stream's chunks: events whose characters are cut in the middle, then one too long for any single read."""
    events = [
        b"data: "
        + msgspec.json.encode(
            {"id": "probe", "object": "text_completion", "choices": [{"index": 0, "text": word, "finish_reason": None}]}
        )
        + b"\n\n"
        for word in [*TEXT.split(), LONG]
    ]
    *short, long = events
    whole = b"".join(short)
    cuts = [i for i, byte in enumerate(whole) if byte >= 0x80 and byte & 0xC0 == 0x80][::4]
    chunks = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    return [*chunks, long, b"data: [DONE]\n\n"]


class EchoServer:
    """An HTTP server that plays both a prefill and a decode instance. A context; `requests` are the bodies it got."""

    def __init__(self, host: str, on_decoded: Callable[[dict[str, Any]], None]) -> None:
        """
        Args:
            on_decoded: called with each request that is decoded, before its last bytes are sent.
        """
        self.requests: list[dict[str, Any]] = []
        self.sent_s = 0.0
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = HANDLER_S

            def do_GET(self) -> None:
                self._answer(200, {"status": "ok"})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                try:
                    request = msgspec.json.decode(body)
                except msgspec.DecodeError:
                    request = {"undecodable": True}
                request = request if isinstance(request, dict) else {}
                server.requests.append(request)
                if request.get("max_tokens") == 1:
                    choice = {"index": 0, "text": "x", "finish_reason": "length"}
                    self._answer(200, {"id": "probe", "object": "text_completion", "choices": [choice]})
                elif "bad" in str(request.get("prompt")):
                    error = {"message": "the probe's bad request", "type": "invalid_request_error", "code": "probe"}
                    self._answer(BAD_REQUEST_STATUS, {"error": error})
                else:
                    self._stream(request)

            def _answer(self, status: int, body: Any) -> None:
                data = msgspec.json.encode(body)
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.send_header("connection", "close")
                self.end_headers()
                self.wfile.write(data)

            def _stream(self, request: dict[str, Any]) -> None:
                self.send_response(200)
                self.send_header("content-type", "text/event-stream; charset=utf-8")
                self.send_header("transfer-encoding", "chunked")
                self.send_header("connection", "close")
                self.end_headers()
                started = time.monotonic()
                for i, chunk in enumerate(script()):
                    if i == len(script()) - 1:
                        on_decoded(request)
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
                    self.wfile.flush()
                    time.sleep(PAUSE_S)
                self.wfile.write(b"0\r\n\r\n")
                server.sent_s = time.monotonic() - started

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                """A peer that goes away is no news: what arrived is compared on the other end."""

        self._http = Server((host, 0), Handler)
        self._http.daemon_threads = False
        self._http.block_on_close = True
        self.url = f"http://{host}:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> EchoServer:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
