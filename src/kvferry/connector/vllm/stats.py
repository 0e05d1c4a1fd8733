"""What the connector counts, as plain dictionaries that add up. Pure: no vLLM.

vLLM carries these from workers and scheduler to the process that serves `/metrics`, so they must be JSON.
"""

from __future__ import annotations

from typing import Any

from kvferry.connector.vllm.pool_worker import LoadedLike, SavedLike
from kvferry.types import Outcome

HANDOFFS = "handoffs"  # "state/stage/cause" -> count; the target's view, one for each handoff
RELEASES = "releases"  # reason -> count; the source's view, one for each rank's handoff
PUBLICATIONS = "publications"  # pieces -> steps whose blocks were published in so many, one rank's count
BYTES = "bytes"  # transport -> bytes pulled into this instance
DURATIONS = "durations_s"  # from the reservation to the last rank's verdict, delivered ones
RECOMPUTED_TOKENS = "recomputed_tokens"  # prompt tokens computed here in spite of a handoff
PULLED_BLOCKS = "pulled_blocks"  # blocks that came over handoffs, one rank's count
POOL_LOOKUPS = "pool_lookups"  # hit, miss or late -> requests
POOL_LOADS = "pool_loads"  # "whole", or why it was not -> loads, one rank's count; so are the next ones
POOL_LOADED_BLOCKS = "pool_loaded_blocks"  # tier -> blocks
POOL_LOADED_BYTES = "pool_loaded_bytes"
POOL_LOAD_SECONDS = "pool_load_seconds"  # of each load that brought something
POOL_SAVED_BLOCKS = "pool_saved_blocks"  # stored, duplicate or refused -> blocks
POOL_SAVED_BYTES = "pool_saved_bytes"
POOL_SAVE_FAILURES = "pool_save_failures"  # cause -> saves that were refused or broke off

_POOL_BY_LABEL = (POOL_LOOKUPS, POOL_LOADS, POOL_LOADED_BLOCKS, POOL_SAVED_BLOCKS, POOL_SAVE_FAILURES)
_BY_LABEL = (HANDOFFS, RELEASES, PUBLICATIONS, BYTES, *_POOL_BY_LABEL)
_LISTS = (DURATIONS, POOL_LOAD_SECONDS)
_NUMBERS = (RECOMPUTED_TOKENS, PULLED_BLOCKS, POOL_LOADED_BYTES, POOL_SAVED_BYTES)


def empty() -> dict[str, Any]:
    """Nothing counted."""
    data: dict[str, Any] = {key: {} for key in _BY_LABEL}
    return data | {key: [] for key in _LISTS} | dict.fromkeys(_NUMBERS, 0)


def is_empty(data: dict[str, Any]) -> bool:
    """Whether there is nothing to tell."""
    return not any(data.values())


def add(total: dict[str, Any], more: dict[str, Any]) -> None:
    """Add `more` to `total`, in place."""
    for key in _BY_LABEL:
        for label, count in more[key].items():
            count_label(total, key, label, count)
    for key in (*_LISTS, *_NUMBERS):
        total[key] += more[key]


def count_label(data: dict[str, Any], key: str, label: str, count: int = 1) -> None:
    """Add to one label's count; nothing where there is nothing to add."""
    if count:
        data[key][label] = data[key].get(label, 0) + count


def count_outcome(data: dict[str, Any], outcome: Outcome, recomputed_tokens: int) -> None:
    """Count one handoff's end at the target."""
    label = f"{outcome.state}/{outcome.stage or ''}/{outcome.cause or ''}"
    count_label(data, HANDOFFS, label)
    data[RECOMPUTED_TOKENS] += recomputed_tokens
    if outcome.bytes_moved:
        data[DURATIONS].append(round(outcome.duration_s, 6))
        count_label(data, BYTES, outcome.transport or "unknown", outcome.bytes_moved)


def count_release(data: dict[str, Any], reason: str) -> None:
    """Count one source handoff's release."""
    count_label(data, RELEASES, reason)


def count_load(data: dict[str, Any], loaded: LoadedLike, num_wanted: int) -> None:
    """Count one load from the pool."""
    whole = loaded.num_blocks == num_wanted
    count_label(data, POOL_LOADS, "whole" if whole else loaded.cause or "evicted")
    for tier, num_blocks in loaded.tiers.items():
        count_label(data, POOL_LOADED_BLOCKS, tier, num_blocks)
    data[POOL_LOADED_BYTES] += loaded.nbytes
    if loaded.num_blocks:
        data[POOL_LOAD_SECONDS].append(round(loaded.duration_s, 6))


def count_saved(data: dict[str, Any], saved: SavedLike) -> None:
    """Count one save into the pool."""
    count_label(data, POOL_SAVED_BLOCKS, "stored", saved.stored)
    count_label(data, POOL_SAVED_BLOCKS, "duplicate", saved.duplicates)
    count_label(data, POOL_SAVED_BLOCKS, "refused", saved.refused)
    data[POOL_SAVED_BYTES] += saved.nbytes
    if saved.cause is not None:
        count_label(data, POOL_SAVE_FAILURES, saved.cause)


def summary(data: dict[str, Any]) -> dict[str, int | float | str]:
    """A few representative figures of an interval, for vLLM's log line."""
    figures: dict[str, int | float | str] = {}
    for label, count in sorted(data[HANDOFFS].items()):
        figures[f"handoffs {label.rstrip('/')}"] = count
    if data[DURATIONS]:
        times = sorted(data[DURATIONS])
        figures["median handoff (ms)"] = round(times[len(times) // 2] * 1e3, 2)
        figures["pulled (MB)"] = round(sum(data[BYTES].values()) / 1e6, 2)
    if data[RECOMPUTED_TOKENS]:
        figures["prompt tokens recomputed"] = data[RECOMPUTED_TOKENS]
    for reason, count in sorted(data[RELEASES].items()):
        figures[f"released ({reason})"] = count
    for pieces, count in sorted(data[PUBLICATIONS].items()):
        figures[f"published (in {pieces})"] = count
    return figures | _pool_summary(data)


def _pool_summary(data: dict[str, Any]) -> dict[str, int | float | str]:
    figures: dict[str, int | float | str] = {}
    for name, key in (
        ("pool lookups", POOL_LOOKUPS),
        ("pool loads", POOL_LOADS),
        ("pool blocks loaded", POOL_LOADED_BLOCKS),
        ("pool blocks", POOL_SAVED_BLOCKS),
        ("pool saves failed", POOL_SAVE_FAILURES),
    ):
        for label, count in sorted(data[key].items()):
            figures[f"{name} ({label})"] = count
    if data[POOL_LOAD_SECONDS]:
        times = sorted(data[POOL_LOAD_SECONDS])
        figures["median pool load (ms)"] = round(times[len(times) // 2] * 1e3, 2)
    return figures
