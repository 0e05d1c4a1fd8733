"""`kvferry top` on a terminal: instances and open handoffs of a real router, until Ctrl-C."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kvferry.protocol.membership import HandoffView, InstanceReport
from kvferry.types import HandoffId

HANDOFF = "0123456789abcdef" * 2
WANTED = ("prefill-0 open", "decode-0 waiting", "0 runs pulled of 2 known", "61/64", "serving", "0123456789ab")


def _report(url: str, role: str, peer: str, side: str, stage: str, free_blocks: int) -> None:
    view = HandoffView(HandoffId(HANDOFF), side, stage, 8.0, 20.0, peer, "0 runs pulled of 2 known")  # type: ignore[arg-type]
    report = InstanceReport(
        instance_id=f"{role}-0",
        incarnation=7,
        role=role,  # type: ignore[arg-type]
        url="http://127.0.0.1:9",
        model="m",
        num_blocks=64,
        free_blocks=free_blocks,
        handoffs=(view,),
    )
    body, headers = msgspec.json.encode(report), {"content-type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(f"{url}/kvferry/v1/instances", body, headers), timeout=60).close()


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A router to which two instances report until the test ends."""
    router = subprocess.Popen(
        [sys.executable, "-m", "kvferry.cli", "router", "--port", "0"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    end = threading.Event()
    try:
        assert router.stdout is not None
        address = next(line.split()[-1] for line in router.stdout if "listening" in line)

        def beat() -> None:
            while not end.wait(0.3):
                _report(address, "prefill", "1f", "source", "open", 64)
                _report(address, "decode", "prefill-0", "target", "waiting", 3)

        thread = threading.Thread(target=beat)
        thread.start()
        yield address
        end.set()
        thread.join()
    finally:
        end.set()
        router.terminate()
        router.wait(60)
        if router.stdout is not None:
            router.stdout.close()


@pytest.mark.timeout(240)
def test_the_terminal_shows_instances_and_open_handoffs_until_ctrl_c(url: str) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    top = subprocess.Popen(
        [sys.executable, "-m", "kvferry.cli", "top", url],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**environment, "TERM": "xterm-256color"},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    try:
        shown, deadline = "", time.monotonic() + 120
        while not all(part in shown for part in WANTED):
            assert time.monotonic() < deadline, shown[-3000:]
            if select.select([ours], [], [], 1.0)[0]:
                shown += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", os.read(ours, 65536).decode(errors="replace"))
                shown = re.sub(r"[ \t]+", " ", shown)[-20000:]
        os.write(ours, b"\x03")
        while top.poll() is None:
            assert time.monotonic() < deadline + 60
            if select.select([ours], [], [], 0.2)[0]:
                try:
                    os.read(ours, 65536)
                except OSError:
                    break  # The terminal's other end is closed.
        assert top.wait(60) == 0
    finally:
        top.kill()
        top.wait()
        os.close(ours)
