"""What the connector counts, as plain dictionaries that add up. Pure: no vLLM.

vLLM carries these from workers and scheduler to the process that serves `/metrics`, so they must be JSON.
"""

from __future__ import annotations

from typing import Any

from kvferry.types import Outcome

HANDOFFS = "handoffs"  # "state/stage/cause" -> count; the target's view, one for each handoff
RELEASES = "releases"  # reason -> count; the source's view, one for each rank's handoff
BYTES = "bytes"  # transport -> bytes pulled into this instance
DURATIONS = "durations_s"  # from the reservation to the last rank's verdict, delivered ones
RECOMPUTED_TOKENS = "recomputed_tokens"  # prompt tokens computed here in spite of a handoff
PULLED_BLOCKS = "pulled_blocks"  # blocks that came over handoffs, one rank's count


def empty() -> dict[str, Any]:
    """Nothing counted."""
    return {HANDOFFS: {}, RELEASES: {}, BYTES: {}, DURATIONS: [], RECOMPUTED_TOKENS: 0, PULLED_BLOCKS: 0}


def is_empty(data: dict[str, Any]) -> bool:
    """Whether there is nothing to tell."""
    return not any(data.values())


def add(total: dict[str, Any], more: dict[str, Any]) -> None:
    """Add `more` to `total`, in place."""
    for key in (HANDOFFS, RELEASES, BYTES):
        for label, count in more[key].items():
            total[key][label] = total[key].get(label, 0) + count
    total[DURATIONS] += more[DURATIONS]
    total[RECOMPUTED_TOKENS] += more[RECOMPUTED_TOKENS]
    total[PULLED_BLOCKS] += more[PULLED_BLOCKS]


def count_outcome(data: dict[str, Any], outcome: Outcome, recomputed_tokens: int) -> None:
    """Count one handoff's end at the target."""
    label = f"{outcome.state}/{outcome.stage or ''}/{outcome.cause or ''}"
    data[HANDOFFS][label] = data[HANDOFFS].get(label, 0) + 1
    data[RECOMPUTED_TOKENS] += recomputed_tokens
    if outcome.bytes_moved:
        data[DURATIONS].append(round(outcome.duration_s, 6))
        transport = outcome.transport or "unknown"
        data[BYTES][transport] = data[BYTES].get(transport, 0) + outcome.bytes_moved


def count_release(data: dict[str, Any], reason: str) -> None:
    """Count one source handoff's release."""
    data[RELEASES][reason] = data[RELEASES].get(reason, 0) + 1


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
    return figures
