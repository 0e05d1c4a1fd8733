"""Which instances serve a request: the least-loaded pair whose edge is healthy. Pure.

Later policies (prefix-aware, cost-aware) take the same values and give the same `Placement`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from kvferry.layout import Fingerprint
from kvferry.types import Role


class Candidate(NamedTuple):
    """One live instance as the policy sees it. `load` counts the requests that it has or is being given."""

    instance_id: str
    incarnation: int
    role: Role
    load: int
    addresses: tuple[str, ...] = ()
    fingerprint: Fingerprint | None = None


class Placement(NamedTuple):
    """Where a request goes. Without a `prefill` the decode instance computes the prompt; `reason` says why."""

    decode: Candidate
    prefill: Candidate | None
    reason: str = ""


EdgeCheck = Callable[[Candidate, Candidate], bool]


def choose(
    candidates: Sequence[Candidate],
    *,
    edge_ok: EdgeCheck,
    excluded: Collection[str] = (),
    direct_reason: str = "",
    turn: int = 0,
) -> Placement | None:
    """The least-loaded placement, or None where no decode instance is left.

    A decode instance with a usable prefill partner is preferred to a less loaded one without. Instances of role
    `both` decode what they prefilled themselves as long as no instance is dedicated to prefill.

    Args:
        edge_ok: whether handoffs from the first to the second are worth trying now.
        excluded: instances that already failed this request.
        direct_reason: not empty where the request must not be split over a pair; becomes the placement's reason.
        turn: rotates the order among equals.
    """
    usable = [c for c in candidates if c.instance_id not in excluded]
    decodes = _by_load([c for c in usable if c.role != "prefill"], turn)
    if not decodes:
        return None
    if direct_reason:
        return Placement(decodes[0], None, direct_reason)
    if all(c.role == "both" for c in candidates):
        return Placement(decodes[0], None, "one_instance")
    prefills = _by_load([c for c in usable if c.role != "decode"], turn)
    reason = "no_prefill_instance"
    for decode in decodes:
        for prefill in prefills:
            if prefill.instance_id == decode.instance_id or not prefill.addresses:
                continue
            if not fingerprints_fit(prefill.fingerprint, decode.fingerprint):
                reason = "no_compatible_prefill_instance"
            elif not edge_ok(prefill, decode):
                reason = "edge_blocked"
            else:
                return Placement(decode, prefill)
    return Placement(decodes[0], None, reason)


def fingerprints_fit(source: Fingerprint | None, target: Fingerprint | None) -> bool:
    """Equal, or unknown on a side (then the two find out themselves, before the first byte)."""
    return source is None or target is None or source == target


def _by_load(candidates: list[Candidate], turn: int) -> list[Candidate]:
    if len(candidates) < 2:
        return candidates
    shift = turn % len(candidates)
    # A stable sort of the rotated list: equals take turns.
    return sorted(candidates[shift:] + candidates[:shift], key=lambda c: c.load)
