"""What the doctor can find: one table of texts (findings.toml), one value a finding."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import Literal

import msgspec

Severity = Literal["error", "warning", "info"]
_RANK: dict[str, int] = {"error": 0, "warning": 1, "info": 2}


class Finding(msgspec.Struct, frozen=True):
    """One thing that is wrong: seen on each side, why that stalls decode, and the exact change that mends it."""

    id: str
    severity: Severity
    title: str
    seen: str
    why: str
    fix: str


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The fixed texts of one finding: `story` is for its page in the docs, `mend` the general form of the fix."""

    severity: Severity
    title: str
    why: str
    mend: str
    story: str


@cache
def catalogue() -> dict[str, Entry]:
    """Every finding that exists, by id."""
    text = resources.files("kvferry.doctor").joinpath("findings.toml").read_text(encoding="utf-8")
    return msgspec.convert(tomllib.loads(text), dict[str, Entry])


def found(finding_id: str, seen: str, fix: str = "", *, severity: Severity | None = None, title: str = "") -> Finding:
    """A finding with the catalogue's texts. `fix` is the change with its real values; empty takes the general form.

    Raises: KeyError if the id is not in the catalogue (a bug).
    """
    entry = catalogue()[finding_id]
    return Finding(finding_id, severity or entry.severity, title or entry.title, seen, entry.why, fix or entry.mend)


def in_order(findings: list[Finding]) -> list[Finding]:
    """Errors first, then warnings, then information; inside that the order of the checks, each finding once."""
    unique = list(dict.fromkeys(findings))
    return sorted(unique, key=lambda f: _RANK[f.severity])
