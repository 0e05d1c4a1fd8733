"""Thousands of connects, reads and disconnects over each host transport: what is left afterwards, at either side.

    python bench/connects.py [--connects 10000] [--transports shm tcp] [--out bench/results/connects.json]

Exits with 1 if a descriptor, thread, mapping or peer is left.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvferry.testing.engines import EngineThread
from kvferry.testing.leaks import Held
from kvferry.testing.owner import OwnerProcess
from kvferry.transfer.bench.runner import describe_machine
from kvferry.transport.base import BlockList

BLOCK = 64 << 10
WARM_UP = 500
GRACE_S = 10.0
POOL_THREADS = 8


def held_by(pid: int) -> dict[str, int]:
    """How many descriptors, threads and mapped anonymous files a process has, and its resident memory in KiB."""
    process = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return {
        "fds": len(list((process / "fd").iterdir())),
        "threads": len(list((process / "task").iterdir())),
        "mappings": sum("/memfd:" in line for line in (process / "maps").read_text().splitlines()),
        "resident_kib": int(status["VmRSS"].split()[0]),
    }


def growth(pid: int, before: dict[str, int]) -> dict[str, int]:
    return {name: count - before[name] for name, count in held_by(pid).items()}


def wait_until(condition: Callable[[], bool]) -> None:
    until_s = time.monotonic() + GRACE_S
    while not condition() and time.monotonic() < until_s:
        time.sleep(0.02)


def come_and_go(scheme: str, connects: int) -> dict[str, Any]:
    """Connect, read one block and part, `connects` times: what either side holds then, and did not before.

    The reader is looked at once more when its engine is closed: nothing at all may be left of it.
    """
    owner = OwnerProcess((scheme,))
    try:
        region_id = owner.call("region", BLOCK, seed=7)
        before = Held.now()
        row = _run(scheme, connects, owner, region_id)
        wait_until(lambda: not Held.now().beyond(before))
        return row | {"left_after_close": Held.now().beyond(before)}
    finally:
        owner.close()


def _run(scheme: str, connects: int, owner: OwnerProcess, region_id: int) -> dict[str, Any]:
    with EngineThread((scheme,)) as reader:
        target = reader.engine.allocate(BLOCK)
        zero = np.zeros(1, dtype=np.int64)

        def once() -> None:
            peer = reader.connect(owner.address)
            blocks = BlockList(peer.regions[region_id], target, zero, zero, BLOCK)
            reader.run(reader.engine.read(peer, blocks, deadline_s=10.0))
            reader.call(peer.close)

        # Memory and pools of threads fill first.
        for _ in range(WARM_UP):
            once()
        wait_until(lambda: owner.call("peers") == 0)
        here, there = held_by(os.getpid()), held_by(owner.process.pid)
        began_s = time.monotonic()
        for _ in range(connects):
            once()
        seconds = time.monotonic() - began_s
        wait_until(lambda: owner.call("peers") == 0 and growth(os.getpid(), here)["fds"] <= 0)
        return {
            "bench": "connects",
            "transport": scheme,
            "connects": connects,
            "seconds": round(seconds, 1),
            "reader_grew_by": growth(os.getpid(), here),
            "owner_grew_by": growth(owner.process.pid, there),
            "peers_left_at_owner": owner.call("peers"),
        }


def is_clean(row: dict[str, Any]) -> bool:
    """Whether nothing is left. Threads may fill their pools; resident memory is told, not judged."""
    sides = (row["reader_grew_by"], row["owner_grew_by"])
    grown = any(side["fds"] > 0 or side["mappings"] > 0 or side["threads"] > POOL_THREADS for side in sides)
    return not (grown or row["left_after_close"] or row["peers_left_at_owner"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connects", type=int, default=10_000)
    parser.add_argument("--transports", nargs="+", default=["shm", "tcp"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = [come_and_go(scheme, args.connects) | describe_machine() for scheme in args.transports]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    print(lines, end="")
    if args.out is not None:
        args.out.write_text(lines)
    sys.exit(0 if all(map(is_clean, rows)) else 1)


if __name__ == "__main__":
    main()
