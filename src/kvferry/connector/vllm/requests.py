"""What the scheduler half knows of a request: what vLLM tells of it, and the two sides of a handoff. Pure: no vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from kvferry.types import HandoffTicket, Outcome

Ending = Literal["answered", "aborted", "failed"]
"""How a request left vLLM: with its answer, because the client did, or with an error."""


class RequestLike(Protocol):
    """What is read of vLLM's Request."""

    request_id: str
    prompt_token_ids: list[int] | None
    kv_transfer_params: dict[str, Any] | None


class Scheduled(NamedTuple):
    """One request of a step: it computes tokens [num_computed, num_computed + num_scheduled).

    `block_ids` are its whole table if `replaces`, otherwise the blocks that were added to it; `other_groups` are those
    of the other KV cache groups.
    """

    request_id: str
    block_ids: list[int]
    replaces: bool
    num_computed: int
    num_scheduled: int
    other_groups: tuple[list[int], ...] = ()


@dataclass
class SourceRequest:
    """A request whose prompt this instance computes for another one."""

    ticket: HandoffTicket
    num_tokens: int
    num_blocks: int
    tables: list[list[int]]
    num_published: list[int]

    def is_whole(self) -> bool:
        """Whether each group has published all that it will."""
        return all(num == self.num_blocks for num in self.num_published)


@dataclass
class TargetRequest:
    """A request whose prompt another instance computes. `queued` until blocks are reserved, `loading` until every rank
    has reported."""

    ticket: HandoffTicket
    digest: bytes
    num_tokens: int
    deadline_s: float
    stage: Literal["queued", "loading", "over"] = "queued"
    num_local_tokens: int = 0  # in its table before anything is loaded, as vLLM last told
    reports: dict[int, Outcome] = field(default_factory=dict)
    aborted: bool = False
    finished: bool = False
