"""Engines that a test steps itself, and a handoff node that copies inside one process."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch

from kvferry.config import EngineSettings, HandoffSettings
from kvferry.connector.transformers.engine import Engine
from kvferry.connector.transformers.memory import KVMemory
from kvferry.connector.transformers.model import LoadedModel
from kvferry.connector.transformers.params import SamplingParams
from kvferry.connector.transformers.sequence import Event, GenerationRequest, Piece
from kvferry.types import (
    HandoffId,
    HandoffTicket,
    InstanceRef,
    Outcome,
    Side,
    Stage,
    TerminalState,
    new_handoff_id,
)


def make_memory(loaded: LoadedModel, num_blocks: int) -> KVMemory:
    geometry = loaded.geometry(16)
    return KVMemory(
        geometry, num_blocks, torch.zeros(geometry.arena_bytes(num_blocks), dtype=torch.uint8, device=loaded.device)
    )


class Driver:
    """One engine, stepped by the test itself."""

    def __init__(
        self,
        loaded: LoadedModel,
        port: Any = None,
        *,
        pool: Callable[[Driver], Any] = lambda driver: None,
        **overrides: Any,
    ) -> None:
        """Args: pool: makes what the engine uses as its KV pool, once `memory` is there."""
        handoff = overrides.pop("handoff", None) or HandoffSettings()
        values = {"num_blocks": 512, "prefill_chunk_tokens": 64, "max_running": 32, **overrides}
        self.settings = EngineSettings(**values)
        self.memory = make_memory(loaded, self.settings.num_blocks)
        self.reports: list[Outcome] = []
        self.now_s = 0.0
        if port is not None:
            port.memory = self.memory
        self.engine = Engine(
            loaded,
            self.memory,
            self.settings,
            handoff=handoff,
            port=port,
            pool=pool(self),
            report=self.reports.append,
            clock=lambda: self.now_s,
        )

    def submit(
        self,
        request_id: str,
        prompt: list[int],
        *,
        ticket: HandoffTicket | None = None,
        namespace: str = "",
        **params: Any,
    ) -> list[Event]:
        events: list[Event] = []
        request = GenerationRequest(
            request_id=request_id,
            prompt=prompt,
            params=SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": 24, **params}),
            sink=events.append,
            ticket=ticket,
            namespace=namespace,
            arrival_s=self.now_s,
        )
        self.engine.check(request)
        self.engine.submit(request)
        return events

    def run(self) -> None:
        """Step until nothing moves."""
        while self.engine.step() or self.engine.snapshot.pool_transfers:
            if self.engine.snapshot.pool_transfers:
                time.sleep(0.001)

    def generate(self, prompts: list[list[int]], **params: Any) -> list[tuple[list[int], list[float]]]:
        """Tokens and log-probabilities (bits, not approximations) of one answer to each prompt, all at once."""
        events = [self.submit(f"g{i}", p, logprobs=0, **params) for i, p in enumerate(prompts)]
        self.run()
        return [tokens_of(e) for e in events]

    def is_empty(self) -> bool:
        self.engine.step()
        return self.engine.snapshot.free_blocks == self.settings.num_blocks


def tokens_of(events: list[Event]) -> tuple[list[int], list[float]]:
    pieces = [e for e in events if isinstance(e, Piece)]
    assert pieces and pieces[-1].finish_reason is not None, events
    return [t for p in pieces for t in p.token_ids], [lp.logprob for p in pieces for lp in p.logprobs]


@dataclasses.dataclass(frozen=True)
class FakeReleased:
    handoff: HandoffId
    reason: str
    cause: str | None = None


class FakeNode:
    """Insert and drop_select by memcpy between engines of one process; fails on demand."""

    def __init__(self, peers: list[FakeNode]) -> None:
        self.memory: KVMemory
        self.peers = peers
        peers.append(self)
        self.offers: dict[HandoffId, dict[str, Any]] = {}
        self.wants: dict[HandoffId, dict[str, Any] | None] = {}
        self.calls: list[str] = []
        self.cancelled: list[HandoffId] = []
        self._released: list[FakeReleased] = []
        self._outcomes: list[Outcome] = []

    def _cells(self) -> torch.Tensor:
        geometry = self.memory.geometry
        return self.memory.arena.view(geometry.num_layers, self.memory.num_blocks, geometry.block_bytes)

    def offer(self, ticket: HandoffTicket, prompt_digest: bytes, num_blocks: int) -> None:
        self.offers[ticket.handoff] = {"digest": prompt_digest, "num": num_blocks, "bytes": {}, "sealed": False}

    def publish(self, handoff: HandoffId, layers: range, first_block: int, block_ids: list[int]) -> None:
        self.calls.append(f"publish {layers.start}-{layers.stop} {first_block}+{len(block_ids)}")
        offer = self.offers.get(handoff)
        if offer is None:
            return
        for layer in layers:
            for i, block_id in enumerate(block_ids):
                assert (layer, first_block + i) not in offer["bytes"], "published twice"
                offer["bytes"][layer, first_block + i] = (block_id, self._cells()[layer, block_id].clone())

    def seal(self, handoff: HandoffId) -> None:
        self.calls.append("seal")
        if (offer := self.offers.get(handoff)) is not None:
            layers = self.memory.geometry.num_layers
            assert set(offer["bytes"]) == {(n, b) for n in range(layers) for b in range(offer["num"])}
            offer["sealed"] = True

    def expect(self, ticket: HandoffTicket, prompt_digest: bytes) -> None:
        self.wants[ticket.handoff] = None

    def drop_select(self, ticket: HandoffTicket, prompt_digest: bytes, first_block: int, block_ids: list[int]) -> None:
        assert self.wants[ticket.handoff] is None, "expected before it is selected"
        self.wants[ticket.handoff] = {"digest": prompt_digest, "first": first_block, "ids": block_ids}

    def beat(self) -> None:
        pass

    def cancel(self, handoff: HandoffId, reason: str, *, side: Side, remaining_s: float = 0.0) -> None:
        self.cancelled.append(handoff)
        if self.offers.pop(handoff, None) is not None:
            self._released.append(FakeReleased(handoff, "cancelled"))
        if handoff in self.wants:
            del self.wants[handoff]
            self._outcomes.append(Outcome(handoff, TerminalState.ABORTED, Stage.WAITING, "handoff_aborted", reason))

    def fail(self, cause: str) -> None:
        """End every handoff that this target waits for."""
        for handoff in list(self.wants):
            del self.wants[handoff]
            self._outcomes.append(Outcome(handoff, TerminalState.FAILED, Stage.PULLING, cause, "on demand"))

    def expire(self) -> None:
        """End every lease that this source gave."""
        for handoff in list(self.offers):
            del self.offers[handoff]
            self._released.append(FakeReleased(handoff, "expired"))

    def released(self) -> list[FakeReleased]:
        taken, self._released = self._released, []
        return taken

    def outcomes(self) -> list[Outcome]:
        self._pull()
        taken, self._outcomes = self._outcomes, []
        return taken

    def check_integrity(self) -> None:
        assert not self.offers and not self.wants

    def _pull(self) -> None:
        for handoff, want in list(self.wants.items()):
            for peer in self.peers:
                offer = peer.offers.get(handoff)
                if offer is None or not offer["sealed"] or want is None:
                    continue
                assert offer["digest"] == want["digest"] and want["first"] + len(want["ids"]) == offer["num"]
                nbytes = 0
                for (layer, block), (block_id, published) in offer["bytes"].items():
                    source = peer._cells()[layer, block_id]
                    assert torch.equal(source, published), "a published block changed under its lease"
                    if block >= want["first"]:
                        self._cells()[layer, want["ids"][block - want["first"]]] = source
                        nbytes += source.numel()
                del self.wants[handoff], peer.offers[handoff]
                peer._released.append(FakeReleased(handoff, "acked"))
                self._outcomes.append(Outcome(handoff, TerminalState.DELIVERED, bytes_moved=nbytes))


class Pair:
    """A prefill and a decode engine with a fake node between them."""

    def __init__(self, loaded: LoadedModel, *, source: dict[str, Any], target: dict[str, Any]) -> None:
        peers: list[FakeNode] = []
        self.source_node, self.target_node = FakeNode(peers), FakeNode(peers)
        self.source = Driver(loaded, self.source_node, **source)
        self.target = Driver(loaded, self.target_node, **target)

    def submit(self, name: str, prompt: list[int], **params: Any) -> tuple[list[Event], list[Event]]:
        """Both legs of one request."""
        handoff = new_handoff_id()
        decode = self.target.submit(name, prompt, ticket=ticket("target", handoff), **params)
        prefill = self.source.submit(name, prompt, ticket=ticket("source", handoff), max_tokens=1)
        return prefill, decode

    def run(self) -> None:
        moved = True
        while moved:
            moved = self.source.engine.step() | self.target.engine.step()
            moved |= bool(self.source.engine.snapshot.handoffs and self.target.engine.snapshot.handoffs)
            moved |= bool(self.source.engine.snapshot.pool_transfers + self.target.engine.snapshot.pool_transfers)


def ticket(side: Side, handoff: HandoffId, remaining_s: float = 10.0) -> HandoffTicket:
    return HandoffTicket(handoff, side, InstanceRef("p", 0), InstanceRef("d", 0), remaining_s)
