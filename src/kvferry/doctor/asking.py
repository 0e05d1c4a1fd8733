"""Connections of the doctor's own, each with one end for all of it: name, connection, answer.

A socket's time-out starts anew with each byte that comes, so that a server which drips would hold the doctor for ever;
and a name server that is silent holds `getaddrinfo` for as long as its own settings say. Neither ends anything here.
"""

from __future__ import annotations

import contextlib
import http.client
import queue
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

import msgspec

RESOLVE_S = 3.0
MAX_ANSWER_BYTES = 16 << 20


class HttpAnswer(msgspec.Struct, frozen=True):
    """A status, the headers that the doctor reads, and the whole body."""

    status: int
    body: bytes
    date: str | None = None


def resolve(host: str, port: int, within_s: float = RESOLVE_S) -> list[tuple[Any, ...]]:
    """The addresses of a name, as `socket.getaddrinfo` gives them.

    Raises:
        socket.gaierror: the name is not known.
        TimeoutError: no name server answered in time.
        OSError: the name or port cannot be one.
    """
    answers: queue.SimpleQueue[list[tuple[Any, ...]] | OSError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except OSError as e:
            answers.put(e)
        except (UnicodeError, OverflowError, ValueError) as e:
            answers.put(OSError(f"{host!r} cannot be a host name ({e})"))

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=within_s)
    except queue.Empty:
        raise TimeoutError(f"no name server answered for {host} within {within_s:g} s") from None
    if isinstance(answer, OSError):
        raise answer
    return answer


def connect(host: str, port: int, within_s: float) -> socket.socket:
    """A TCP connection to the first address that takes one; its time-out is `within_s`.

    Raises: as `resolve`; TimeoutError, ConnectionRefusedError or another OSError of the last address tried.
    """
    if not 0 < port < 65536:
        raise OSError(f"{port} is not a port")
    failure: OSError = OSError(f"{host} has no address")
    end = time.monotonic() + within_s
    for family, kind, protocol, _, address in resolve(host, port, max(within_s, RESOLVE_S)):
        s = socket.socket(family, kind, protocol)
        s.settimeout(max(0.05, end - time.monotonic()))
        try:
            s.connect(address)
        except OSError as e:
            failure = e
            s.close()
        else:
            s.settimeout(within_s)
            return s
    raise failure


@contextlib.contextmanager
def ended_after(s: socket.socket, seconds: float) -> Iterator[threading.Event]:
    """Shut a socket down after so long, whatever it is doing. The event tells whether that happened."""
    happened = threading.Event()

    def end() -> None:
        happened.set()
        with contextlib.suppress(OSError):
            s.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield happened
    finally:
        timer.cancel()


def open_http(url: str, within_s: float) -> http.client.HTTPConnection:
    """A connection to an http or https URL. Proxies of the environment are passed by: they are no part of the cluster.

    Raises: as `connect`; ValueError where the URL is none.
    """
    parts = urllib.parse.urlsplit(url)
    secure = parts.scheme == "https"
    host, port = parts.hostname or "", parts.port or (443 if secure else 80)
    try:
        connection = http.client.HTTPConnection(host, port, timeout=within_s)
    except http.client.InvalidURL as e:
        raise ValueError(str(e)) from e
    s = connect(host, port, within_s)
    connection.sock = ssl.create_default_context().wrap_socket(s, server_hostname=host) if secure else s
    return connection


def get(url: str, within_s: float) -> HttpAnswer:
    """GET a URL; all of it is over within about twice `within_s`.

    Raises:
        OSError: no answer, or none that ended in time or was small enough.
        ValueError: the URL or the answer cannot be read.
    """
    connection = open_http(url, within_s)
    parts = urllib.parse.urlsplit(url)
    path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    with contextlib.closing(connection), ended_after(connection.sock, within_s) as late:
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read(MAX_ANSWER_BYTES + 1)
        except (OSError, http.client.HTTPException) as e:
            if late.is_set():
                raise TimeoutError(f"the answer did not end within {within_s:g} s") from e
            raise e if isinstance(e, OSError) else ValueError(f"not HTTP: {e or type(e).__name__}") from e
    if late.is_set():
        raise TimeoutError(f"the answer did not end within {within_s:g} s")
    if len(body) > MAX_ANSWER_BYTES:
        raise OSError(f"the answer is longer than {MAX_ANSWER_BYTES >> 20} MiB")
    return HttpAnswer(answer.status, body, answer.headers.get("Date"))
