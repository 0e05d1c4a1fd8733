"""What a person is told of a handoff that ended without its blocks: who, what happened, in how much time.

A cause is one word out of a small set, for counters; its detail is the sentence that belongs to this one handoff. The
doctor adds what the cause means in general and what to do (`kvferry.doctor.causes`).
"""

from __future__ import annotations

from kvferry.protocol.messages import NO_WORD
from kvferry.protocol.records import TargetRecord, TargetState

_GONE = {
    "acked": "{source} has let its blocks go, as they were acknowledged",
    "cancelled": "{source} gave the request up",
    "expired": "{source} let its blocks go",
    "failed": "the prefill at {source} failed",
    "incarnation_changed": "{source} was started again: this is another process",
    "not_the_target": "{source} computes this request for another instance",
    "prompt_mismatch": "{source} does not have this prompt",
    "refused": "{source} did not take it",
    "revoked": "{source} took its blocks back",
    "unknown": "{source} knows nothing of this handoff (any more)",
}
"""The reasons of `Gone` that end a handoff. Each becomes a cause of its own."""

OTHER_PROMPT = "the prompt that the decode instance got is another one"
REFUSED = {
    "busy": "as many handoffs are open here as there may be",
    "closed": "it is over already: given up before this request came, or this is a second request under its id",
    "duplicate": "it is under way here: this is a second request under its id",
    "incarnation_changed": "the ticket is for an earlier process of this instance",
}
"""Why a side does not take its engine's request, by the reason of `Refused`."""


def source_of(record: TargetRecord) -> str:
    """The source's name."""
    return record.ticket.source.instance_id or "the prefill instance"


def _target_of(record: TargetRecord) -> str:
    return record.ticket.target.instance_id or "the decode instance"


def of_gone(record: TargetRecord, reason: str, why: str) -> str:
    """The source answered that there is nothing to wait for. `why` is what it said itself, empty where nothing."""
    told = _GONE.get(reason, "{source} answered " + reason).format(source=source_of(record))
    return f"{told}: {why}" if why and why != reason else told


def of_connect_failed(record: TargetRecord, why: str | None) -> str:
    """No channel to the source could be opened."""
    return f"no way to {source_of(record)}: {why or 'it could not be connected to'}"


def of_peer_lost(record: TargetRecord, why: str | None) -> str:
    """The last channel to the source broke."""
    return f"the connection to {source_of(record)} was lost" + (f": {why}" if why else "")


def of_read_failed(record: TargetRecord, why: str | None) -> str:
    """A read of the source's blocks ended badly."""
    return f"reading from {source_of(record)} failed" + (f": {why}" if why else "")


def of_silence(record: TargetRecord, lease_ttl_s: float, *, serving: bool) -> str:
    """A lease's time passed without an answer; not `serving`: because this side did not ask."""
    if serving:
        return f"nothing was heard of {source_of(record)} for {lease_ttl_s:g} s, the lease's time"
    return f"the serving loop of {_target_of(record)} stood still, so that {source_of(record)} was not asked any more"


def of_deadline(record: TargetRecord) -> str:
    """The handoff's own time was over. What had been reached by then tells who was late."""
    source, within = source_of(record), f"within {record.deadline_s - record.opened_s:.1f} s, the time that it had"
    if record.state is TargetState.RESERVING:
        return f"{_target_of(record)} had no room for its blocks {within}"
    if record.word == NO_WORD:
        return f"{source} did not begin with it {within}"
    if not record.runs:
        return f"{source} published nothing of it {within}"
    far = f"{record.num_done} of the {len(record.runs)} runs that {source} had published were read {within}"
    return far if record.seal is not None else f"{far}; more were to come"
