"""The rules for log lines: data in log_rules.toml."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from importlib import resources

import msgspec

from kvferry.doctor.causes import Section

_SHORTEST = 4


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One rule: either a sign of a finding, or (with `stage`) a mark of how far a request got.

    With `side` it holds for logs of that side only, with `unless` only for logs that have none of these words; `fix`
    takes the place of the finding's own mend. `causes` names the section of the table of causes that explains the cause
    in the line.
    """

    id: str
    pattern: str
    sample: str
    finding: str = ""
    severity: str = "error"
    rank: int = 3
    stage: str = ""
    step: int = 0
    side: str = ""
    fix: str = ""
    unless: tuple[str, ...] = ()
    causes: Section | None = None


@cache
def rules() -> tuple[tuple[Rule, re.Pattern[str]], ...]:
    """Every rule with its compiled pattern."""
    text = resources.files("kvferry.doctor").joinpath("log_rules.toml").read_text(encoding="utf-8")
    return tuple((r, re.compile(r.pattern)) for r in msgspec.convert(tomllib.loads(text)["rule"], list[Rule]))


def candidates(text: str) -> list[int]:
    """Which rules may match a line, in their order: those one of whose literal words is in it.

    Logs are long and most lines are of no interest: looking for words is ten times faster than fifty patterns.
    """
    literals, always = _index()
    return sorted({i for word, i in literals if word in text}.union(always))


@cache
def _index() -> tuple[tuple[tuple[str, int], ...], frozenset[int]]:
    literals: list[tuple[str, int]] = []
    always: set[int] = set()
    for i, (rule, _) in enumerate(rules()):
        words = literals_of(rule.pattern)
        literals += [(w, i) for w in words]
        if not words:
            always.add(i)
    return tuple(literals), frozenset(always)


def literals_of(pattern: str) -> tuple[str, ...]:
    """Words one of which must be in any text that a pattern matches; empty where that cannot be told.

    One word for each branch of the pattern: its longest run of plain characters outside of groups, classes and
    repetitions.
    """
    branches: list[list[str]] = [[""]]
    depth, i = 0, 0
    while i < len(pattern):
        c = pattern[i]
        runs = branches[-1]
        if c == "\\":
            plain = not pattern[i + 1].isalnum()
            if depth == 0:
                runs[-1:] = [runs[-1] + pattern[i + 1]] if plain else [runs[-1], ""]
            i += 2
            continue
        if c == "[":
            end = pattern.index("]", i + 2)
            if depth == 0:
                runs.append("")
            i = end + 1
            continue
        depth += (c == "(") - (c == ")")
        if depth > 0 or c == ")":
            runs.append("")
        elif c == "|":
            branches.append([""])
        elif c in "?*{":
            # What is repeated may be absent; only one character is, as groups and classes ended their run.
            runs[-1:] = [runs[-1][:-1], ""]
            i = pattern.index("}", i) if c == "{" else i
        elif c in "+.^$":
            runs.append("")
        else:
            runs[-1] += c
        i += 1
    words = [max(runs, key=len) for runs in branches]
    return tuple(words) if all(len(w) >= _SHORTEST for w in words) else ()
