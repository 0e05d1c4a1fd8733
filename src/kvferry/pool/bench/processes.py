"""The processes that a system under test needs: started here, known to serve, and ended with the measurement."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from kvferry.observe import LISTENING

STARTS_WITHIN_S = 30.0
ENDS_WITHIN_S = 60.0


@contextlib.contextmanager
def running(command: list[str], *, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """A process whose standard output is read here; asked to end, then killed."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


@contextlib.contextmanager
def node(slab_bytes: int, num_slabs: int, *, disk: Path | None = None, disk_slots: int = 0) -> Iterator[str]:
    """`kvferry node`; gives its address."""
    flags = ["--arena-bytes", str(num_slabs * slab_bytes + (1 << 20)), "--slab-bytes", str(slab_bytes)]
    if disk is not None:
        flags += ["--disk-path", str(disk), "--disk-bytes", str(disk_slots * slab_bytes)]
    with running([sys.executable, "-m", "kvferry", "node", *flags, "--log-level", "error"]) as process:
        yield first_line(process).removeprefix(LISTENING).strip()


def first_line(process: subprocess.Popen[str]) -> str:
    """What a process says once it serves. Raises: RuntimeError if it ends without a word."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{process.args!r} ended without a word")
    return line


def free_port() -> int:
    """A port of the loopback that nobody listens on now, for servers that can't choose one by themselves."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def await_port(port: int) -> None:
    """Return when somebody listens. Raises: RuntimeError if nobody does in time."""
    until_s = time.monotonic() + STARTS_WITHIN_S
    while time.monotonic() < until_s:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        time.sleep(0.02)
    raise RuntimeError(f"nobody listens on port {port} after {STARTS_WITHIN_S:.0f} s")
