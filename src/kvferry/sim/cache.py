"""`kvferry sim cache`: replay a request trace through the pool's eviction policies, with Belady's bound beside them.

The trace is one of `kvferry.request_trace`. A request hits the longest run of cached blocks from its beginning; its
tokens count as min(blocks x block tokens, input_length). Then its blocks are used, in the order that the policy wants,
and each absent one comes in, for which another leaves where the cache is full.
"""

from __future__ import annotations

import functools
import heapq
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from kvferry.errors import ConfigError
from kvferry.policy.eviction import EvictionPolicy, Place
from kvferry.policy.eviction_choice import create_eviction
from kvferry.request_trace import BLOCK_TOKENS, TracedRequest, read_request_trace

BELADY = "belady"
UNBOUNDED = "unbounded"


class HitRatio(msgspec.Struct, frozen=True):
    """One policy at one capacity. `hit_ratio` is the share of input tokens that were cached."""

    policy: str
    capacity_tokens: int | None
    hit_ratio: float
    hit_tokens: int
    input_tokens: int
    evictions: int
    seconds: float


def replay(
    requests: Sequence[TracedRequest], policy: str, capacity_tokens: int, block_tokens: int = BLOCK_TOKENS
) -> HitRatio:
    """Run one policy over the trace with room for `capacity_tokens // block_tokens` blocks.

    Raises: ConfigError for an unknown policy, or a capacity below one block.
    """
    capacity = _blocks(capacity_tokens, block_tokens)
    cache: EvictionPolicy[int] = create_eviction(policy, capacity, int)
    began_s, hit_tokens, evictions = time.perf_counter(), 0, 0
    for request in requests:
        keys = request.hash_ids
        num_hits = next((i for i, key in enumerate(keys) if key not in cache), len(keys))
        hit_tokens += min(num_hits * block_tokens, request.input_length)
        evictions += use_prompt(cache, keys, capacity)
    seconds = time.perf_counter() - began_s
    return _ratio(policy, capacity_tokens, hit_tokens, requests, evictions, seconds)


def use_prompt(cache: EvictionPolicy[int], keys: Sequence[int], capacity: int) -> int:
    """Use all blocks of one prompt; absent ones come in. Returns how many had to leave."""
    num_blocks, evictions = len(keys), 0
    order: Iterable[int] = range(num_blocks - 1, -1, -1) if cache.deepest_first else range(num_blocks)
    for depth in order:
        key = keys[depth]
        place = Place(depth, num_blocks, keys[depth - 1] if depth else None)
        if key in cache:
            cache.touch(key, place)
            continue
        while len(cache) >= capacity and cache.evict() is not None:
            evictions += 1
        cache.insert(key, place)
    return evictions


def belady(requests: Sequence[TracedRequest], capacity_tokens: int, block_tokens: int = BLOCK_TOKENS) -> HitRatio:
    """Belady's bound: the block whose next use is farthest leaves, and one that is not used again is not kept.

    No policy can have more block hits, as it knows the future; the bound counts each of them, also behind a miss.
    """
    capacity, never = _blocks(capacity_tokens, block_tokens), 1 << 62
    began_s = time.perf_counter()
    uses = [key for request in requests for key in request.hash_ids]
    next_use, seen = [never] * len(uses), dict[int, int]()
    for at in range(len(uses) - 1, -1, -1):
        next_use[at] = seen.get(uses[at], never)
        seen[uses[at]] = at
    cached: dict[int, int] = {}
    farthest: list[tuple[int, int]] = []
    at, hit_tokens, evictions = 0, 0, 0
    for request in requests:
        left = request.input_length
        for key in request.hash_ids:
            tokens = max(0, min(block_tokens, left))
            left -= tokens
            if cached.pop(key, None) is not None:
                hit_tokens += tokens
            if next_use[at] != never:
                cached[key] = next_use[at]
                heapq.heappush(farthest, (-next_use[at], key))
            at += 1
            while len(cached) > capacity:
                negative, victim = heapq.heappop(farthest)
                if cached.get(victim) == -negative:
                    del cached[victim]
                    evictions += 1
    seconds = time.perf_counter() - began_s
    return _ratio(BELADY, capacity_tokens, hit_tokens, requests, evictions, seconds)


def unbounded(requests: Sequence[TracedRequest], block_tokens: int = BLOCK_TOKENS) -> HitRatio:
    """A cache that never loses a block."""
    seen: set[int] = set()
    began_s, hit_tokens = time.perf_counter(), 0
    for request in requests:
        keys = request.hash_ids
        num_hits = next((i for i, key in enumerate(keys) if key not in seen), len(keys))
        hit_tokens += min(num_hits * block_tokens, request.input_length)
        seen.update(keys)
    return _ratio(UNBOUNDED, None, hit_tokens, requests, 0, time.perf_counter() - began_s)


def replay_all(path: Path, policies: Sequence[str], capacities: Sequence[int], *, num_processes: int) -> list[HitRatio]:
    """Every policy and Belady's bound at every capacity, then the unbounded cache; spread over processes.

    Raises: ConfigError as `read_request_trace` and `replay` do.
    """
    requests = read_request_trace(path)
    for policy in policies:
        create_eviction(policy, 1, int)
    runs = [(path, policy, capacity) for policy in [*policies, BELADY] for capacity in capacities]
    with ProcessPoolExecutor(max_workers=num_processes) as pool:
        results = list(pool.map(_replay_file, runs))
    return [*results, unbounded(requests)]


def _replay_file(run: tuple[Path, str, int]) -> HitRatio:
    path, policy, capacity = run
    requests = _trace_here(path)
    return belady(requests, capacity) if policy == BELADY else replay(requests, policy, capacity)


@functools.cache
def _trace_here(path: Path) -> list[TracedRequest]:
    # One reading serves all runs of a process.
    return read_request_trace(path)


def _ratio(
    policy: str,
    capacity_tokens: int | None,
    hit_tokens: int,
    requests: Sequence[TracedRequest],
    evictions: int,
    seconds: float,
) -> HitRatio:
    total = sum(request.input_length for request in requests)
    return HitRatio(policy, capacity_tokens, hit_tokens / max(1, total), hit_tokens, total, evictions, seconds)


def _blocks(capacity_tokens: int, block_tokens: int) -> int:
    capacity = capacity_tokens // block_tokens
    if capacity < 1:
        raise ConfigError(f"a capacity of {capacity_tokens} tokens holds no block of {block_tokens}; give more")
    return capacity


def describe(results: Sequence[HitRatio]) -> str:
    """A table for a person: one line a policy, one column a capacity, hit ratios in percent."""
    capacities = sorted({r.capacity_tokens for r in results if r.capacity_tokens is not None})
    by_policy: dict[str, dict[int | None, HitRatio]] = {}
    for result in results:
        by_policy.setdefault(result.policy, {})[result.capacity_tokens] = result
    lines = ["hit ratio, % of input tokens".ljust(30) + "".join(f"{tokens_text(c):>10}" for c in capacities)]
    for policy, found in by_policy.items():
        if None in found:
            lines.append(f"{policy:<30}{100 * found[None].hit_ratio:>10.2f}")
            continue
        cells = (f"{100 * found[c].hit_ratio:>10.2f}" if c in found else " " * 10 for c in capacities)
        lines.append(f"{policy:<30}" + "".join(cells))
    return "\n".join(lines)


def tokens_text(tokens: int) -> str:
    """3000000 as `3M`."""
    for factor, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if tokens >= factor:
            return f"{tokens / factor:g}{unit}"
    return str(tokens)


def plot(results: Sequence[HitRatio], path: Path) -> None:
    """Hit ratio over capacity, one line a policy. Raises: ConfigError where the file can't be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.6), layout="constrained")
    names = dict.fromkeys(r.policy for r in results if r.capacity_tokens is not None)
    markers = "os^DvPX*"
    for index, name in enumerate(names):
        points = sorted(
            (r.capacity_tokens, 100 * r.hit_ratio) for r in results if r.policy == name if r.capacity_tokens
        )
        style: dict[str, Any] = {"color": "black", "linestyle": "--"} if name == BELADY else {}
        label = "Belady's bound" if name == BELADY else name
        axes.plot(*zip(*points, strict=True), marker=markers[index % len(markers)], markersize=5, label=label, **style)
    for result in results:
        if result.capacity_tokens is None:
            axes.axhline(100 * result.hit_ratio, color="grey", linestyle=":", label="unbounded cache")
    capacities = sorted({r.capacity_tokens for r in results if r.capacity_tokens})
    axes.set_xscale("log")
    axes.set_xticks(capacities, [tokens_text(c) for c in capacities])
    axes.minorticks_off()
    axes.set_xlabel("capacity of the pool, tokens")
    axes.set_ylabel("input tokens found in the pool, %")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the plot cannot be written to {path}: {error}") from error
    finally:
        pyplot.close(figure)


def parse_capacities(text: str) -> tuple[int, ...]:
    """`3M,10M,50M` as tokens. Raises: ConfigError."""
    factors = {"k": 10**3, "M": 10**6, "G": 10**9}
    found = []
    for part in text.split(","):
        number, factor = (part[:-1], factors[part[-1]]) if part[-1:] in factors else (part, 1)
        try:
            tokens = int(float(number) * factor)
        except (ValueError, OverflowError):
            tokens = 0
        if tokens < 1:
            raise ConfigError(f"--capacity {text!r}: {part!r} is no number of tokens; write such as 3M,10M,50M")
        found.append(tokens)
    return tuple(sorted(dict.fromkeys(found)))
