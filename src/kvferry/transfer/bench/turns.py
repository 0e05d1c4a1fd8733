"""What benches share that compare systems in rounds: whose turn it is, and a channel for results alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from typing import TextIO


def turns(systems: list[str], rounds: int, skipped: Collection[str], say: Callable[[str], None]) -> Iterator[str]:
    """Each system once a round, but those in `skipped` by then; each round begins with another one."""
    for number in range(rounds):
        first = number % len(systems)
        for name in systems[first:] + systems[:first]:
            if name not in skipped:
                say(f"round {number + 1} of {rounds}: {name} (load {os.getloadavg()[0]:.1f})")
                yield name


def claim_output() -> TextIO:
    """A copy of standard output, for results; what systems print to it goes to standard error from now on."""
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return told
