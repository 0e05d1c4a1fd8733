"""How early to publish what a chunk of a prompt computes: all layers at once, or some at a time while the rest is
computed. Pure.

With a chunk computed in C seconds and carried over the link in L, k publications of equal size end max(C, L) +
min(C, L) / k seconds after the chunk began, whichever is the longer: the shorter one hides behind the longer but for
its first or last piece. Each publication costs p seconds, so that k = sqrt(min(C, L) / p) is best. Where the link is
the faster side, two unequal pieces are better than a few equal ones: only so many last layers are left for the end as
are computed while the others travel. Where more of the prompt follows and the link is the faster side, nothing is to be
won: the chunk travels while the next one is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

PUBLISH_S = 1e-3
"""What a publication more costs both sides together. Source: bench/publications.py, 0.75 to 1.15 ms on two cores."""


class Carried(NamedTuple):
    """Bytes that a target pulled, and the seconds from their publication to its acknowledgement."""

    nbytes: int
    seconds: float


class Link(NamedTuple):
    """How long a pull takes: `latency_s`, and the bytes at `bytes_a_s` beyond what the latency hides. `most_bytes` is
    the most that was seen."""

    bytes_a_s: float
    latency_s: float
    most_bytes: int

    def seconds_for(self, nbytes: int) -> float | None:
        """What the link itself takes for so many bytes; None where only smaller pulls were seen: what they took may
        have been messages and checks, which more bytes would not take again."""
        if nbytes > self.most_bytes:
            return None
        return max(0.0, nbytes / self.bytes_a_s - self.latency_s)


def link_of(seen: Iterable[Carried]) -> Link | None:
    """The link as these pulls show it; None where there are none.

    A pull can't be quicker than the link, so the quickest tells most of it; and the shortest tells what is not the
    link's: messages, checks, launches. Pulls that are all short show no slowness of the link, only that.
    """
    usable = [one for one in seen if one.nbytes > 0 and one.seconds > 0]
    if not usable:
        return None
    return Link(
        max(one.nbytes / one.seconds for one in usable),
        min(one.seconds for one in usable),
        max(one.nbytes for one in usable),
    )


def layers_a_publish(
    *,
    num_layers: int,
    layer_bytes: int,
    num_tokens: int,
    tokens_a_s: float | None,
    link: Link | None,
    is_last: bool,
    publish_s: float = PUBLISH_S,
) -> int:
    """How many layers of a chunk to publish at a time, 1 to `num_layers`; `num_layers` is all at once. What is left at
    the end is a publication of its own.

    Args:
        layer_bytes: what one layer of this chunk puts on the link.
        num_tokens: what the step computes.
        tokens_a_s: the speed of earlier steps of this kind; None or no link seen yet: all at once.
        is_last: the prompt is whole after this chunk, so that the target waits for what of it is under way.
    """
    transfer_s = None if link is None else link.seconds_for(layer_bytes * num_layers)
    if link is None or transfer_s is None or tokens_a_s is None:
        return num_layers
    compute_s = num_tokens / tokens_a_s
    if not is_last and transfer_s <= compute_s:
        return num_layers
    pieces = math.floor(math.sqrt(min(compute_s, transfer_s) / publish_s))
    left = _layers_left(num_layers, compute_s, transfer_s, link, publish_s) if is_last else 0
    if left and left * pieces < num_layers:
        return num_layers - left
    return math.ceil(num_layers / min(pieces, num_layers)) if pieces > 1 else num_layers


def _layers_left(num_layers: int, compute_s: float, transfer_s: float, link: Link, publish_s: float) -> int:
    """How many last layers to publish by themselves; 0 where that saves less than it costs."""
    left = math.ceil((link.latency_s + transfer_s) * num_layers / compute_s)
    return left if transfer_s * (1 - left / num_layers) > publish_s else 0
