"""One P/D pair against a single vLLM instance, token by token."""

import pytest
from serving import PATIENCE_S, PATIENT, Server, blocks_pulled, complete, prompt_of, wait_for

LENGTHS = (1, 5, 127, 128, 129, 300, 1000, 1900)
NUM_TOKENS = 16
# vLLM's CPU build crashes on a seeded request whose prompt is computed in chunks ("CPU Generator does not use
# offset"), with or without a connector; test_faults.py has chunked prompts, greedy ones.
FLAGS = ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "2048"]
SEEDED = {"temperature": 0.9, "seed": 4711, "top_p": 0.95}


@pytest.fixture(scope="module")
def pair(start_pair, tmp_path_factory):
    flags = tmp_path_factory.mktemp("flags")
    pair = start_pair(
        "llama",
        prefill_flags=FLAGS,
        decode_flags=FLAGS,
        prefill_kv=PATIENT,
        decode_kv={"on_loaded": "hooks:zero_on_flag", **PATIENT},
        environment={"KVFERRY_TEST_FLAGS": str(flags), "VLLM_LOG_STATS_INTERVAL": "1"},
    )
    pair.zero_flag = flags / "zero"
    return pair


@pytest.fixture(scope="module")
def single(model_path, logs, pair):
    server = Server("single", model_path("llama"), logs, flags=FLAGS)
    yield server.ready()
    server.stop()


@pytest.fixture
def all_free_after(pair):
    yield
    pair.prefill.wait_all_free()
    pair.decode.wait_all_free()


@pytest.mark.parametrize("options", [{}, SEEDED], ids=["greedy", "seeded"])
def test_one_request_at_a_time(pair, single, all_free_after, options):
    pulled = pair.decode.metric("vllm:kvferry_pulled_blocks_total")
    for length in LENGTHS:
        prompt = prompt_of(length, seed=1000 * (1 + len(options)) + length)
        result = pair.complete(prompt, NUM_TOKENS, **options)
        assert result.token_ids == complete(single.url, prompt, NUM_TOKENS, **options), f"prompt of {length} tokens"
        assert result.outcome.state == "delivered", f"prompt of {length} tokens: {result.outcome}"
        assert result.outcome.tokens_computed == 1
    expected = sum(map(blocks_pulled, LENGTHS))
    assert pair.decode.metric("vllm:kvferry_pulled_blocks_total") - pulled == expected


@pytest.mark.parametrize("options", [{}, SEEDED], ids=["greedy", "seeded"])
def test_sixteen_at_a_time(pair, single, all_free_after, options):
    prompts = [prompt_of(n, seed=9000 + 100 * len(options) + i) for i, n in enumerate(LENGTHS * 2)]
    pulled = pair.decode.metric("vllm:kvferry_pulled_blocks_total")
    sent = [pair.send(p, NUM_TOKENS, **options) for p in prompts]
    answers = [decode.result(PATIENCE_S) for _, decode, _ in sent]
    for prompt, (status, answer) in zip(prompts, answers, strict=True):
        assert status == 200, answer
        expected = complete(single.url, prompt, NUM_TOKENS, **options)
        assert answer["choices"][0]["token_ids"] == expected, f"prompt of {len(prompt)} tokens"
    assert {pair.registry.outcome(h).state for _, _, h in sent} == {"delivered"}
    expected = 2 * sum(map(blocks_pulled, LENGTHS))
    assert pair.decode.metric("vllm:kvferry_pulled_blocks_total") - pulled == expected


def test_the_answer_depends_on_the_received_kv(pair, single):
    """Zeroing what came over must change the output, or the tests above could not fail."""
    changed = 0
    for seed in range(4):
        prompt = prompt_of(300, seed=20_000 + seed)
        pair.zero_flag.touch()
        result = pair.complete(prompt, NUM_TOKENS)
        pair.zero_flag.unlink()
        assert result.outcome.state == "delivered"
        changed += result.token_ids != complete(single.url, prompt, NUM_TOKENS)
    assert changed == 4


def test_a_prefix_that_is_there_does_not_travel_again(pair, single, all_free_after):
    shared = prompt_of(3 * 128, seed=30_000)
    first, second = shared + prompt_of(100, seed=30_001), shared + prompt_of(200, seed=30_002)
    assert pair.complete(first).token_ids == complete(single.url, first, NUM_TOKENS)
    pulled = pair.decode.metric("vllm:kvferry_pulled_blocks_total")
    assert pair.complete(second).token_ids == complete(single.url, second, NUM_TOKENS)
    assert pair.decode.metric("vllm:kvferry_pulled_blocks_total") - pulled == 2
    # All of it is on D now: nothing travels, and P lets go.
    again = pair.complete([*shared, second[3 * 128]])
    assert (again.outcome.state, again.outcome.bytes_moved) == ("delivered", 0)


def test_requests_without_a_ticket_are_plain_vllm(pair, single):
    prompt = prompt_of(200, seed=40_000)
    assert complete(pair.decode.url, prompt, NUM_TOKENS) == complete(single.url, prompt, NUM_TOKENS)


def test_metrics_and_the_log_line_tell_of_it(pair):
    pair.complete(prompt_of(300, seed=50_000))
    assert pair.decode.metric("vllm:kvferry_handoffs_total") > 0
    assert pair.decode.metric("vllm:kvferry_pulled_bytes_total") > 0
    assert pair.decode.metric("vllm:kvferry_handoff_seconds_count") > 0
    assert pair.prefill.metric("vllm:kvferry_releases_total") > 0
    lines = "KV Transfer metrics: handoffs delivered=", "KV Transfer metrics: released (acked)="
    for server, line in zip((pair.decode, pair.prefill), lines, strict=True):
        wait_for(lambda server=server, line=line: line in server.log.read_text(errors="replace"), line)
