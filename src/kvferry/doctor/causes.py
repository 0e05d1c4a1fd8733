"""What each cause of a failure means and what to do about it: one table (causes.toml), which all checks speak from."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import Literal

import msgspec

Section = Literal["request", "http", "pool"]
SECTIONS: dict[Section, str] = {
    "request": "Causes of requests and handoffs",
    "http": "Codes of HTTP errors",
    "pool": "Causes in the pool",
}
_ROUTERS_STAGES = frozenset({"prefill", "decode", "streaming"})


class Cause(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The texts of one cause; `{prefill}` and `{decode}` stand for the instances' names."""

    meaning: str
    mend: str

    def named(self, *, prefill: str = "prefill", decode: str = "decode") -> Cause:
        """The same with the instances' names in it."""
        names = {"prefill": prefill, "decode": decode}
        return Cause(self.meaning.format(**names), self.mend.format(**names))


@cache
def causes() -> dict[Section, dict[str, Cause]]:
    """Every cause by section: of requests and handoffs, codes of HTTP errors, and those of the pool."""
    text = resources.files("kvferry.doctor").joinpath("causes.toml").read_text(encoding="utf-8")
    return msgspec.convert(tomllib.loads(text), dict[Section, dict[str, Cause]])


def cause_of(cause: str, stage: str = "", section: Section = "request") -> Cause | None:
    """The texts of a cause; those for its stage where there are some. None for a word that is no cause."""
    known = causes()[section]
    whose = "router" if stage in _ROUTERS_STAGES else stage
    keys = [f"{whose}/{cause}", cause]
    if cause.startswith("http_"):
        keys.append(f"{cause[:6]}xx")
    if section == "request":
        # What another instance answered may be one of its own codes.
        known = {**causes()["http"], **known}
    return next((known[key] for key in keys if key in known), None)


def page() -> str:
    """The content of docs/findings/causes.md."""
    lines = [
        "# Causes and error codes",
        "",
        "The words behind `cause` in the log, in `/metrics`, in the header `x-kvferry-outcome` and in `kvferry top`,",
        "and behind `code` in an error's body. `kvferry doctor --router URL` says the same with the instances' names.",
        "STAGE/CAUSE is what a cause means at that stage; `router/` is the router's own wait for decode's answer",
        "(stages prefill, decode, streaming).",
    ]
    for section, title in SECTIONS.items():
        lines += ["", f"## {title}", "", "| cause | what it says | what to do |", "|---|---|---|"]
        for name, cause in causes()[section].items():
            told = cause.named()
            lines.append(f"| `{name}` | {told.meaning} | {told.mend} |")
    return "\n".join(lines) + "\n"
