"""The rules for log lines: data in log_rules.toml."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from importlib import resources

import msgspec


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One rule: either a sign of a finding, or (with `stage`) a mark of how far a request got."""

    id: str
    pattern: str
    sample: str
    finding: str = ""
    severity: str = "error"
    rank: int = 3
    stage: str = ""
    step: int = 0


@cache
def rules() -> tuple[tuple[Rule, re.Pattern[str]], ...]:
    """Every rule with its compiled pattern."""
    text = resources.files("kvferry.doctor").joinpath("log_rules.toml").read_text(encoding="utf-8")
    return tuple((r, re.compile(r.pattern)) for r in msgspec.convert(tomllib.loads(text)["rule"], list[Rule]))
