"""Mixtures of experts over the pair: one pair a model; its prefill instance without a ticket is the reference.

One pair publishes each layer as soon as it is computed, the other as it chooses.
"""

import pytest
from serving import PATIENT, blocks_pulled, complete, prompt_of

NUM_TOKENS = 12
LENGTHS = (5, 128, 129, 700)


NUM_LAYERS = 4


@pytest.mark.parametrize("model, layers_a_publish", [("mixtral", 1), ("qwen3moe", "auto")])
def test_tokens_equal_and_depend_on_what_came_over(start_pair, registry, model, layers_a_publish, tmp_path):
    pair = start_pair(
        model,
        prefill_kv=PATIENT | {"layers_a_publish": layers_a_publish},
        decode_kv={"on_loaded": "hooks:zero_on_flag", **PATIENT},
        environment={"KVFERRY_TEST_FLAGS": str(tmp_path)},
    )
    try:
        expected_blocks = 0
        for i, length in enumerate(LENGTHS):
            prompt = prompt_of(length, seed=i + 1)
            result = pair.complete(prompt, NUM_TOKENS)
            assert result.outcome.state == "delivered", result.outcome
            expected_blocks += blocks_pulled(length)
            # P computed this prompt itself; asked without a ticket it decodes too, as a single instance does.
            assert result.token_ids == complete(pair.prefill.url, prompt, NUM_TOKENS), f"prompt of {length} tokens"
        assert pair.decode.metric("vllm:kvferry_pulled_blocks_total") == expected_blocks
        lines = [x for x in pair.prefill.page().splitlines() if x.startswith("vllm:kvferry_publications_total{")]
        pieces = {line.partition('pieces="')[2].partition('"')[0] for line in lines}
        # Before anything was seen of the link a chunk is published whole.
        assert pieces == {str(NUM_LAYERS)} if layers_a_publish == 1 else "1" in pieces
        (tmp_path / "zero").touch()
        prompt = prompt_of(300, seed=50)
        assert pair.complete(prompt, NUM_TOKENS).token_ids != complete(pair.prefill.url, prompt, NUM_TOKENS)
        pair.prefill.wait_all_free()
        pair.decode.wait_all_free()
    finally:
        pair.close()
        registry.reports.clear()
