"""One instance: its numbers are the model's, and the same bits whatever company or cache a request meets."""

from collections.abc import Callable
from typing import Any

import torch

from kvferry.connector.transformers.model import LoadedModel
from kvferry.connector.transformers.sequence import Failure, Piece

Reference = list[tuple[list[int], list[float]]]


def test_greedy_equals_plain_transformers(loaded: LoadedModel, prompts: list[list[int]], reference: Reference) -> None:
    for prompt, (tokens, _) in zip(prompts, reference, strict=True):
        ids = torch.tensor([prompt])
        expected = loaded.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert tokens == expected[0, len(prompt) :].tolist(), f"prompt of {len(prompt)}"


def test_company_does_not_change_a_bit(
    driver: Callable[..., Any], prompts: list[list[int]], reference: Reference
) -> None:
    engine = driver(num_blocks=2048)
    assert engine.generate([*prompts, *prompts, *prompts[:2]]) == [*reference, *reference, *reference[:2]]
    assert engine.is_empty()


def test_a_prefix_hit_does_not_change_a_bit(
    driver: Callable[..., Any], prompts: list[list[int]], reference: Reference
) -> None:
    engine = driver()
    longest = prompts[-1]
    for cut in (40, 129, 500, 1000):
        prompt = longest[:cut]
        assert engine.generate([prompt]) == driver().generate([prompt])
    assert engine.engine.snapshot.reused_prompt_tokens == 32 + 128 + 496
    assert engine.generate([longest]) == [reference[-1]]
    engine.engine.step()
    assert engine.engine.snapshot.computed_prompt_tokens < 40 + 97 + 372 + 504 + 8 + 1


def test_without_prefix_cache_everything_is_computed(driver: Callable[..., Any], prompts: list[list[int]]) -> None:
    engine = driver(prefix_cache=False)
    engine.generate([prompts[4]])
    engine.generate([prompts[4]])
    assert engine.engine.snapshot.computed_prompt_tokens == 2 * 127
    assert engine.engine.snapshot.cached_blocks == 0


def test_two_namespaces_share_no_block(driver: Callable[..., Any], prompts: list[list[int]]) -> None:
    engine = driver()
    for namespace, reused in (("a", 0), ("b", 0), ("a", 112)):
        engine.submit("r", prompts[4], namespace=namespace)
        engine.run()
        assert engine.engine.snapshot.reused_prompt_tokens == reused


def test_n_answers_come_from_one_prompt(driver: Callable[..., Any], prompts: list[list[int]]) -> None:
    engine = driver()
    events = engine.submit("n", prompts[4], n=3, temperature=1.0, seed=5)
    engine.run()
    answers = [[t for e in events if e.index == i for t in e.token_ids] for i in range(3)]
    assert all(len(a) == 24 for a in answers) and answers[0] != answers[1] != answers[2]
    assert sum(e.finish_reason is not None for e in events) == 3
    assert engine.engine.snapshot.reused_prompt_tokens == 2 * 112
    assert driver().generate([prompts[4]], temperature=1.0, seed=5)[0][0] == answers[0]
    assert engine.is_empty()


def test_a_seeded_draw_does_not_depend_on_company(driver: Callable[..., Any], prompts: list[list[int]]) -> None:
    alone = driver().generate([prompts[4]], temperature=0.8, top_p=0.9, seed=11)
    together = driver(num_blocks=1024).generate([*prompts, prompts[4]], temperature=0.8, top_p=0.9, seed=11)
    assert [together[4]] == alone == [together[-1]]


def test_requests_queue_when_memory_is_full_and_all_finish(
    driver: Callable[..., Any], prompts: list[list[int]], reference: Reference
) -> None:
    engine = driver(num_blocks=66)
    assert engine.generate([*prompts, *prompts]) == [*reference, *reference]
    assert engine.is_empty()


def test_abort_frees_the_blocks_in_every_state(driver: Callable[..., Any], prompts: list[list[int]]) -> None:
    engine = driver(num_blocks=70)
    prefilling = engine.submit("prefilling", prompts[-1])
    waiting = engine.submit("waiting", prompts[-1])
    engine.engine.step()
    assert engine.engine.snapshot.running == 1 and engine.engine.snapshot.waiting == 1
    engine.engine.abort("waiting")
    engine.engine.abort("prefilling")
    engine.engine.step()
    assert engine.engine.snapshot.free_blocks == 70 and not prefilling and not waiting
    decoding = engine.submit("decoding", prompts[0], max_tokens=500)
    for _ in range(5):
        engine.engine.step()
    engine.engine.abort("decoding")
    engine.engine.abort("unknown")
    assert engine.is_empty() and len(decoding) == 5


def test_what_never_fits_fails_and_the_queue_is_bounded(driver: Callable[..., Any], prompts: list[list[int]]) -> None:
    engine = driver(num_blocks=4, max_waiting=1)
    too_large = engine.submit("large", prompts[4])
    first, second = engine.submit("a", [1]), engine.submit("b", [2])
    engine.engine.step()
    assert isinstance(too_large[0], Failure) and too_large[0].error.code == "context_length_exceeded"
    assert isinstance(second[0], Failure) and second[0].error.status == 503
    engine.run()
    assert isinstance(first[-1], Piece)


def test_stop_strings_end_an_answer(driver: Callable[..., Any], prompts: list[list[int]]) -> None:
    ((tokens, _),) = driver().generate([prompts[0]])
    token = tokens[3]
    first = tokens.index(token)
    events = driver()
    seen = events.submit("s", prompts[0], stop_token_ids=(token,))
    events.run()
    assert seen[-1].finish_reason == "stop" and seen[-1].stop_reason == token
    assert [t for e in seen for t in e.token_ids] == tokens[: first + 1]
