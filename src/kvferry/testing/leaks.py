"""What a process holds, and whether it gave back what it took: file descriptors, threads, mappings, shared memory."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Held(NamedTuple):
    """File descriptors by what they refer to, names of threads, mapped anonymous files, entries of /dev/shm."""

    fds: Counter[str]
    threads: Counter[str]
    mappings: Counter[str]
    shared_memory: frozenset[str]

    @classmethod
    def now(cls) -> Held:
        """What this process holds now, after a garbage collection."""
        gc.collect()
        fds: Counter[str] = Counter()
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                # Sockets and pipes have a new number each time: count them by kind, so that a leaked one shows.
                fds[str(entry.readlink()).partition(":[")[0]] += 1
        mappings = Counter(
            line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if "/memfd:" in line
        )
        threads = Counter(thread.name for thread in threading.enumerate() if thread.is_alive())
        shm = Path("/dev/shm")
        return cls(fds, threads, mappings, frozenset(p.name for p in shm.iterdir()) if shm.is_dir() else frozenset())

    def beyond(self, before: Held) -> list[str]:
        """What is held here and was not held before, as lines for a message; shared memory of others not counted."""
        return [
            f"{kind}: {count} x {name}"
            for kind, mine, theirs in (
                ("file descriptor", self.fds, before.fds),
                ("thread", self.threads, before.threads),
                ("mapping", self.mappings, before.mappings),
            )
            for name, count in (mine - theirs).items()
        ]


@contextlib.contextmanager
def no_leaks(*, grace_s: float = 5.0) -> Iterator[None]:
    """Fail with AssertionError if the body leaves something behind that does not go within `grace_s`."""
    before = Held.now()
    yield
    until_s = time.monotonic() + grace_s
    while (left := Held.now().beyond(before)) and time.monotonic() < until_s:
        time.sleep(0.02)
    if left:
        raise AssertionError("left behind: " + "; ".join(left))
