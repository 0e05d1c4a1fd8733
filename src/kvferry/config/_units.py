"""Sizes and times as people write them: `64MiB`, `250ms`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import TypeVar

_Number = TypeVar("_Number", int, float)
_SIZE_UNITS = {"": 1, "B": 1}
_SIZE_UNITS |= {f"{p}iB": 1024**n for n, p in enumerate("KMGT", 1)}
_SIZE_UNITS |= {f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)} | {"kB": 1000}
_TIME_UNITS = {"": 1.0, "us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_QUANTITY = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,20})?(?:[eE][+-]?[0-9]{1,2})?)\s*([A-Za-z]{0,3})\s*", re.ASCII)


def parse_size(text: str) -> int:
    """Bytes in a text such as `65536`, `64MiB` or `1.5GB` (KiB is 1024, KB is 1000).

    Raises:
        ValueError: no size, or no whole number of bytes.
    """
    number, factor = _quantity(text, _SIZE_UNITS, "a size such as 64MiB, 1.5GB or 4096 (bytes)")
    size = Fraction(number) * factor
    if factor == 1 and size.denominator != 1:
        raise ValueError(f"{text!r} is no whole number of bytes")
    return round(size)


def parse_time(text: str) -> float:
    """Seconds in a text such as `2s`, `250ms`, `1.5min` or `3` (seconds).

    Raises:
        ValueError: no time.
    """
    number, factor = _quantity(text, _TIME_UNITS, "a time such as 2s, 250ms, 1.5min or 3 (seconds)")
    return float(number) * factor if factor >= 1 else float(number) / round(1 / factor)


def _quantity(text: str, units: Mapping[str, _Number], expected: str) -> tuple[str, _Number]:
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not {expected}")
    if match[2] not in units:
        near = difflib.get_close_matches(match[2], units, 1, 0.5) or [u for u in units if u.lower() == match[2].lower()]
        hint = f", did you mean {near[0]}?" if near else ""
        raise ValueError(f"unit {match[2]!r} is unknown{hint}; use one of {', '.join(u for u in units if u)}")
    return match[1], units[match[2]]
