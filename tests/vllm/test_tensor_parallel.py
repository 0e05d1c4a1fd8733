"""One rank on one side, two on the other: each rank pulls the heads it holds."""

import pytest
from serving import PATIENT, complete, prompt_of

NUM_TOKENS = 12
LENGTHS = (5, 128, 129, 900)


@pytest.fixture(scope="module")
def pair(start_pair):
    # float32: in bfloat16 the sums over two ranks round otherwise than the sums within one.
    exact = ["--dtype", "float32"]
    two = [*exact, "--tensor-parallel-size", "2"]
    return start_pair("llama", prefill_flags=exact, decode_flags=two, prefill_kv=PATIENT, decode_kv=PATIENT)


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
