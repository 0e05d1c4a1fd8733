"""Two engines on threads of their own, with real handoff nodes between them; then whole processes."""

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tests_engine_support import tokens_of

from kvferry.config import EngineSettings, FlagValue, HandoffSettings, load
from kvferry.connector.transformers.engine import Engine
from kvferry.connector.transformers.instance import EngineInstance
from kvferry.connector.transformers.memory import KVMemory
from kvferry.connector.transformers.model import LoadedModel, load_model
from kvferry.connector.transformers.params import SamplingParams
from kvferry.connector.transformers.sequence import Event, Failure, GenerationRequest, Piece
from kvferry.errors import ConfigError
from kvferry.handoff.node import HandoffNode
from kvferry.observe import LISTENING
from kvferry.protocol.lease import HandoffSettings as ProtocolSettings
from kvferry.types import HandoffTicket, InstanceRef, Outcome, Side, TerminalState, new_handoff_id

Reference = list[tuple[list[int], list[float]]]
NUM_BLOCKS = 512
REMAINING_S = LEASE_S = 60.0
WAIT_S = 30.0
"""Less than a deadline or a lease, and much on a machine that may give a process no CPU for seconds."""


class Reply:
    """What one request's sink has received."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.events: list[Event] = []

    def put(self, event: Event) -> None:
        self._queue.put(event)

    def wait(self, timeout_s: float = WAIT_S) -> list[Event]:
        """All events, once the last one is there."""
        while not self.events or not _is_last(self.events[-1]):
            self.events.append(self._queue.get(timeout=timeout_s))
        return self.events

    @property
    def outcome(self) -> Outcome:
        (outcome,) = [e for e in self.wait() if isinstance(e, Outcome)]
        return outcome


def _is_last(event: Event) -> bool:
    return isinstance(event, Failure) or (isinstance(event, Piece) and event.finish_reason is not None)


class Peer:
    """One engine with its node."""

    def __init__(self, name: str, loaded: LoadedModel, transports: tuple[str, ...]) -> None:
        settings = EngineSettings(num_blocks=NUM_BLOCKS, prefill_chunk_tokens=64, max_running=32)
        geometry = loaded.geometry(16)
        self.name = name
        self.node = HandoffNode(
            instance_id=name,
            fingerprint=loaded.fingerprint(16),
            settings=ProtocolSettings(lease_ttl_s=LEASE_S, heartbeat_s=0.5),
            transports=transports,
            wake=lambda: self.engine.wake(),
        )
        arena = torch.from_numpy(self.node.allocate(geometry.arena_bytes(NUM_BLOCKS)))
        memory = KVMemory(geometry, NUM_BLOCKS, arena)
        self.engine = Engine(loaded, memory, settings, handoff=HandoffSettings(), port=self.node)
        self.node.start(memory.layout(region=0))
        self.engine.start()
        self._num = 0

    @property
    def ref(self) -> InstanceRef:
        return InstanceRef(self.name, self.node.incarnation, (self.node.address,))

    def submit(self, prompt: list[int], ticket: HandoffTicket, **params: Any) -> tuple[str, Reply]:
        self._num += 1
        reply = Reply()
        request = GenerationRequest(
            request_id=f"{self.name}{self._num}",
            prompt=prompt,
            params=SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "logprobs": 0, **params}),
            sink=reply.put,
            ticket=ticket,
            arrival_s=time.monotonic(),
        )
        self.engine.submit(request)
        return request.request_id, reply

    def until_empty(self, within_s: float = WAIT_S) -> None:
        end = time.monotonic() + within_s
        while self.engine.snapshot.free_blocks < NUM_BLOCKS:
            assert time.monotonic() < end, (self.engine.snapshot, self.node.views())
            time.sleep(0.01)

    def close(self) -> None:
        self.engine.close()
        self.node.close()


class Peers:
    def __init__(self, loaded: LoadedModel, transports: tuple[str, ...]) -> None:
        self.source, self.target = Peer("p", loaded, transports), Peer("d", loaded, transports)

    def ticket(self, side: Side, handoff: Any, remaining_s: float = REMAINING_S) -> HandoffTicket:
        return HandoffTicket(handoff, side, self.source.ref, self.target.ref, remaining_s)

    def submit(self, prompt: list[int]) -> Reply:
        handoff = new_handoff_id()
        _, decode = self.target.submit(prompt, self.ticket("target", handoff), max_tokens=24)
        self.source.submit(prompt, self.ticket("source", handoff), max_tokens=1)
        return decode

    def close(self) -> None:
        self.source.close()
        self.target.close()
        # pytest keeps a test's arguments for a while; their memory must not count as left behind.
        self.__dict__.clear()


@pytest.fixture(params=[("shm", "tcp"), ("tcp",)], ids=["shm", "tcp"])
def peers(request: pytest.FixtureRequest, loaded: LoadedModel) -> Iterator[Peers]:
    made = Peers(loaded, request.param)
    yield made
    made.close()


def test_tokens_over_a_handoff_equal_one_instance(peers: Peers, prompts: list[list[int]], reference: Reference) -> None:
    for prompt, expected in zip(prompts, reference, strict=True):
        reply = peers.submit(prompt)
        assert tokens_of(reply.wait()) == expected, f"prompt of {len(prompt)}"
        assert reply.outcome.state is TerminalState.DELIVERED
    replies = [peers.submit(prompts[i % 7]) for i in range(16)]
    for i, reply in enumerate(replies):
        assert tokens_of(reply.wait()) == reference[i % 7]
        assert (reply.outcome.state, reply.outcome.tokens_computed) == (TerminalState.DELIVERED, 1)
    assert peers.target.engine.snapshot.computed_prompt_tokens == 23
    for peer in (peers.source, peers.target):
        peer.until_empty()
        peer.node.check_integrity()


def test_a_source_that_never_starts_is_recomputed_at_the_deadline(
    peers: Peers, prompts: list[list[int]], reference: Reference
) -> None:
    start = time.monotonic()
    _, reply = peers.target.submit(prompts[4], peers.ticket("target", new_handoff_id(), remaining_s=0.5), max_tokens=24)
    assert tokens_of(reply.wait()) == reference[4]
    assert time.monotonic() - start < 0.5 + WAIT_S
    assert (reply.outcome.state, reply.outcome.tokens_computed) == (TerminalState.RECOMPUTED, 127)
    peers.target.until_empty()


def test_a_source_that_gives_up_lets_the_target_recompute_at_once(
    peers: Peers, prompts: list[list[int]], reference: Reference
) -> None:
    handoff = new_handoff_id()
    _, decode = peers.target.submit(prompts[-1], peers.ticket("target", handoff), max_tokens=24)
    name, _ = peers.source.submit(prompts[-1], peers.ticket("source", handoff), max_tokens=1)
    peers.source.engine.abort(name)
    assert tokens_of(decode.wait()) == reference[-1]
    peers.source.until_empty()
    peers.target.until_empty()


def test_a_target_that_gives_up_frees_both_sides(peers: Peers, prompts: list[list[int]]) -> None:
    handoff = new_handoff_id()
    name, _ = peers.target.submit(prompts[-1], peers.ticket("target", handoff), max_tokens=24)
    peers.source.submit(prompts[-1], peers.ticket("source", handoff), max_tokens=1)
    peers.target.engine.abort(name)
    peers.target.until_empty()
    peers.source.until_empty()


def test_a_source_that_closes_is_replaced_by_a_recompute(
    loaded: LoadedModel, prompts: list[list[int]], reference: Reference
) -> None:
    peers = Peers(loaded, ("shm", "tcp"))
    try:
        warm = peers.submit(prompts[0])
        warm.wait()
        _, reply = peers.target.submit(prompts[5], peers.ticket("target", new_handoff_id()), max_tokens=24)
        peers.source.close()
        assert tokens_of(reply.wait()) == reference[5]
        assert reply.outcome.state is TerminalState.RECOMPUTED and reply.outcome.cause
        peers.target.until_empty()
    finally:
        peers.close()


@contextlib.contextmanager
def engine_process(model_path: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`kvferry engine` as a process; gives it and its URL, and ends it as a supervisor would."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("KVFERRY_")} | {"KVFERRY_CONFIG": ""}
    argv = [sys.executable, "-m", "kvferry", "engine", "--model", str(model_path), "--num-threads", "1", *flags]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        if not line.startswith(LISTENING):
            raise AssertionError(process.stderr.read())
        yield process, line.removeprefix(LISTENING).strip()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


def call(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read())


def test_the_command_serves_tells_its_url_and_ends_on_a_signal(
    model_path: Path, prompts: list[list[int]], reference: Reference
) -> None:
    with engine_process(model_path, "--role", "decode", "--instance-id", "d0") as (_, url):
        assert call(url + "/v1/models")["data"][0]["id"] == "tiny"
        debug = call(url + "/debug/kv")
        assert debug["instance_id"] == "d0" and debug["free_blocks"] == debug["num_blocks"] == 1024
        assert debug["address"].startswith("tcp://127.0.0.1:")
        # A source that nobody listens for: the address is refused at once, the prompt is computed here.
        ticket = HandoffTicket(
            new_handoff_id(),
            "target",
            InstanceRef("p0", 5, ("tcp://127.0.0.1:9",)),
            InstanceRef("d0", debug["incarnation"], (debug["address"],)),
            REMAINING_S,
        )
        body = {"prompt": prompts[4], "max_tokens": 24, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        answer = call(url + "/v1/completions", {**body, "kv_transfer_params": ticket.as_params()})
        assert answer["choices"][0]["token_ids"] == reference[4][0]
        assert call(url + "/debug/kv")["free_blocks"] == 1024


async def test_a_taken_port_names_its_holder(model_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        holder = rf"engine.port: port {port} .* is taken: .*pid {os.getpid()}"
        await require_refused_to_serve(model_path, holder, port=port)


async def test_an_address_of_another_machine_is_not_called_a_taken_port(model_path: Path) -> None:
    await require_refused_to_serve(model_path, r"engine.host: cannot bind 192\.0\.2\.1 port 0: ", host="192.0.2.1")


async def require_refused_to_serve(model_path: Path, why: str, **engine: Any) -> None:
    environ = {"KVFERRY_CLUSTER_SECRET": "a secret of this test's"}
    settings = load(None, environ, {"engine.model": FlagValue("--model", str(model_path))})
    replaced = msgspec.structs.replace(settings.engine, device="cpu", **engine)
    instance = EngineInstance(msgspec.structs.replace(settings, engine=replaced))
    with pytest.raises(ConfigError, match=why):
        await instance.serve()
    # pytest keeps the exception's frames for a while; the memory in them must not count as left behind.
    instance.__dict__.clear()


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path)):
        load_model(str(tmp_path), device="cpu")
    with pytest.raises(ConfigError, match=f"there is no directory {tmp_path}/absent"):
        load_model(f"{tmp_path}/absent", device="cpu")
