"""Prefill here, decode there, over a node that copies inside the process: every way it can end for the engine."""

from collections.abc import Callable
from typing import Any

from tests_engine_support import Pair, ticket, tokens_of

from kvferry.config import HandoffSettings
from kvferry.connector.transformers.sequence import Failure, Piece
from kvferry.types import Outcome, TerminalState, new_handoff_id

Reference = list[tuple[list[int], list[float]]]
MakePair = Callable[..., Pair]


def outcome_of(events: list[Any]) -> Outcome:
    (outcome,) = [e for e in events if isinstance(e, Outcome)]
    assert events[0] is outcome, "the outcome is known before the first token"
    return outcome


def is_empty(pair: Pair) -> bool:
    return pair.source.is_empty() and pair.target.is_empty()


def test_tokens_over_a_pair_equal_one_instance_alone(
    pair: MakePair, prompts: list[list[int]], reference: Reference
) -> None:
    for prompt, expected in zip(prompts, reference, strict=True):
        fresh = pair()
        _, decode = fresh.submit("r", prompt, logprobs=0)
        fresh.run()
        assert tokens_of(decode) == expected
        assert outcome_of(decode).state is TerminalState.DELIVERED
        assert fresh.target.engine.snapshot.computed_prompt_tokens == 1
        assert is_empty(fresh)


def test_tokens_over_a_pair_equal_one_instance_16_at_a_time(
    pair: MakePair, prompts: list[list[int]], reference: Reference
) -> None:
    both = pair()
    legs = [both.submit(f"r{i}", prompts[i % 7], logprobs=0) for i in range(16)]
    both.run()
    assert [tokens_of(decode) for _, decode in legs] == [reference[i % 7] for i in range(16)]
    assert {outcome_of(decode).state for _, decode in legs} == {TerminalState.DELIVERED}
    assert all(outcome_of(decode).tokens_computed == 1 for _, decode in legs)
    assert both.target.engine.snapshot.computed_prompt_tokens == 16
    assert is_empty(both)


def test_layers_are_published_one_by_one_while_the_prompt_is_computed(pair: MakePair, prompts: list[list[int]]) -> None:
    both = pair()
    both.submit("r", prompts[4])
    both.run()
    assert both.source_node.calls == [
        "publish 0-1 0+4", "publish 1-2 0+4", "publish 0-1 4+3", "publish 1-2 4+3",
        "publish 0-1 7+1", "publish 1-2 7+1", "seal",
    ]  # fmt: skip


def test_a_prefix_at_the_source_is_published_at_once_and_one_at_the_target_is_not_asked_for(
    pair: MakePair, prompts: list[list[int]], reference: Reference
) -> None:
    both = pair()
    for _ in range(2):
        _, decode = both.submit("r", prompts[4], logprobs=0)
        both.run()
        assert tokens_of(decode) == reference[4]
    assert both.source_node.calls[7:] == ["publish 0-2 0+7", "publish 0-1 7+1", "publish 1-2 7+1", "seal"]
    block = both.target.memory.geometry.block_bytes
    assert [o.bytes_moved for o in both.target.reports] == [2 * 8 * block, 2 * 1 * block]
    assert is_empty(both)


def test_sealed_blocks_stay_held_until_they_are_released(pair: MakePair, prompts: list[list[int]]) -> None:
    both = pair()
    prefill = both.source.submit("r", prompts[4], ticket=ticket("source", new_handoff_id()), max_tokens=1)
    both.source.run()
    assert prefill[-1].finish_reason == "length"
    assert both.source.engine.snapshot.held_blocks == 8
    both.source_node.expire()
    assert is_empty(both)


def test_a_failed_handoff_is_recomputed_with_equal_tokens(
    pair: MakePair, prompts: list[list[int]], reference: Reference
) -> None:
    both = pair()
    events = both.target.submit("r", prompts[5], ticket=ticket("target", new_handoff_id()), logprobs=0)
    both.target.engine.step()
    assert both.target.engine.snapshot.parked == 1
    both.target_node.fail("peer_gone")
    both.run()
    assert tokens_of(events) == reference[5]
    outcome = outcome_of(events)
    assert (outcome.state, outcome.cause, outcome.tokens_computed) == (TerminalState.RECOMPUTED, "peer_gone", 300)
    assert both.target.reports == [outcome]
    assert is_empty(both)


def test_by_policy_a_failed_handoff_fails_the_request(pair: MakePair, prompts: list[list[int]]) -> None:
    both = pair(target={"handoff": HandoffSettings(on_failure="fail")})
    events = both.target.submit("r", prompts[5], ticket=ticket("target", new_handoff_id()))
    both.target.engine.step()
    both.target_node.fail("transfer_timeout")
    both.run()
    assert outcome_of(events).state is TerminalState.FAILED
    assert isinstance(events[-1], Failure) and events[-1].error.status == 502
    assert events[-1].error.code == "transfer_timeout"
    assert is_empty(both)


def test_concurrent_recomputes_are_capped(pair: MakePair, prompts: list[list[int]]) -> None:
    both = pair(target={"handoff": HandoffSettings(max_recomputing=2)})
    legs = [both.target.submit(f"r{i}", prompts[5], ticket=ticket("target", new_handoff_id())) for i in range(3)]
    both.target.engine.step()
    both.target_node.fail("peer_gone")
    both.run()
    assert sorted(outcome_of(e).state for e in legs) == ["failed", "recomputed", "recomputed"]
    (refused,) = [e[-1] for e in legs if isinstance(e[-1], Failure)]
    assert refused.error.status == 503
    assert is_empty(both)


def test_an_abort_while_parked_keeps_the_blocks_until_the_node_lets_go(
    pair: MakePair, prompts: list[list[int]]
) -> None:
    both = pair()
    both.target.submit("r", prompts[4], ticket=ticket("target", new_handoff_id()))
    both.target.engine.step()
    cancel, both.target_node.cancel = both.target_node.cancel, lambda handoff, *_, **__: cancelled.append(handoff)
    cancelled: list[Any] = []
    both.target.engine.abort("r")
    both.target.engine.step()
    assert len(cancelled) == 1
    assert both.target.engine.snapshot.held_blocks > 0, "a read may still land in them"
    assert both.target.engine.snapshot.draining == 1
    cancel(cancelled[0], "now", side="target")
    assert is_empty(both)
    assert [o.state for o in both.target.reports] == [TerminalState.ABORTED]


def test_an_abort_of_the_source_cancels_its_handoff(pair: MakePair, prompts: list[list[int]]) -> None:
    both = pair()
    both.source.submit("r", prompts[-1], ticket=ticket("source", new_handoff_id()), max_tokens=1)
    both.source.engine.step()
    both.source.engine.abort("r")
    assert is_empty(both)
    assert not both.source_node.offers


def test_an_abort_in_the_queue_is_told_to_the_node(pair: MakePair, prompts: list[list[int]]) -> None:
    both = pair(source={"num_blocks": 70})
    both.source.submit("first", prompts[-1])
    handoff = new_handoff_id()
    both.source.submit("r", prompts[-1], ticket=ticket("source", handoff), max_tokens=1)
    both.source.engine.step()
    both.source.engine.abort("r")
    both.source.engine.abort("first")
    assert is_empty(both)
    assert both.source_node.cancelled == [handoff]


def test_a_lease_that_ends_during_the_prefill_ends_the_leg(pair: MakePair, prompts: list[list[int]]) -> None:
    both = pair()
    events = both.source.submit("r", prompts[-1], ticket=ticket("source", new_handoff_id()), max_tokens=1)
    both.source.engine.step()
    both.source_node.expire()
    both.run()
    assert isinstance(events[-1], Failure) and events[-1].error.code == "handoff_ended"
    assert "ended (expired)" in events[-1].error.message
    assert is_empty(both)


def test_a_deadline_that_passed_in_the_queue_ends_the_sources_leg(pair: MakePair, prompts: list[list[int]]) -> None:
    both = pair()
    events = both.source.submit("r", prompts[4], ticket=ticket("source", new_handoff_id()), max_tokens=1)
    both.source.now_s = 11.0
    both.source.run()
    assert isinstance(events[-1], Failure) and events[-1].error.code == "deadline_exceeded"
    assert is_empty(both)


def test_a_target_without_room_asks_at_once_and_recomputes_if_the_handoff_ends_meanwhile(
    pair: MakePair, prompts: list[list[int]], reference: Reference
) -> None:
    both = pair(target={"num_blocks": 70})
    both.target.submit("first", prompts[-1])
    handoff = new_handoff_id()
    events = both.target.submit("r", prompts[5], ticket=ticket("target", handoff), logprobs=0)
    both.target.engine.step()
    assert both.target.engine.snapshot.waiting == 1 and handoff in both.target_node.wants
    both.target_node.fail("source_silent")
    both.run()
    assert tokens_of(events) == reference[5]
    assert (outcome_of(events).state, outcome_of(events).cause) == (TerminalState.RECOMPUTED, "source_silent")
    assert is_empty(both)


def test_an_abort_of_a_target_without_room_ends_its_handoff(pair: MakePair, prompts: list[list[int]]) -> None:
    both = pair(target={"num_blocks": 70})
    both.target.submit("first", prompts[-1])
    both.target.submit("r", prompts[5], ticket=ticket("target", new_handoff_id()))
    both.target.engine.step()
    both.target.engine.abort("r")
    both.run()
    assert [o.state for o in both.target.reports] == [TerminalState.ABORTED]
    assert is_empty(both)


def test_a_handoff_id_is_used_once(pair: MakePair, prompts: list[list[int]]) -> None:
    both = pair()
    handoff = new_handoff_id()
    both.target.submit("a", prompts[4], ticket=ticket("target", handoff))
    events = both.target.submit("b", prompts[4], ticket=ticket("target", handoff))
    both.target.run()
    assert outcome_of(events).state is TerminalState.RECOMPUTED
    assert outcome_of(events).cause == "handoff_aborted"
    both.target_node.fail("peer_gone")
    both.run()
    assert is_empty(both)


def test_several_answers_over_one_handoff(pair: MakePair, prompts: list[list[int]]) -> None:
    both = pair()
    _, decode = both.submit("r", prompts[4], n=3, seed=5, temperature=1.0)
    both.run()
    alone = pair().target
    expected = alone.submit("r", prompts[4], n=3, seed=5, temperature=1.0)
    alone.run()

    def answers(events: list[Any]) -> list[list[int]]:
        return [[t for e in events if isinstance(e, Piece) and e.index == i for t in e.token_ids] for i in range(3)]

    assert answers(decode) == answers(expected)
    assert outcome_of(decode).state is TerminalState.DELIVERED
    assert is_empty(both)


def test_full_instances_do_not_lock_each_other(pair: MakePair, prompts: list[list[int]], reference: Reference) -> None:
    both = pair(source={"num_blocks": 70}, target={"num_blocks": 70})
    legs = [both.submit(f"r{i}", prompts[i % 7], logprobs=0) for i in range(14)]
    both.run()
    assert [tokens_of(decode) for _, decode in legs] == [reference[i % 7] for i in range(14)]
    assert is_empty(both)
