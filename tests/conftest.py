"""For all tests: a leak check around each integration and fault test, and skips for what this machine lacks."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

LEAK_GRACE_S = 30.0
CHECKED = ("integration", "faults")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    num_gpus = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    lacking = {
        "gpu": "no CUDA GPU here" if num_gpus < 1 else None,
        "multi_gpu": "needs two CUDA GPUs" if num_gpus < 2 else None,
        "redis": None if shutil.which("redis-server") else "no redis-server here",
    }
    for item in items:
        for marker, reason in lacking.items():
            if reason is not None and item.get_closest_marker(marker) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


class Held(NamedTuple):
    """What this process holds that a test must give back."""

    fds: Counter[str]
    threads: frozenset[threading.Thread]
    children: frozenset[psutil.Process]
    shared_memory: frozenset[str]

    @classmethod
    def now(cls) -> Held:
        fds: Counter[str] = Counter()
        for entry in Path("/proc/self/fd").iterdir():
            try:
                # Numbers of sockets and pipes are new each time, so that a leaked one can't hide behind an old one.
                fds[str(entry.readlink())] += 1
            except OSError:
                continue
        threads = frozenset(t for t in threading.enumerate() if t.is_alive())
        children = frozenset(psutil.Process().children(recursive=True))
        mine = {str(os.getpid()), *(str(child.pid) for child in children)}
        # Other processes of this machine make shared memory too: only names with a process id of ours count.
        names = (entry.name for entry in Path("/dev/shm").iterdir())
        shared = frozenset(name for name in names if any(pid in name.replace("_", "-").split("-") for pid in mine))
        return cls(fds, threads, children, shared)

    def beyond(self, before: Held) -> dict[str, list[str]]:
        """What is held now and was not before, in words."""
        new = {
            "file descriptors": [f for f in (self.fds - before.fds) if not f.endswith(("/fd", "/dev/null"))],
            "threads": [t.name for t in self.threads - before.threads],
            "child processes": [_named(child) for child in self.children - before.children],
            "shared memory": sorted(self.shared_memory - before.shared_memory),
        }
        return {what: names for what, names in new.items() if names}


def _named(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())[:120]}"
    except psutil.Error:
        return str(process.pid)


@pytest.fixture(autouse=True)
def leak_check(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each integration and fault test: no file descriptor, thread, child process or shared memory is left.

    What a fixture of a wider scope holds was there before and does not count. A test whose subject lives longer than
    the test marks itself with `leaks_allowed` and says why.
    """
    parts = Path(str(request.node.path)).parts
    if not any(part in parts for part in CHECKED) or request.node.get_closest_marker("leaks_allowed"):
        yield
        return
    before = Held.now()
    yield
    give_up_s = time.monotonic() + LEAK_GRACE_S
    left = Held.now().beyond(before)
    while left and time.monotonic() < give_up_s:
        gc.collect()
        time.sleep(0.02)
        left = Held.now().beyond(before)
    assert not left, f"left behind {LEAK_GRACE_S} s after the test: {left}"


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """A test that configures the process's logs does so for itself: its stream is gone afterwards."""
    root, ours = logging.getLogger(), logging.getLogger("kvferry")
    before, levels = list(root.handlers), (root.level, ours.level)
    yield
    for handler in [h for h in root.handlers if h.get_name() == "kvferry" and h not in before]:
        root.removeHandler(handler)
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


@pytest.fixture(scope="session", autouse=True)
def first_event_loop() -> None:
    """Let asyncio open what it keeps for the whole process before any test is measured."""
    asyncio.run(asyncio.sleep(0))
