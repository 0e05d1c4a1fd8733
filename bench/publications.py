"""What a publication more costs: a prompt's layers published at once or in pieces, between two nodes in shared memory,
from the first publication to the target's verdict.

    python bench/publications.py [--out FILE]

Both nodes share this process and its interpreter lock, which a source and a target of their own do not: an upper bound.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from kvferry.handoff.node import HandoffNode
from kvferry.layout import Fingerprint, KVLayout, LayerLayout
from kvferry.transfer.bench.runner import describe_machine
from kvferry.types import HandoffTicket, InstanceRef, TerminalState, new_handoff_id

LAYERS, BLOCKS, BLOCK_BYTES, PROMPT_BLOCKS = 32, 64, 64 << 10, 16
PIECES = (1, 2, 4, 8, 16, 32)
ROUNDS = 40


def start(name: str, digest: str) -> HandoffNode:
    fingerprint = Fingerprint("m", "bfloat16", 16, LAYERS, 8, 128)
    node = HandoffNode(instance_id=name, fingerprint=fingerprint, transports=("shm",), digest=digest)  # type: ignore[arg-type]
    memory = node.allocate(LAYERS * BLOCKS * BLOCK_BYTES)
    memory[:] = np.random.default_rng(1).integers(0, 256, memory.size, dtype=np.uint8)
    layers = tuple(LayerLayout(0, i * BLOCKS * BLOCK_BYTES, BLOCK_BYTES) for i in range(LAYERS))
    node.start(KVLayout(BLOCKS, 16, BLOCK_BYTES, 8, layers))
    return node


def one(source: HandoffNode, target: HandoffNode, pieces: int) -> tuple[float, float]:
    """Seconds on the source's publishing thread, and until the target has all."""
    refs = [InstanceRef(n.instance_id, n.incarnation, (n.address,)) for n in (source, target)]
    ticket = HandoffTicket(new_handoff_id(), "target", *refs, 20.0)
    blocks = list(range(PROMPT_BLOCKS))
    source.offer(ticket, b"prompt", PROMPT_BLOCKS)
    target.drop_select(ticket, b"prompt", 0, blocks)
    time.sleep(0.005)  # the subscription is there, as it is long before a prompt is computed
    began_s = time.perf_counter()
    for layers in np.array_split(np.arange(LAYERS), pieces):
        source.publish(ticket.handoff, range(int(layers[0]), int(layers[-1]) + 1), 0, blocks)
    source.seal(ticket.handoff)
    published_s = time.perf_counter() - began_s
    while not (outcomes := target.outcomes()):
        time.sleep(50e-6)
    assert outcomes[0].state is TerminalState.DELIVERED, outcomes
    seconds = time.perf_counter() - began_s
    while not source.released():
        time.sleep(50e-6)
    return published_s, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for digest in ("none", "xxh3"):
        source, target = start("source", digest), start("target", digest)
        seen: dict[int, list[tuple[float, float]]] = {pieces: [] for pieces in PIECES}
        for number in range(ROUNDS):
            for pieces in PIECES[number % len(PIECES) :] + PIECES[: number % len(PIECES)]:
                seen[pieces].append(one(source, target, pieces))
        source.close()
        target.close()
        medians = {n: [statistics.median(x[i] for x in times) * 1e3 for i in range(2)] for n, times in seen.items()}
        for pieces, (on_thread, in_all) in medians.items():
            more = 0.0 if pieces == 1 else (in_all - medians[1][1]) / (pieces - 1)
            rows.append(
                {
                    "digest": digest,
                    "pieces": pieces,
                    "published_ms": on_thread,
                    "delivered_ms": in_all,
                    "ms_a_piece": more,
                }
            )
            print(
                f"{digest:5} {pieces:2} pieces: {on_thread:5.2f} ms to publish, {in_all:5.2f} in all, {more:.2f} each"
            )
    report = {
        "command": " ".join(["python", *sys.argv]),
        **describe_machine(),
        "bytes": LAYERS * PROMPT_BLOCKS * BLOCK_BYTES,
        "rows": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
