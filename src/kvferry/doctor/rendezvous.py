"""`--probe`: two processes meet through every configured transport, as two instances would."""

from __future__ import annotations

import os
import secrets
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from kvferry.addresses import is_loopback, is_wildcard
from kvferry.doctor.facts import Facts, ProbeStep, Side
from kvferry.doctor.secret import secret_of
from kvferry.doctor.settings import read_settings
from kvferry.errors import ConfigError

PROBE_BYTES = 64 << 20
BLOCK_BYTES = 64 << 10
CONNECT_S = 5.0
READ_S = 30.0
ANSWER_S = 60.0
_NO_WAY = "no transport leads to the peer"
DEFAULT_TRANSPORTS = ("cuda", "shm", "tcp")


def probe_transports(facts: Facts) -> tuple[ProbeStep, ...]:
    """Bind, connect both ways, shake hands, move 64 MiB of random blocks, verify, send nested metadata and back.

    Each side runs in its instance's network namespace if the instance is a process of this machine, and listens on
    the address that it advertises; else both run here on loopback. Stops at a transport's first failed step.

    Raises: ConfigError where a network namespace would have to be entered and cannot be.
    """
    source, target = (next(iter(sides), None) for sides in (facts.prefills, facts.decodes))
    steps: list[ProbeStep] = []
    transports = _configured(source, target, facts)
    for side in (source, target):
        foreign = side is not None and side.process is not None and side.process.netns != facts.host.netns
        if foreign and (os.geteuid() != 0 or shutil.which("nsenter") is None):
            raise ConfigError(
                f"--probe: {side.name if side else ''} runs in a network namespace of its own, and entering it needs "
                "root and nsenter; run the doctor as root, or without --probe"
            )
    secret = secrets.token_hex(32)
    try:
        found = [secret_of(side, facts.kvferry) for side in (source, target)]
        keys = [f.hex() if f else secret for f in found]
    except ConfigError as e:
        return (ProbeStep("settings", "bind", False, e.message),)
    apart = source is not None and target is not None and _apart(source, target, facts)
    for transport in transports:
        if (transport != "tcp" and apart) or (transport == "cuda" and not _has_gpu()):
            continue
        with _Child(source, facts) as a, _Child(target, facts) as b:
            steps += _one(transport, a, b, keys, (_listen(source, facts), _listen(target, facts)))
    return tuple(steps)


def _one(transport: str, a: _Child, b: _Child, keys: list[str], listen: tuple[str, str]) -> Iterator[ProbeStep]:
    addresses = []
    for child, key, where in ((a, keys[0], listen[0]), (b, keys[1], listen[1])):
        answer = child.ask(do="bind", listen=where, transport=transport, secret=key)
        if not answer["ok"]:
            yield ProbeStep(transport, "bind", False, f"{child.name}: {answer['detail']}")
            return
        addresses.append(str(answer["address"]))
    yield ProbeStep(transport, "bind", True, " and ".join(addresses))
    region = a.ask(do="fill", nbytes=PROBE_BYTES, seed=7)
    for child, address in ((a, addresses[1]), (b, addresses[0])):
        answer = child.ask(do="connect", address=address, deadline_s=CONNECT_S)
        if not answer["ok"]:
            step = "use" if _NO_WAY in str(answer["detail"]) else answer.get("step", "connect")
            yield ProbeStep(transport, step, False, f"{child.name}: {answer['detail']}")
            return
    yield ProbeStep(transport, "connect", True, "both ways")
    yield ProbeStep(transport, "handshake", True)
    read = {"region": region.get("region"), "nbytes": PROBE_BYTES, "block_bytes": BLOCK_BYTES, "seed": 7}
    answer = b.ask(do="read", deadline_s=READ_S, **read)
    if not answer["ok"]:
        arrived = answer.get("right_blocks")
        far = "" if arrived is None else f"; {arrived} of {PROBE_BYTES // BLOCK_BYTES} blocks had arrived"
        yield ProbeStep(transport, "transfer", False, f"{b.name}: {answer['detail']}{far}")
        return
    seconds = float(answer["duration_s"])
    speed = f"{PROBE_BYTES / seconds / 1e9:.2f} GB/s" if seconds else ""
    yield ProbeStep(transport, "transfer", True, speed, PROBE_BYTES, seconds)
    if answer["wrong_blocks"]:
        detail = (
            f"{answer['wrong_blocks']} of {PROBE_BYTES // BLOCK_BYTES} blocks differ, first {answer['first_wrong']}"
        )
        yield ProbeStep(transport, "verify", False, detail)
        return
    yield ProbeStep(transport, "verify", True)
    answer = b.ask(do="nested")
    same = bool(answer["ok"] and answer["same"])
    yield ProbeStep(transport, "metadata", same, "" if same else str(answer.get("why") or answer.get("detail")))


class _Child:
    """One side's process. A context; the process is gone afterwards."""

    def __init__(self, side: Side | None, facts: Facts) -> None:
        self.name = side.name if side else "this node"
        command = [sys.executable, "-m", "kvferry.doctor.probe_side"]
        process = side.process if side is not None else None
        if process is not None and process.netns != facts.host.netns:
            command = ["nsenter", "-t", str(process.pid), "-n", *command]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={k: v for k, v in os.environ.items() if not k.startswith("KVFERRY_")},
        )

    def __enter__(self) -> _Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send a command and wait for its answer, no longer than ANSWER_S."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(msgspec.json.encode(command) + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return {"ok": False, "detail": "the probe's process has ended"}
        if not select.select([self._process.stdout], [], [], ANSWER_S)[0]:
            return {"ok": False, "detail": f"no answer of the probe's process within {ANSWER_S:.0f} s"}
        line = self._process.stdout.readline()
        if not line:
            return {"ok": False, "detail": "the probe's process has ended"}
        answer: dict[str, Any] = msgspec.json.decode(line)
        return answer


def _listen(side: Side | None, facts: Facts) -> str:
    """Where this side's probe listens: on the address that its instance advertises, else on loopback."""
    if side is None or side.process is None:
        return "tcp://127.0.0.1:0"
    own = {a for addresses in side.process.interfaces.values() for a in addresses}
    for key in ("VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_HOST_IP"):
        host = side.environment.get(key, "")
        if host in own and not is_loopback(host) and not is_wildcard(host):
            return f"tcp://{host}:0"
    return "tcp://127.0.0.1:0"


def _configured(source: Side | None, target: Side | None, facts: Facts) -> tuple[str, ...]:
    """The transports of the settings file, else those that both sides name, else the defaults."""
    if facts.kvferry is not None:
        return facts.kvferry.transfer.transports
    texts = [read_settings(s).flag("transfer-transports") for s in (source, target) if s is not None]
    lists = [[t.strip() for t in text.split(",")] for text in texts if text]
    if not lists:
        return DEFAULT_TRANSPORTS
    return tuple(t for t in lists[0] if all(t in other for other in lists))


def _has_gpu() -> bool:
    return any(Path("/proc/driver/nvidia/gpus").glob("*"))


def _apart(source: Side, target: Side, facts: Facts) -> bool:
    """Whether the two sides are in different network namespaces."""
    here = facts.host.netns
    return (source.process.netns if source.process else here) != (target.process.netns if target.process else here)
