"""What can happen to a request (events), what is then to be done (actions), and how it can end. Values only."""

from __future__ import annotations

import enum
from typing import NamedTuple

from kvferry.types import Outcome, Stage, TerminalState


class State(enum.StrEnum):
    PLACING = "placing"
    RUNNING = "running"
    FORWARDING = "forwarding"
    SETTLING = "settling"
    FINISHED = "finished"


class Failure(NamedTuple):
    """Why a leg failed. `taken` is False where the instance never took the request: nothing was started there."""

    cause: str
    detail: str
    taken: bool = True


# Events


class Placed(NamedTuple):
    """An answer to `Place`. Without a prefill instance `reason` says why."""

    decode: str
    prefill: str | None
    reason: str = ""


class Unplaced(NamedTuple):
    """An answer to `Place`: no instance can take it."""

    detail: str


class PrefillEnded(NamedTuple):
    attempt: int


class PrefillFailed(NamedTuple):
    attempt: int
    failure: Failure


class FirstTokenCame(NamedTuple):
    """The prefill instance's token is there, and the client may have it."""

    attempt: int


class DecodeStarted(NamedTuple):
    """The first bytes of a good streamed answer are there."""

    attempt: int


class DecodeEnded(NamedTuple):
    """The whole answer is there, or all of a stream up to its `[DONE]`. `error_event`: the stream holds an error.

    `said` is the message of an answer that is an error.
    """

    attempt: int
    status: int
    error_event: bool = False
    said: str = ""


class DecodeFailed(NamedTuple):
    attempt: int
    failure: Failure


class OutcomeArrived(NamedTuple):
    """The target reported how the handoff of this attempt ended."""

    attempt: int
    outcome: Outcome


class OutcomeOverdue(NamedTuple):
    attempt: int


class ClientGone(NamedTuple):
    pass


class DeadlinePassed(NamedTuple):
    """The request's own deadline, or the router's end."""

    cause: str
    detail: str
    status: int = 504


Event = (
    Placed
    | Unplaced
    | PrefillEnded
    | PrefillFailed
    | FirstTokenCame
    | DecodeStarted
    | DecodeEnded
    | DecodeFailed
    | OutcomeArrived
    | OutcomeOverdue
    | ClientGone
    | DeadlinePassed
)


# Actions


class Place(NamedTuple):
    """Ask the policy. With `pair_only`, only a placement with a prefill instance is worth having."""

    attempt: int
    excluded: frozenset[str]
    pair_only: bool = False


class OpenLegs(NamedTuple):
    attempt: int
    with_prefill: bool


class CloseLegs(NamedTuple):
    """Close the connections of this attempt at once: both sides free their blocks."""

    attempt: int


class ReleasePrefill(NamedTuple):
    """The KV has arrived; let the prefill leg end by itself."""

    attempt: int


class Forward(NamedTuple):
    """From now on this attempt's bytes go to the client."""

    attempt: int


class ForwardFirst(NamedTuple):
    """The prefill instance's token goes to the client; the decode leg's bytes follow it."""

    attempt: int


class ForwardRest(NamedTuple):
    """The decode leg has begun: what of it is news goes to the client."""

    attempt: int


class AwaitOutcome(NamedTuple):
    attempt: int


class Deliver(NamedTuple):
    """Write the end of the answer (or the held answer as a whole), with this outcome."""

    attempt: int


class Refuse(NamedTuple):
    """Nothing was sent yet: answer with this status and an error."""

    status: int


class BreakOff(NamedTuple):
    """Bytes were sent: end the stream with an error event."""


class Finish(NamedTuple):
    """The request is over. Always the last action, exactly once."""


Action = (
    Place
    | OpenLegs
    | CloseLegs
    | ReleasePrefill
    | Forward
    | ForwardFirst
    | ForwardRest
    | AwaitOutcome
    | Deliver
    | Refuse
    | BreakOff
    | Finish
)

PLANNED_DIRECT = frozenset({"one_instance", "n_above_one", "prompt_logprobs", "beam_search", "many_prompts_streamed"})
"""Reasons for which no handoff was ever promised; with any other one, the target's prefill is a recompute."""


class Verdict(NamedTuple):
    """How the request ended. `outcome` is the target's own report, where there is one."""

    state: TerminalState
    stage: Stage | None = None
    cause: str | None = None
    detail: str | None = None
    outcome: Outcome | None = None
    path: str = "pair"

    def as_header(self) -> str:
        """One line for `x-kvferry-outcome` and the SSE comment."""
        if self.outcome is not None and self.outcome.state == self.state:
            return self.outcome.as_header()
        parts = [str(self.state)]
        parts += [f"{k}={v}" for k, v in (("stage", self.stage), ("cause", self.cause)) if v]
        return "; ".join([*parts, f"path={self.path}"])
