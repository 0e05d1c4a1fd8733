"""Which vLLM versions this connector knows. Pure: it never imports vLLM."""

from __future__ import annotations

import re

from kvferry.errors import CompatibilityError

OLDEST = (0, 26)
NEWEST = (0, 32)


def require_supported(version: str) -> tuple[int, int]:
    """The major and minor number of a vLLM version that this connector was written against.

    Args:
        version: as vLLM tells it, such as `0.32.0` or `0.32.0+cpu`.
    Raises:
        CompatibilityError: it is older or newer, or no version at all.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    known = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
    if found is None:
        raise CompatibilityError(
            f"vLLM calls itself {version!r}, which is no version; kvferry supports vLLM {known}: install one of these"
        )
    major_minor = int(found[1]), int(found[2])
    if not OLDEST <= major_minor <= NEWEST:
        raise CompatibilityError(
            f"this is vLLM {version}, but kvferry supports vLLM {known}: its connector interface changes between "
            "versions, and a wrong guess there gives wrong tokens; install a supported one"
        )
    return major_minor
