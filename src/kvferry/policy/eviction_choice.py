"""Eviction policies by name, as settings and command lines give them."""

from __future__ import annotations

from kvferry.errors import ConfigError
from kvferry.policy.eviction import LFU, LFUDA, LRU, EvictionPolicy, Key
from kvferry.policy.eviction_fifo import S3FIFO
from kvferry.policy.eviction_hazard import Hazard
from kvferry.policy.eviction_prefix import PrefixLRU

POLICY_NAMES = tuple(policy.name for policy in (LRU, LFU, LFUDA, S3FIFO, PrefixLRU, Hazard))
BEST_POLICY = Hazard.name


def create_eviction(name: str, capacity: int, key_type: type[Key]) -> EvictionPolicy[Key]:
    """A fresh policy for a cache of `capacity` blocks.

    Raises: ConfigError for an unknown name.
    """
    policies: tuple[type[EvictionPolicy[Key]], ...] = (LRU, LFU, LFUDA, S3FIFO, PrefixLRU, Hazard)
    for policy in policies:
        if policy.name == name:
            return policy(capacity)
    raise ConfigError(f"eviction policy {name!r} is unknown; choose one of {', '.join(POLICY_NAMES)}")
