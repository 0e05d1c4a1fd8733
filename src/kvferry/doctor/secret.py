"""Which cluster secret a side would prove."""

from __future__ import annotations

from kvferry.config import Settings, cluster_secret, load
from kvferry.doctor.facts import Side


def secret_of(side: Side | None, settings: Settings | None) -> bytes | None:
    """The cluster secret that a side's own environment holds, else that of the settings file; None without one.

    Raises: ConfigError where the secret that is named cannot be used.
    """
    if side is not None:
        theirs = {k: v for k, v in side.environment.items() if k.startswith("KVFERRY_CLUSTER_SECRET")}
        if theirs:
            settings = load(None, theirs)
    return cluster_secret(settings) if settings is not None else None
