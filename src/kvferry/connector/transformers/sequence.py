"""The state of one answer, from arrival to its last token. No torch."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Literal

import msgspec

from kvferry.connector.transformers.params import RequestError, SamplingParams
from kvferry.types import HandoffTicket, Outcome

FinishReason = Literal["stop", "length", "abort", "error"]


class TokenLogprob(msgspec.Struct, frozen=True):
    """One token that was drawn, its log-probability, and the likeliest alternatives, likeliest first."""

    token_id: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


class Piece(msgspec.Struct, frozen=True):
    """What one step adds to an answer. `token_ids` may come without text: half a character is never shown."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_cached_tokens: int = 0


class Failure(msgspec.Struct, frozen=True):
    """The request ended without an answer; nothing more follows."""

    error: RequestError


Event = Piece | Failure | Outcome
"""What a request's sink receives: pieces of its `n` answers, the handoff's outcome (once), or a failure (last)."""


class GenerationRequest(msgspec.Struct, kw_only=True):
    """One prompt, `params.n` answers. `sink` is called on the engine's thread and must not block."""

    request_id: str
    prompt: list[int]
    params: SamplingParams
    sink: Callable[[Event], None]
    namespace: str = ""
    ticket: HandoffTicket | None = None
    arrival_s: float = 0.0

    @property
    def deadline_s(self) -> float | None:
        """Monotonic second by which the promised handoff is over; None where none was promised."""
        return None if self.ticket is None else self.arrival_s + self.ticket.remaining_s


class State(enum.StrEnum):
    WAITING = "waiting"
    PARKED = "parked"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """One answer to one prompt, and the blocks that hold its KV.

    `tokens` is prompt plus answer; `num_computed` of them have their KV in `block_table`. All but the last prompt
    token are computed in chunks (`prefill_end` of them), everything after in passes of one token.
    """

    def __init__(self, request: GenerationRequest, index: int, hashes: list[bytes]) -> None:
        self.request = request
        self.index = index
        self.tokens = list(request.prompt)
        self.num_prompt = len(request.prompt)
        self.hashes = hashes
        self.state = State.WAITING
        self.block_table: list[int] = []
        self.num_cached = 0
        self.num_computed = 0
        self.num_registered = 0
        self.num_saved = 0
        self.num_published_blocks = 0
        self.publishing = False
        self.recomputing = False
        self.outcome: Outcome | None = None

    @property
    def prefill_end(self) -> int:
        """Prompt tokens that chunks compute: all but the last, whose pass gives the first token of the answer."""
        return self.num_prompt - 1

    @property
    def in_prefill(self) -> bool:
        return self.num_computed < self.prefill_end

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    def max_blocks(self, block_size: int) -> int:
        """Blocks that suffice to finish. The last token of an answer is told, its KV is never computed."""
        return -(-(self.num_prompt + self.params.max_tokens - 1) // block_size)

    def full_blocks(self, block_size: int) -> int:
        """Blocks of the prompt that are computed and may be found by their hash, here or in the KV pool.

        `hashes` ends before the block with the last prompt token: its KV comes out of a pass of one token, with other
        bits than a chunk gives.
        """
        return min(self.num_computed // block_size, len(self.hashes))

    def prompt_blocks(self, block_size: int) -> int:
        """Blocks of the whole prompt, the partial last one included."""
        return -(-self.num_prompt // block_size)
