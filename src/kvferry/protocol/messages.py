"""What the two sides of a handoff say to each other.

Frames, authentication (MAC and counter) and the handshake belong to `kvferry.wire`; here are only the messages.
Each one names its handoff and both incarnations, so that a restarted process can never be taken for the one before.

Time travels in two ways, and never as another machine's clock:

- `remaining_s` is a duration: how long the sender's promise or wait still lasts.
- `tick_s` is the sender's own clock, which the receiver only ever sends back, as `echo_s`. "Your tick 17.5 reached me"
  proves to the first sender that the other side was alive after 17.5 on the first sender's own clock. A message that
  waited in a stopped peer's socket carries an old echo, and so it cannot revive a lease.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from kvferry.layout import PROTOCOL_VERSION
from kvferry.types import HandoffId, Incarnation, Word

NO_WORD = Word(0)
"""No lease: the handoff is not known yet, or its lease was revoked."""


class Run(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Blocks that are complete in the source's memory: some layers of some consecutive blocks of the prompt.

    The run covers layers `layer_start` to `layer_stop - 1` of the prompt's blocks `first_block` onwards;
    `packed_ids` holds the source's block id for each of them (int64, little-endian). `digest` is what the source
    computed over the bytes when it published them (empty: none).
    """

    layer_start: int
    layer_stop: int
    first_block: int
    packed_ids: bytes
    digest: bytes = b""

    @classmethod
    def of(
        cls, layers: range, first_block: int, block_ids: Sequence[int] | npt.NDArray[np.int64], digest: bytes = b""
    ) -> Run:
        """A run of `block_ids` at the source, for prompt blocks `first_block` onwards."""
        return cls(layers.start, layers.stop, first_block, np.asarray(block_ids, dtype="<i8").tobytes(), digest)

    @property
    def num_blocks(self) -> int:
        return len(self.packed_ids) // 8

    @property
    def layers(self) -> range:
        return range(self.layer_start, self.layer_stop)

    @property
    def block_ids(self) -> npt.NDArray[np.int64]:
        """int64 [num_blocks]: the source's block ids."""
        return np.frombuffer(self.packed_ids, dtype="<i8")


class Manifest(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The seal: what was published in all. `digest` binds the runs' order, places and digests."""

    num_runs: int
    num_blocks: int
    digest: bytes


def manifest_digest(runs: Iterable[Run]) -> bytes:
    """16 bytes over all runs, in order: which layers and blocks, and each run's own digest."""
    state = hashlib.blake2b(digest_size=16)
    for run in runs:
        state.update(b"%d,%d,%d,%d;" % (run.layer_start, run.layer_stop, run.first_block, run.num_blocks))
        state.update(run.digest)
    return state.digest()


class _Message(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The head of every message. `sequence` counts the sender's messages about this handoff."""

    handoff: HandoffId
    source: Incarnation
    target: Incarnation
    attempt: int = 0
    sequence: int = 0
    tick_s: float = 0.0
    echo_s: float | None = None
    remaining_s: float = 0.0
    version: int = PROTOCOL_VERSION


class Subscribe(_Message, frozen=True, tag="subscribe", gc=False):
    """Target to source: send me this handoff. Repeated as the heartbeat until the source knows the handoff.

    `remaining_s` is the time to the target's deadline. `num_blocks` is 0 while the target has no room yet.
    """

    prompt_digest: bytes
    first_block: int = 0
    num_blocks: int = 0


class Reserved(_Message, frozen=True, tag="reserved", gc=False):
    """Target to source: the room for this handoff is there now. News for the source's choice under pressure."""

    first_block: int
    num_blocks: int


class Heartbeat(_Message, frozen=True, tag="heartbeat", gc=False):
    """Target to source: still here. `runs_known` and `runs_pulled` are the target's progress under `word`."""

    word: Word
    runs_known: int = 0
    runs_pulled: int = 0


class State(_Message, frozen=True, tag="state", gc=False):
    """Source to target: all that the target does not know yet. Answers each heartbeat, and follows each publish.

    Attributes:
        word: the lease's word, `NO_WORD` while the prompt has not reached the source (the request is parked).
        slot: where the word lies in the source's word table.
        first_run: the index of `runs[0]` among all runs published under this word.
        seal: set once everything is published.
        remaining_s: how long the lease still lasts.
    """

    word: Word
    slot: int = 0
    first_run: int = 0
    runs: tuple[Run, ...] = ()
    seal: Manifest | None = None


class Ack(_Message, frozen=True, tag="ack", gc=False):
    """Target to source: everything that was sealed under `word` has arrived and is verified. Free the blocks."""

    word: Word


class Cancel(_Message, frozen=True, tag="cancel", gc=False):
    """Target to source: this side ended without the blocks, or no longer needs them."""

    reason: str


class Gone(_Message, frozen=True, tag="gone", gc=False):
    """Source to target: there is nothing to wait for; `reason` says why. All but `busy` are final."""

    reason: str
    detail: str = ""


Message = Subscribe | Reserved | Heartbeat | State | Ack | Cancel | Gone
"""All messages, for `wire.Codec`."""
