"""The checker can fail: with any one of R1 to R11 broken, it finds a seed that shows why the rule is there."""

from __future__ import annotations

import pytest

from kvferry.sim.faults import run_seed, seeds_until_caught
from kvferry.sim.rules import RULES, Rules

SEEDS = 4000

# What is seen when the rule is broken: wrong bytes (I2), a foreign block written (I3), progress that runs backwards
# (I4), something done twice (I5), two answers to one client (I6).
SHOWN_BY = {
    "R1": {"I2"},
    "R2": {"I2"},
    "R3": {"I2", "I4"},
    "R4": {"I2"},
    "R5": {"I2"},
    "R6": {"I2"},
    "R7": {"I3"},
    "R8": {"I5"},
    "R9": {"I6"},
    "R10": {"I5"},
    "R11": {"I5"},
}


@pytest.mark.parametrize("rule", RULES)
def test_a_broken_rule_is_caught(rule: str) -> None:
    caught = seeds_until_caught(rule, SEEDS)
    assert caught is not None and caught.violation is not None, f"{rule} is broken and {SEEDS} seeds do not show it"
    print(f"{rule} is caught by seed {caught.seed}: {caught.violation.what}")
    assert caught.violation.invariant in SHOWN_BY[rule], caught.violation
    kept = run_seed(caught.seed, Rules(), digests=False)
    assert kept.violation is None and kept.plan == caught.plan
