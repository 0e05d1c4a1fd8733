"""From the source's last publication to the target's outcome, beside main threads that keep the interpreter busy.

    python bench/handoff_beside_python.py [--against SRC ...] [--rounds 4] [--handoffs 100] [--out FILE]

Two processes, a node each, over shared memory. The main thread of both is, as vLLM's is beside the connector,

- `python`: computing in Python without a pause, as between a step's launches;
- `yields`: less than a microsecond of Python and `os.sched_yield()` by turns, as where vLLM spins for a message;
- `bursts`: some 20 microseconds of Python between such calls, as where it talks to its sockets: whoever waits for the
  interpreter is woken at each of them, mostly too late, and so never comes to ask for it;
- `idle`: waiting.

The switch interval is the connector's. One handoff is one run of `--bytes` and its seal, published by `AfterForward`
when a mark, which stands for the CUDA event, is due. Figures in milliseconds, from

- `all`: the mark to the outcome, of which
- `published`: the mark to the publishing thread's call,
- `sent`: that to the State on the socket,
- `heard`: that to the target's machine having the State,
- `started`: that to the copy's start,
- `copied`: the copy,
- `told`: its end to the outcome, as `wake` tells it.

`--against` names the `src` folder of another commit, whose nodes take turns with this one's in one run; it is called by
the folder that it is in.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from kvferry.connector.vllm.stream import AfterForward
from kvferry.handoff.node import HandoffNode
from kvferry.layout import Fingerprint, KVLayout, LayerLayout
from kvferry.protocol.events import Received
from kvferry.protocol.messages import State
from kvferry.protocol.target import TargetHandoffs
from kvferry.transfer import Peer
from kvferry.transfer.bench.runner import describe_machine
from kvferry.transport.shm import ShmLink
from kvferry.types import HandoffTicket, InstanceRef, TerminalState, new_handoff_id

LAYERS, NUM_BLOCKS, PROMPT_BLOCKS, WARM = 2, 64, 16, 10
SWITCH_INTERVAL_S = 0.0005
MAINS = ("python", "yields", "bursts", "idle")
PARTS = ("all", "published", "sent", "heard", "started", "copied", "told")
WITHIN_S = 60.0


class Mark:
    """Fires at a time, as a CUDA event does: whoever waits is off the interpreter."""

    def __init__(self, due_s: float) -> None:
        self.due_s = due_s

    def synchronize(self) -> None:
        time.sleep(max(0.0, self.due_s - time.monotonic()))


class Half:
    """One side: a node, and when things happened there last."""

    def __init__(self, role: str, nbytes: int, digest: str) -> None:
        self.at: dict[str, float] = {}
        self.news = threading.Event()
        self._look()
        self.node = HandoffNode(
            instance_id=role,
            fingerprint=Fingerprint("m", "bfloat16", 16, LAYERS, 8, 128),
            transports=("shm",),
            digest=digest,  # type: ignore[arg-type]
            wake=self._woken,
        )
        block_bytes = nbytes // (LAYERS * PROMPT_BLOCKS)
        memory = self.node.allocate(LAYERS * NUM_BLOCKS * block_bytes)
        memory[:] = np.random.default_rng(1).integers(0, 256, memory.size, dtype=np.uint8)
        layers = tuple(LayerLayout(0, i * NUM_BLOCKS * block_bytes, block_bytes) for i in range(LAYERS))
        self.node.start(KVLayout(NUM_BLOCKS, 16, block_bytes, 8, layers))
        self._mark: Mark | None = None
        self._after_forward = AfterForward(self._record)

    def publish(self, ticket: HandoffTicket) -> dict[str, float]:
        """The source's part of a handoff, until its blocks are free again."""
        node = self.node
        node.offer(ticket, b"prompt", PROMPT_BLOCKS)
        while not any(v.handoff == ticket.handoff and "not subscribed" not in v.detail for v in node.views()):
            time.sleep(0.001)
        time.sleep(0.003)
        self.at = {}
        # Not in step with anything else that takes turns.
        self._mark = Mark(time.monotonic() + random.uniform(0.002, 0.006))

        def act() -> None:
            self._note("published")
            node.publish(ticket.handoff, range(LAYERS), 0, list(range(PROMPT_BLOCKS)))
            node.seal(ticket.handoff)

        self._after_forward.do(act)
        self._await(node.released)
        return {"mark": self._mark.due_s, "published": self.at["published"], "sent": self.at["sent"]}

    def pull(self, ticket: HandoffTicket) -> dict[str, float]:
        """The target's part, until its outcome."""
        self.at = {}
        self.node.drop_select(ticket, b"prompt", 0, list(range(PROMPT_BLOCKS)))
        (outcome,) = self._await(self.node.outcomes)
        assert outcome.state is TerminalState.DELIVERED, outcome
        return {key: self.at[key] for key in ("heard", "started", "copied", "told")}

    def close(self) -> None:
        self._after_forward.close()
        self.node.close()

    def _record(self) -> Mark:
        assert self._mark is not None
        return self._mark

    def _await(self, poll: Callable[[], list[Any]]) -> list[Any]:
        until_s = time.monotonic() + WITHIN_S
        while not (found := poll()):
            self.news.wait(0.5)
            self.news.clear()
            if time.monotonic() > until_s:
                raise TimeoutError(f"nothing within {WITHIN_S:g} s")
        return found

    def _woken(self) -> None:
        self._note("told")
        self.news.set()

    def _note(self, what: str) -> None:
        self.at.setdefault(what, time.monotonic())

    def _look(self) -> None:
        """Note when a State is on the socket and in the machine, and when the copy begins and ends."""
        send, handle, read = Peer.send, TargetHandoffs.handle, ShmLink.read

        def noted_send(peer: Peer, payload: bytes) -> None:
            send(peer, payload)
            if "published" in self.at:
                self._note("sent")

        def noted_handle(table: TargetHandoffs, event: Any, now_s: float) -> Any:
            if isinstance(event, Received) and isinstance(event.message, State) and event.message.runs:
                self._note("heard")
            return handle(table, event, now_s)

        def noted_read(*args: Any, **named: Any) -> None:
            if "heard" in self.at:
                self._note("started")
            read(*args, **named)
            if "heard" in self.at:
                self._note("copied")

        Peer.send = noted_send  # type: ignore[method-assign]
        TargetHandoffs.handle = noted_handle  # type: ignore[method-assign]
        ShmLink.read = noted_read  # type: ignore[method-assign]


def spend(kind: str, over: threading.Event) -> None:
    """What the main thread does all the while."""
    if kind == "idle":
        over.wait()
    elif kind == "python":
        while not over.is_set():
            sum(number * number for number in range(200))
    else:
        turns = 20 if kind == "yields" else 1000
        while not over.is_set():
            for _ in range(turns):
                pass
            os.sched_yield()


def be_half(role: str, main: str, nbytes: int, digest: str) -> None:
    """A child: tickets come as lines, times go back as lines."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    half, over = Half(role, nbytes, digest), threading.Event()
    here = half.node
    say({"id": here.instance_id, "incarnation": here.incarnation, "address": here.address})
    work = half.publish if role == "source" else half.pull

    def serve() -> None:
        try:
            for line in sys.stdin:
                say(work(msgspec.json.decode(line, type=HandoffTicket)))
        finally:
            over.set()

    thread = threading.Thread(target=serve)
    thread.start()
    spend(main, over)
    thread.join()
    half.close()


def say(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


class Child:
    """A half in a process of its own, running the code under `src`."""

    def __init__(self, src: Path, role: str, main: str, options: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--role", role, "--main", main]
        command += ["--bytes", str(options.bytes), "--digest", options.digest]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(src)},
        )
        told = self.hear()
        self.ref = InstanceRef(told["id"], told["incarnation"], (told["address"],))

    def say(self, ticket: HandoffTicket) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(ticket).decode() + "\n")
        self._process.stdin.flush()

    def hear(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a half ended without a word")
        return json.loads(line)

    def close(self) -> None:
        self._process.communicate(timeout=WITHIN_S)


def pair(src: Path, main: str, options: argparse.Namespace) -> list[dict[str, float]]:
    """Milliseconds of each part, for each handoff of two fresh processes."""
    source, target = Child(src, "source", main, options), Child(src, "target", main, options)
    seen = []
    for _ in range(WARM + options.handoffs):
        ticket = HandoffTicket(new_handoff_id(), "target", source.ref, target.ref, 20.0)
        target.say(ticket)
        source.say(ticket)
        at = target.hear() | source.hear()
        times = [at["mark"], *(at[part] for part in PARTS[1:])]
        parts = {part: (times[i + 1] - times[i]) * 1e3 for i, part in enumerate(PARTS[1:])}
        seen.append({"all": (at["told"] - at["mark"]) * 1e3, **parts})
    source.close()
    target.close()
    return seen[WARM:]


def summed_up(seen: list[dict[str, float]]) -> dict[str, list[float]]:
    return {part: [round(float(np.percentile([s[part] for s in seen], p)), 3) for p in (50, 99)] for part in PARTS}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, action="append", default=[])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--handoffs", type=int, default=100)
    parser.add_argument("--bytes", type=int, default=1 << 20)
    parser.add_argument("--digest", default="none")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--role", choices=("source", "target"), help=argparse.SUPPRESS)
    parser.add_argument("--main", choices=MAINS, help="only this one")
    options = parser.parse_args()
    if options.role:
        be_half(options.role, options.main, options.bytes, options.digest)
        return 0
    trees = {"this": Path(__file__).resolve().parents[1] / "src"}
    trees = {path.resolve().parent.name: path.resolve() for path in options.against} | trees
    seen: dict[tuple[str, str], list[dict[str, float]]] = {}
    for number in range(options.rounds):
        order = list(trees) if number % 2 == 0 else list(trees)[::-1]
        for main_thread in [options.main] if options.main else MAINS:
            for tree in order:
                seen.setdefault((main_thread, tree), []).extend(pair(trees[tree], main_thread, options))
    rows = []
    for (main_thread, tree), times in sorted(seen.items()):
        figures = summed_up(times)
        rows.append({"main": main_thread, "tree": tree, "handoffs": len(times), "p50_p99_ms": figures})
        shown = "  ".join(f"{part} {p50:.2f}/{p99:.2f}" for part, (p50, p99) in figures.items())
        print(f"{main_thread:6} {tree:6} {shown}")
    report = {"command": " ".join(["python", *sys.argv]), **describe_machine(), "bytes": options.bytes, "rows": rows}
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
