"""The table of faults: each a function that builds a broken cluster on a bench and returns what the doctor says."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, overload

from catalogue.bench import Bench
from kvferry.doctor import Finding

Build = Callable[[Bench], list[Finding]]


class Fault(NamedTuple):
    """One fault. `also` are further findings that are true as well; anything else is a false one.

    `needs` is `root` where namespaces or mounts must be made.
    """

    name: str
    expected: str
    symptom: str
    build: Build
    also: frozenset[str] = frozenset()
    needs: str = ""


FAULTS: dict[str, Fault] = {}


def fault(expected: str, symptom: str, *, also: tuple[str, ...] = (), needs: str = "") -> Callable[[Build], Build]:
    """Register a fault under its function's name."""

    def register(build: Build) -> Build:
        name = build.__name__.replace("_", " ")
        assert name not in FAULTS
        FAULTS[name] = Fault(name, expected, symptom, build, frozenset(also), needs)
        return build

    return register


class Healthy(NamedTuple):
    """One healthy cluster: the doctor must find nothing at all. `needs` as for a fault."""

    build: Build
    needs: str = ""


HEALTHY: dict[str, Healthy] = {}


@overload
def healthy(build: Build, /) -> Build: ...


@overload
def healthy(*, needs: str) -> Callable[[Build], Build]: ...


def healthy(build: Build | None = None, /, *, needs: str = "") -> Build | Callable[[Build], Build]:
    """Register a healthy cluster, as `@healthy` or `@healthy(needs="root")`."""

    def register(build: Build) -> Build:
        HEALTHY[build.__name__.replace("_", " ")] = Healthy(build, needs)
        return build

    return register if build is None else register(build)
