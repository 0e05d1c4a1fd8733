"""A model whose layers differ, with vLLM's hybrid KV cache manager: a block table each for windows and whole prompts.

The window is 256 tokens, two blocks; prompts beyond 512 are computed in chunks, so that blocks leave the window and are
freed before the prompt is whole. P is one rank and fails requests whose load fails, D is two and recomputes them.
"""

import pytest
from serving import PATIENCE_S, PATIENT, complete, prompt_of

NUM_TOKENS = 8
LENGTHS = (1, 128, 257, 385, 700, 1900)
BLOCK, WINDOW = 128, 256
NUM_RANKS = 2


@pytest.fixture(scope="module", autouse=True)
def _version():
    base = pytest.importorskip("vllm.distributed.kv_transfer.kv_connector.v1.base")
    if not hasattr(base, "KVConnectorTransferResults"):
        pytest.skip("this vLLM gives all layers one table with this connector, as it could not recompute several")


@pytest.fixture(scope="module")
def pair(start_pair, tmp_path_factory, _version):
    flags = tmp_path_factory.mktemp("flags")
    lying = PATIENT | {"transports": ["corrupting"], "on_loaded": "hooks:zero_on_flag", "lease_ttl_s": 60.0}
    lying["digest"] = "sum"  # what GPUs take; the other modules have xxh3
    environment = {"KVFERRY_TEST_FLAGS": str(flags)}
    few = ["--num-gpu-blocks-override", "48"]  # so that freed blocks have new owners soon
    pair = start_pair(
        "gemma3",
        prefill_flags=few,
        decode_flags=["--tensor-parallel-size", str(NUM_RANKS)],
        prefill_kv={"policy": "fail", **lying},
        decode_kv=dict(lying),
        environment=environment,
    )
    pair.flags = flags
    return pair


@pytest.fixture
def all_free_after(pair):
    yield
    pair.prefill.wait_all_free()
    pair.decode.wait_all_free()


def blocks_wanted(num_tokens):
    """Of both tables, to compute the last token of a prompt: all blocks, and those that its window touches."""
    all_blocks = -(-(num_tokens - 1) // BLOCK)
    return all_blocks + all_blocks - max(0, num_tokens - WINDOW) // BLOCK


def test_vllm_keeps_two_tables(pair):
    for server in (pair.prefill, pair.decode):
        assert "Turning off hybrid kv cache manager" not in server.log.read_text(errors="replace")


@pytest.mark.parametrize("direction", ["1 to 2", "2 to 1"])
def test_tokens_equal_and_only_what_the_window_sees_travels(pair, all_free_after, direction):
    way = pair if direction == "1 to 2" else pair.swapped()
    for length in LENGTHS:
        pulled = way.decode.metric("vllm:kvferry_pulled_blocks_total")
        prompt = prompt_of(length, seed=length + (0 if direction == "1 to 2" else 10_000))
        result = way.complete(prompt, NUM_TOKENS)
        assert result.outcome.state == "delivered", (length, result.outcome)
        # The source computed this prompt itself; asked without a ticket it decodes too, as a single instance does.
        assert result.token_ids == complete(way.prefill.url, prompt, NUM_TOKENS), f"prompt of {length} tokens"
        wanted = blocks_wanted(length) * (NUM_RANKS if direction == "1 to 2" else 1)
        assert way.decode.metric("vllm:kvferry_pulled_blocks_total") - pulled == wanted, length


def test_several_at_a_time_and_prefixes_that_are_there(pair, all_free_after):
    shared = prompt_of(5 * BLOCK, seed=7_000)
    prompts = [shared + prompt_of(n, seed=7_001 + n) for n in (3, 130, 400)] + [prompt_of(600, seed=7_500)]
    sent = [pair.send(prompt, NUM_TOKENS) for prompt in prompts]
    answers = [decode.result(PATIENCE_S)[1]["choices"][0]["token_ids"] for _, decode, _ in sent]
    assert answers == [complete(pair.prefill.url, prompt, NUM_TOKENS) for prompt in prompts]
    assert {pair.registry.outcome(handoff).state for _, _, handoff in sent} == {"delivered"}
    longer = prompts[1] + prompt_of(200, seed=7_900)
    assert pair.complete(longer, NUM_TOKENS).token_ids == complete(pair.prefill.url, longer, NUM_TOKENS)


def test_a_corrupt_byte_is_recomputed_in_all_layers(pair, all_free_after):
    prompt = prompt_of(900, seed=8_000)
    (pair.flags / "corrupt").touch()
    result = pair.complete(prompt, NUM_TOKENS)
    (pair.flags / "corrupt").unlink()
    assert (result.outcome.state, result.outcome.cause) == ("recomputed", "integrity_error")
    assert result.token_ids == complete(pair.prefill.url, prompt, NUM_TOKENS)


def test_a_corrupt_byte_ends_the_request_where_the_policy_is_to_fail(pair, all_free_after):
    (pair.flags / "corrupt").touch()
    legs = pair.swapped().send(prompt_of(900, seed=8_200), NUM_TOKENS)
    statuses = [leg.result(PATIENCE_S)[0] for leg in legs[:2]]
    (pair.flags / "corrupt").unlink()
    assert statuses == [200, 500]
    outcome = pair.registry.outcome(legs[2])
    assert (outcome.state, outcome.cause) == ("failed", "integrity_error")


def test_what_leaves_the_sources_window_is_there_until_the_target_has_it(pair, all_free_after):
    """The source decodes until vLLM frees the first block of the prompt's window, and computes others in there."""
    prompt = prompt_of(5 * BLOCK, seed=8_500)  # what is decoded goes into other blocks
    source, target = pair.tickets()
    prefill = complete(pair.prefill.url, prompt, BLOCK + 8, kv_transfer_params=source.as_params())
    for seed in range(8_501, 8_506):
        complete(pair.prefill.url, prompt_of(1900, seed=seed), 1)
    decode = complete(pair.decode.url, prompt, NUM_TOKENS, kv_transfer_params=target.as_params())
    assert decode == prefill[:NUM_TOKENS]
    outcome = pair.registry.outcome(source.handoff)
    assert outcome.state == "delivered", outcome


def test_the_answer_depends_on_what_came_over(pair):
    (pair.flags / "zero").touch()
    prompt = prompt_of(300, seed=9_000)
    result = pair.complete(prompt, NUM_TOKENS)
    assert result.outcome.state == "delivered"
    assert result.token_ids != complete(pair.prefill.url, prompt, NUM_TOKENS)
