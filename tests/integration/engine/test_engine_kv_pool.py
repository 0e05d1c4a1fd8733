"""The engine and the KV pool: what one engine computed another need not, its tokens stay the same to the bit, and
whatever the pool does, every block comes back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests_engine_support import Driver, Pair, ticket, tokens_of

from kvferry.connector.transformers.model import LoadedModel, load_model
from kvferry.connector.transformers.sequence import Piece
from kvferry.pool import BlockSpace, Loaded, Pending, PoolAttachment, PoolNode, PoolSettings, Saved
from kvferry.types import Outcome, TerminalState, new_handoff_id
from pretended_gpu import DeviceTensor, pretended_gpu

Reference = list[tuple[list[int], list[float]]]
WAIT_S = 60.0


class Node:
    """A pool node on a thread of its own."""

    def __init__(self, slab_bytes: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.node = self.call(self._make, slab_bytes)

    async def _make(self, slab_bytes: int) -> PoolNode:
        node = PoolNode(settings=PoolSettings(arena_bytes=256 * slab_bytes, slab_bytes=slab_bytes))
        await node.start()
        return node

    def call(self, work: Any, *args: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work(*args), self._loop).result(WAIT_S)

    def close(self) -> None:
        self.call(self.node.close)
        self.node.check_integrity()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Pooled:
    """Engines of one model that share a pool.

    Args:
        place: what of an engine's arena is attached; the arena itself, if it is not to lie on a pretended GPU.
    """

    def __init__(self, loaded: LoadedModel, place: Callable[[torch.Tensor], Any] = lambda arena: arena) -> None:
        self._loaded, self._place = loaded, place
        self.block_bytes = 2 * loaded.geometry(16).block_bytes
        self.node = Node(self.block_bytes)
        self._attachments: list[PoolAttachment] = []

    def attach(self, driver: Driver, namespace: str = "default") -> PoolAttachment:
        layout = driver.memory.layout(region=0)
        attachment = PoolAttachment(
            [self.node.node.address],
            BlockSpace.of(self._loaded.fingerprint(16), layout, namespace),
            layout,
            {0: self._place(driver.memory.arena)},
            deadline_s=WAIT_S,
            wake=lambda: driver.engine.wake(),
        )
        self._attachments.append(attachment)
        return attachment

    def driver(self, **overrides: Any) -> Driver:
        return Driver(self._loaded, **{"pool": self.attach, **overrides})

    def close(self) -> None:
        for attachment in self._attachments:
            attachment.close()
        self.node.close()


@pytest.fixture
def pooled(loaded: LoadedModel) -> Iterator[Pooled]:
    made = Pooled(loaded)
    yield made
    made.close()


def num_full(prompt: list[int]) -> int:
    """Tokens of the prompt in blocks that others can find."""
    return (len(prompt) - 1) // 16 * 16


def test_what_one_engine_computed_another_gets_with_equal_tokens(
    pooled: Pooled, prompts: list[list[int]], reference: Reference
) -> None:
    first = pooled.driver()
    assert first.generate(prompts) == reference
    second = pooled.driver()
    assert second.generate(prompts) == reference
    for driver, num_pooled in ((first, 0), (second, sum(map(num_full, prompts)))):
        snapshot = driver.engine.snapshot
        assert snapshot.pooled_prompt_tokens == num_pooled
        assert snapshot.computed_prompt_tokens == sum(map(len, prompts)) - num_pooled
        assert driver.is_empty()
    assert second.engine.snapshot.cached_blocks == first.engine.snapshot.cached_blocks


def test_answers_depend_on_the_very_bytes_that_were_loaded(
    pooled: Pooled, prompts: list[list[int]], reference: Reference
) -> None:
    pooled.driver().generate([prompts[5]])
    arena = pooled.node.node._arena
    (entries,) = (known.entries for known in pooled.node.node._index._spaces.values())
    entry = list(entries.values())[3]
    arena.view(entry.slab, entry.nbytes)[:] = 0
    second = pooled.driver()
    assert second.generate([prompts[5]]) != [reference[5]]
    assert second.engine.snapshot.pooled_prompt_tokens == num_full(prompts[5])


def save_and_load(pooled: Pooled, prompts: list[list[int]], expected: Reference) -> None:
    """Two engines, one after the other: the second one computes as little as it can."""
    for num_pooled in (0, sum(map(num_full, prompts))):
        driver = pooled.driver()
        assert driver.generate(prompts) == expected
        assert driver.engine.snapshot.pooled_prompt_tokens == num_pooled


def test_kv_on_a_pretended_gpu_is_saved_and_loaded(
    loaded: LoadedModel, prompts: list[list[int]], reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pretended_gpu(monkeypatch) as gpu:
        gpu.late = gpu.strict = True
        pooled = Pooled(loaded, place=lambda arena: DeviceTensor(gpu, arena.numpy()))
        try:
            save_and_load(pooled, prompts, reference)
        finally:
            pooled.close()
        assert gpu.launches
        assert gpu.faults == []
        assert gpu.spans == {}


@pytest.mark.gpu
@pytest.mark.leaks_allowed  # CUDA keeps its context's file descriptors and threads until the process ends.
def test_kv_on_a_gpu_is_saved_and_loaded(model_path: Path, prompts: list[list[int]]) -> None:
    loaded = load_model(str(model_path), device="cuda", dtype="float32")
    pooled = Pooled(loaded)
    try:
        save_and_load(pooled, prompts, Driver(loaded).generate(prompts))
    finally:
        pooled.close()


def test_what_the_pool_has_of_a_longer_prompt_is_loaded_and_the_rest_computed_and_saved(
    pooled: Pooled, prompts: list[list[int]], loaded: LoadedModel
) -> None:
    long, short = prompts[6][:700], prompts[6][:230]
    (expected,) = Driver(loaded).generate([long])
    pooled.driver().generate([short])
    second = pooled.driver()
    assert second.generate([long]) == [expected]
    assert second.engine.snapshot.pooled_prompt_tokens == num_full(short)
    third = pooled.driver()
    assert third.generate([long]) == [expected]
    assert third.engine.snapshot.pooled_prompt_tokens == num_full(long)


def test_what_is_here_is_not_loaded_and_answers_of_one_prompt_load_once(
    pooled: Pooled, prompts: list[list[int]], loaded: LoadedModel
) -> None:
    prompt = prompts[5]
    pooled.driver().generate([prompt])
    second = pooled.driver()
    events = second.submit("many", prompt, n=3, temperature=0.0)
    second.run()
    assert (
        len({tuple(tokens_of([e for e in events if isinstance(e, Piece) and e.index == i])[0]) for i in range(3)}) == 1
    )
    assert second.engine.snapshot.pooled_prompt_tokens == num_full(prompt)
    assert next(e for e in events if isinstance(e, Piece)).num_cached_tokens == num_full(prompt)
    before = pooled._attachments[1].stats()
    second.generate([prompt])
    assert pooled._attachments[1].stats() == before
    assert second.is_empty()


def test_two_tenants_never_share(pooled: Pooled, prompts: list[list[int]], reference: Reference) -> None:
    prompt = prompts[5]
    first = pooled.driver()
    assert first.generate([prompt], namespace="a") == [reference[5]]
    # The same space of the pool, another salt in the hashes; then another space altogether.
    assert first.generate([prompt], namespace="b") == [reference[5]]
    other = pooled.driver(pool=lambda driver: pooled.attach(driver, "tenant-b"))
    assert other.generate([prompt], namespace="a") == [reference[5]]
    assert first.engine.snapshot.pooled_prompt_tokens == other.engine.snapshot.pooled_prompt_tokens == 0
    third = pooled.driver()
    assert third.generate([prompt], namespace="b") == [reference[5]]
    assert third.engine.snapshot.pooled_prompt_tokens == num_full(prompt)


def test_prefill_takes_its_prefix_from_the_pool_and_hands_all_of_it_over(
    pooled: Pooled, prompts: list[list[int]], reference: Reference, loaded: LoadedModel
) -> None:
    pooled.driver().generate([prompts[4]])
    both = Pair(loaded, source={"pool": pooled.attach}, target={"pool": pooled.attach})
    _, decode = both.submit("r", prompts[4], logprobs=0)
    both.run()
    assert tokens_of(decode) == reference[4]
    assert both.source_node.calls == ["publish 0-2 0+7", "publish 0-1 7+1", "publish 1-2 7+1", "seal"]
    assert both.source.engine.snapshot.pooled_prompt_tokens == 112
    (outcome,) = (e for e in decode if isinstance(e, Outcome))
    assert (outcome.state, outcome.tokens_computed) == (TerminalState.DELIVERED, 1)
    assert both.target.engine.snapshot.pooled_prompt_tokens == 0
    # Who was handed the blocks does not save them once more.
    assert pooled._attachments[2].stats().saves == 0
    assert both.source.is_empty() and both.target.is_empty()


def test_decode_takes_from_the_pool_what_a_dead_prefill_did_not_hand_over(
    pooled: Pooled, prompts: list[list[int]], reference: Reference, loaded: LoadedModel
) -> None:
    pooled.driver().generate([prompts[5]])
    both = Pair(loaded, source={}, target={"pool": pooled.attach})
    events = both.target.submit("r", prompts[5], ticket=ticket("target", new_handoff_id()), logprobs=0)
    both.target.engine.step()
    both.target_node.fail("peer_gone")
    both.run()
    assert tokens_of(events) == reference[5]
    (outcome,) = both.target.reports
    num_missing = len(prompts[5]) - num_full(prompts[5])
    assert (outcome.state, outcome.cause, outcome.tokens_computed) == (
        TerminalState.RECOMPUTED,
        "peer_gone",
        num_missing,
    )
    assert both.target.engine.snapshot.computed_prompt_tokens == num_missing
    assert both.target.is_empty()


def test_a_request_given_up_while_decode_asks_the_pool_ends_once(
    loaded: LoadedModel, prompts: list[list[int]], slow: SlowPool
) -> None:
    both = Pair(loaded, source={}, target={"pool": lambda _: slow})
    both.target.submit("r", prompts[5], ticket=ticket("target", new_handoff_id()))
    steps(both.target)
    assert not slow.loads
    both.target_node.fail("peer_gone")
    steps(both.target)
    assert (len(slow.loads), both.target.reports) == (1, [])
    both.target.engine.abort("r")
    assert not both.target.is_empty()
    assert [(o.state, o.cause) for o in both.target.reports] == [(TerminalState.ABORTED, "peer_gone")]
    slow.loads[0][2]._finish(Loaded(cause="cancelled"))
    assert both.target.is_empty()
    assert len(both.target.reports) == 1


class SlowPool:
    """A pool whose loads and saves end when the test says so."""

    def __init__(self) -> None:
        self.loads: list[tuple[list[bytes], list[int], Pending[Loaded]]] = []
        self.saves: list[tuple[list[bytes], list[int], Pending[Saved]]] = []
        self.prefetched: list[list[bytes]] = []
        self.cancelled = 0
        self.full = False
        self._loop = asyncio.new_event_loop()

    def prefetch(self, hashes: Any) -> Pending[int]:
        self.prefetched.append(list(hashes))
        return Pending(self._loop)

    def load(self, hashes: Any, block_ids: Any) -> Pending[Loaded]:
        pending: Pending[Loaded] = Pending(self._loop)
        pending.cancel = self._cancel  # type: ignore[method-assign]
        self.loads.append((list(hashes), list(block_ids), pending))
        return pending

    def save(self, hashes: Any, block_ids: Any, *, first: int = 0, length: int = 0) -> Pending[Saved]:
        pending: Pending[Saved] = Pending(self._loop)
        self.saves.append((list(hashes), list(block_ids), pending))
        if self.full:
            pending._finish(Saved(refused=len(hashes), cause="pool_exhausted"))
        return pending

    def _cancel(self) -> None:
        self.cancelled += 1

    def close(self) -> None:
        self._loop.close()


@pytest.fixture
def slow() -> Iterator[SlowPool]:
    made = SlowPool()
    yield made
    made.close()


def steps(driver: Driver) -> None:
    while driver.engine.step():
        pass


def test_a_request_that_is_given_up_keeps_its_blocks_until_nothing_is_written_into_them(
    loaded: LoadedModel, prompts: list[list[int]], slow: SlowPool
) -> None:
    driver = Driver(loaded, pool=lambda _: slow)
    driver.submit("r", prompts[5])
    steps(driver)
    assert (driver.engine.snapshot.parked, driver.engine.snapshot.computed_prompt_tokens) == (1, 0)
    driver.engine.abort("r")
    assert not driver.is_empty()
    assert (slow.cancelled, driver.engine.snapshot.draining) == (1, 1)
    slow.loads[0][2]._finish(Loaded(cause="cancelled"))
    assert driver.is_empty()


def test_others_go_on_while_one_waits_for_the_pool_and_a_failed_load_is_computed(
    loaded: LoadedModel, prompts: list[list[int]], reference: Reference, slow: SlowPool
) -> None:
    driver = Driver(loaded, pool=lambda _: slow)
    waiting = driver.submit("waits", prompts[5], logprobs=0)
    other = driver.submit("short", prompts[1], logprobs=0)
    steps(driver)
    assert tokens_of(other) == reference[1]
    assert not waiting
    slow.loads[0][2]._finish(Loaded(cause="peer_gone"))
    steps(driver)
    assert tokens_of(waiting) == reference[5]


def test_blocks_are_held_while_they_are_saved_and_no_longer(
    loaded: LoadedModel, prompts: list[list[int]], slow: SlowPool
) -> None:
    driver = Driver(loaded, pool=lambda _: slow, prefill_chunk_tokens=64)
    driver.submit("r", prompts[6])
    steps(driver)
    slow.loads[0][2]._finish(Loaded())
    steps(driver)
    # 62 full blocks: a batch of 32 on the way, the rest at the end, in order and each once.
    assert [len(hashes) for hashes, _, _ in slow.saves] == [32, 30]
    assert [h for hashes, _, _ in slow.saves for h in hashes] == slow.loads[0][0]
    assert driver.engine.snapshot.held_blocks == 62
    slow.saves[0][2]._finish(Saved(32))
    steps(driver)
    assert driver.engine.snapshot.held_blocks == 30
    slow.saves[1][2]._finish(Saved(cause="peer_gone"))
    assert driver.is_empty()


def test_a_pool_that_takes_no_more_is_not_offered_what_follows(
    loaded: LoadedModel, prompts: list[list[int]], slow: SlowPool
) -> None:
    driver = Driver(loaded, pool=lambda _: slow)
    slow.full = True
    driver.submit("r", prompts[6])
    steps(driver)
    slow.loads[0][2]._finish(Loaded())
    steps(driver)
    assert len(slow.saves) == 1
    assert driver.is_empty()


def test_the_pool_hears_early_of_what_a_waiting_request_will_load(
    loaded: LoadedModel, prompts: list[list[int]], slow: SlowPool
) -> None:
    driver = Driver(loaded, pool=lambda _: slow, num_blocks=24)
    first, second = driver.submit("runs", prompts[5]), driver.submit("waits", prompts[5][::-1])
    steps(driver)
    assert driver.engine.snapshot.waiting == 1
    assert len(slow.loads) == len(slow.prefetched) == 1
    slow.loads[0][2]._finish(Loaded())
    steps(driver)
    assert first and not second
    for _, _, save in slow.saves:
        save._finish(Saved())
    steps(driver)
    assert slow.loads[1][0] == slow.prefetched[0] != slow.loads[0][0]
    slow.loads[1][2]._finish(Loaded())
    steps(driver)
    assert second
