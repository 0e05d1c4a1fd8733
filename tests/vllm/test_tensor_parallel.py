"""One rank on one side, two on the other: each rank pulls the heads it holds."""

import pytest
from serving import PATIENT, PATIENT_POOL, complete, prompt_of

from kvferry.doctor import examine, gather

NUM_TOKENS = 12
LENGTHS = (5, 128, 129, 900)


@pytest.fixture(scope="module")
def pair(start_pair, pool_node):
    return start_pair(
        "llama",
        decode_flags=["--tensor-parallel-size", "2"],
        prefill_kv=PATIENT,
        decode_kv={**PATIENT, **PATIENT_POOL, "pool": pool_node.address},
        environment={"VLLM_SERVER_DEV_MODE": "1"},
    )


@pytest.mark.parametrize("direction", ["1 to 2", "2 to 1"])
def test_tokens_equal(pair, direction):
    way = pair if direction == "1 to 2" else pair.swapped()
    for i, length in enumerate(LENGTHS):
        prompt = prompt_of(length, seed=i + (100 if direction == "2 to 1" else 1))
        result = way.complete(prompt, NUM_TOKENS)
        assert result.outcome.state == "delivered", result.outcome
        # The source computed the prompt itself: without a ticket it is the single instance.
        assert result.token_ids == complete(way.prefill.url, prompt, NUM_TOKENS), f"prompt of {length} tokens"
    way.prefill.wait_all_free()
    way.decode.wait_all_free()


def test_each_rank_has_its_own_slice_in_the_pool(pair):
    prompt = prompt_of(700, seed=200)
    expected = complete(pair.prefill.url, prompt, NUM_TOKENS)
    assert complete(pair.decode.url, prompt, NUM_TOKENS) == expected
    pair.decode.wait_all_free()
    pair.decode.forget_prefixes()
    loaded = pair.decode.metric("vllm:kvferry_pool_loaded_blocks_total")
    assert complete(pair.decode.url, prompt, NUM_TOKENS) == expected
    # 5 full blocks of 128 tokens, once a rank.
    seen = [line for line in pair.decode.page().splitlines() if line.startswith("vllm:kvferry_pool")]
    assert pair.decode.metric("vllm:kvferry_pool_loaded_blocks_total") - loaded == 2 * 5, seen
    pair.decode.wait_all_free()


def test_the_doctor_finds_nothing_wrong_with_it(pair):
    facts = gather(prefill=[str(pair.prefill.process.pid)], decode=[str(pair.decode.process.pid)])
    assert ["--tensor-parallel-size" in side.command for side in facts.sides] == [False, True]
    assert examine(facts) == []
