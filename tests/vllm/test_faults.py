"""A side stops, dies, lies or leaves: the end is bounded, its cause and the tokens are right, no block is lost."""

import http.client
import json
import signal
import time

import pytest
from serving import PATIENCE_S, call, complete, complete_alone, post_completion, prompt_of, wait_for

NUM_TOKENS = 16
LEASE_S = 10.0


@pytest.fixture(scope="module")
def pair(start_pair, tmp_path_factory):
    """P fails requests whose load fails, D recomputes them; both can be either side. Bytes go through a transport that
    lies while its flag file is there; chunks are small, so that prompts are published piece by piece."""
    flags = tmp_path_factory.mktemp("flags")
    lying = {"transports": ["corrupting"], "on_loaded": "hooks:zero_on_flag", "lease_ttl_s": LEASE_S}
    chunks = ["--max-num-batched-tokens", "256"]
    pair = start_pair(
        "llama",
        prefill_kv={"policy": "fail", **lying},
        decode_kv=lying,
        prefill_flags=chunks,
        decode_flags=chunks,
        # The development mode is for /reset_prefix_cache.
        environment={"VLLM_SERVER_DEV_MODE": "1", "KVFERRY_TEST_FLAGS": str(flags)},
    )
    pair.corrupt_flag = flags / "corrupt"
    pair.hold_flag, pair.reading_flag = flags / "hold", flags / "reading"
    return pair


@pytest.fixture(autouse=True)
def all_free_after(pair):
    yield
    for server in (pair.prefill, pair.decode):
        if server.process.poll() is None:
            server.wait_all_free()


def plain(pair, prompt):
    """What D answers without a handoff, and without the blocks that one left in its cache."""
    return complete_alone(pair.decode.url, prompt, NUM_TOKENS)


def test_a_source_that_never_offers_ends_with_the_deadline(pair):
    prompt = prompt_of(300, seed=1)
    began = time.monotonic()
    result = pair.complete(prompt, deadline_s=2.0, only_decode=True)
    assert time.monotonic() - began < 30
    assert result.outcome.state == "recomputed"
    assert result.outcome.tokens_computed == 300
    assert result.token_ids == plain(pair, prompt)
    assert pair.decode.metric("vllm:kvferry_recomputed_prompt_tokens_total") >= 299


def test_the_fail_policy_ends_the_request_with_an_honest_error(pair):
    swapped = pair.swapped()
    _, decode, handoff = swapped.send(prompt_of(300, seed=2), NUM_TOKENS, deadline_s=2.0, only_decode=True)
    status, answer = decode.result(PATIENCE_S)
    assert status == 500, answer
    assert pair.registry.outcome(handoff).state == "failed"


def test_a_source_of_another_life_is_refused_at_once(pair):
    _, target = pair.tickets()
    stale = target.as_params()
    stale["kvferry"]["source"]["incarnation"] += 1
    prompt = prompt_of(300, seed=3)
    began = time.monotonic()
    tokens = complete(pair.decode.url, prompt, NUM_TOKENS, kv_transfer_params=stale)
    assert time.monotonic() - began < 30
    assert pair.registry.outcome(target.handoff).state == "recomputed"
    assert tokens == plain(pair, prompt)


def test_another_prompt_under_the_same_handoff_is_refused(pair):
    source, target = pair.tickets(5.0)
    mine, other = prompt_of(300, seed=4), prompt_of(300, seed=5)
    complete(pair.prefill.url, other, 1, kv_transfer_params=source.as_params())
    tokens = complete(pair.decode.url, mine, NUM_TOKENS, kv_transfer_params=target.as_params())
    assert pair.registry.outcome(target.handoff).state == "recomputed"
    assert tokens == plain(pair, mine)


def test_a_flipped_bit_is_found_and_never_used(pair):
    prompt = prompt_of(300, seed=20)
    pair.corrupt_flag.touch()
    try:
        result = pair.complete(prompt)
    finally:
        pair.corrupt_flag.unlink()
    assert (result.outcome.state, result.outcome.cause) == ("recomputed", "integrity_error"), result.outcome
    assert result.token_ids == plain(pair, prompt)


def test_a_client_that_leaves_while_its_request_waits(pair):
    _, target = pair.tickets()
    body = {
        "model": "m",
        "prompt": prompt_of(1000, seed=6),
        "max_tokens": 8,
        "stream": True,
        "kv_transfer_params": target.as_params(),
    }
    connection = http.client.HTTPConnection("127.0.0.1", pair.decode.port)
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    wait_for(lambda: pair.decode.metric("vllm:kv_cache_usage_perc") > 0, "D reserves blocks")
    connection.sock.close()
    assert pair.registry.outcome(target.handoff).state == "aborted"
    pair.decode.wait_all_free()


def test_a_prefill_leg_whose_target_never_comes_gives_its_blocks_back(pair):
    source, _ = pair.tickets(3.0)
    prompt = prompt_of(1000, seed=7)
    complete(pair.prefill.url, prompt, 1, kv_transfer_params=source.as_params())
    pair.prefill.wait_all_free()


def test_a_stopped_source_is_left_behind_and_harmless_when_it_wakes(pair):
    prompt = prompt_of(700, seed=8)
    pair.prefill.signal(signal.SIGSTOP)
    try:
        prefill, decode, handoff = pair.send(prompt, NUM_TOKENS, deadline_s=4.0)
        status, answer = decode.result(PATIENCE_S)
    finally:
        pair.prefill.signal(signal.SIGCONT)
    assert status == 200
    assert pair.registry.outcome(handoff).state == "recomputed"
    assert answer["choices"][0]["token_ids"] == plain(pair, prompt)
    prefill.result(PATIENCE_S)
    # And the pair works again.
    again = prompt_of(700, seed=9)
    assert pair.complete(again).outcome.state == "delivered"


def test_preemption_of_a_half_published_prompt(pair):
    """P takes the blocks back in the middle and computes the prompt again: D gets the second run's bytes or none."""
    preempted = pair.prefill.metric("vllm:num_preemptions_total")
    for seed in range(400, 430):
        prompt = prompt_of(1900, seed)
        prefill, decode, handoff = pair.send(prompt, NUM_TOKENS)
        while pair.prefill.metric("vllm:num_requests_running") == 0 and not prefill.done():
            pass
        call(f"{pair.prefill.url}/reset_prefix_cache?reset_running_requests=true", {})
        status, answer = decode.result(PATIENCE_S)
        assert status == 200
        assert answer["choices"][0]["token_ids"] == plain(pair, prompt)
        assert prefill.result(PATIENCE_S)[0] == 200
        assert pair.registry.outcome(handoff).state == "delivered"
        if pair.prefill.metric("vllm:num_preemptions_total") > preempted:
            return
    pytest.fail("P was never caught in the middle of a prompt")


def test_preemption_of_a_request_that_was_handed_over(pair):
    """D takes the blocks back in the middle of the answer, and computes the prompt and what it said so far again."""
    preempted = pair.decode.metric("vllm:num_preemptions_total")
    for seed in range(450, 460):
        prompt = prompt_of(1900, seed)
        prefill, decode, handoff = pair.send(prompt, 140)
        wait_for(lambda: pair.decode.metric("vllm:num_requests_running") > 0, "D decodes")
        call(f"{pair.decode.url}/reset_prefix_cache?reset_running_requests=true", {})
        status, answer = decode.result(PATIENCE_S)
        assert status == 200
        assert answer["choices"][0]["token_ids"] == complete_alone(pair.decode.url, prompt, 140)
        assert prefill.result(PATIENCE_S)[0] == 200
        assert pair.registry.outcome(handoff).state == "delivered"
        if pair.decode.metric("vllm:num_preemptions_total") > preempted:
            return
    pytest.fail("D was never caught in the middle of an answer")


def test_a_prefill_leg_that_is_aborted_does_not_leave_the_target_waiting(pair):
    """All of P's places are taken, so that the leg waits there, offered but not begun, when its client leaves."""
    fillers = [pair._pool.submit(post_completion, pair.prefill.url, prompt_of(20, seed=600 + i), 700) for i in range(8)]
    wait_for(lambda: pair.prefill.metric("vllm:num_requests_running") == 8, "P is full")
    source, target = pair.tickets()
    prompt = prompt_of(900, seed=500)
    body = {"model": "m", "prompt": prompt, "max_tokens": 1, "stream": True, "kv_transfer_params": source.as_params()}
    connection = http.client.HTTPConnection("127.0.0.1", pair.prefill.port)
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    decode = pair._pool.submit(
        post_completion, pair.decode.url, prompt, NUM_TOKENS, kv_transfer_params=target.as_params()
    )
    wait_for(lambda: pair.prefill.metric("vllm:num_requests_waiting") == 1, "the leg waits")
    connection.sock.close()
    status, answer = decode.result(PATIENCE_S)
    assert status == 200
    outcome = pair.registry.outcome(target.handoff)
    assert outcome.state == "recomputed", outcome
    assert not all(f.done() for f in fillers), "P had room for the leg before its client left"
    for filler in fillers:
        assert filler.result(PATIENCE_S)[0] == 200
    assert answer["choices"][0]["token_ids"] == plain(pair, prompt)


def test_many_at_once_while_p_has_room_for_few(pair):
    """More prompts than either cache holds at a time: they queue on both sides, and no block is lost."""
    prompts = [prompt_of(1900, seed=100 + i) for i in range(14)]
    sent = [pair.send(p, 4) for p in prompts]
    answers = [(p, decode.result(PATIENCE_S)) for p, (_, decode, _) in zip(prompts, sent, strict=True)]
    for prefill, _, _ in sent:
        assert prefill.result(PATIENCE_S)[0] == 200
    for prompt, (status, answer) in answers:
        assert status == 200
        assert answer["choices"][0]["token_ids"] == complete_alone(pair.decode.url, prompt, 4)
    assert {pair.registry.outcome(h).state for _, _, h in sent} <= {"delivered", "recomputed"}


def test_early_requests_leave_room_for_those_that_can_run_now(pair):
    """Admission control: what waits for handoffs holds at most 0.8 of D's blocks, so that another prompt finds some."""
    pair.prefill.signal(signal.SIGSTOP)
    try:
        prompts = [prompt_of(1900, seed=700 + i) for i in range(8)]  # 15 blocks each: all but 7 of D's 128
        sent = [pair.send(p, 1) for p in prompts]
        wait_for(lambda: pair.decode.metric("vllm:kv_cache_usage_perc") > 0.6, "D reserves blocks for them")
        plain_one = pair._pool.submit(post_completion, pair.decode.url, prompt_of(1300, seed=710), 1)
        wait_for(lambda: pair.decode.metric("vllm:num_requests_running") > 0, "the plain request runs")
        assert not any(h in pair.registry.outcomes for _, _, h in sent), "it had to wait until handoffs ended"
    finally:
        pair.prefill.signal(signal.SIGCONT)
    assert plain_one.result(PATIENCE_S)[0] == 200
    for prefill, decode, _ in sent:
        assert decode.result(PATIENCE_S)[0] == 200
        assert prefill.result(PATIENCE_S)[0] == 200


def test_killed_source_in_the_middle_of_a_pull_then_restarted(pair):
    """kill -9 of P while D reads one prompt's blocks and waits for another's: D recomputes both at once. A new life of
    P takes handoffs again."""
    pulled, waiting = prompt_of(1900, seed=200), prompt_of(900, seed=202)
    pair.hold_flag.touch()
    try:
        _, first, first_handoff = pair.send(pulled, NUM_TOKENS)
        wait_for(pair.reading_flag.exists, "D is in the middle of a read")
        pair.prefill.signal(signal.SIGSTOP)
        usage = pair.decode.metric("vllm:kv_cache_usage_perc")
        _, second, second_handoff = pair.send(waiting, NUM_TOKENS)
        wait_for(lambda: pair.decode.metric("vllm:kv_cache_usage_perc") > usage, "D reserves blocks")
        began = time.monotonic()
        pair.prefill.kill()
        answers = [first.result(PATIENCE_S), second.result(PATIENCE_S)]
    finally:
        pair.hold_flag.unlink()
    assert [status for status, _ in answers] == [200, 200]
    assert time.monotonic() - began < 30
    for prompt, handoff, (_, answer) in zip((pulled, waiting), (first_handoff, second_handoff), answers, strict=True):
        outcome = pair.registry.outcome(handoff)
        assert (outcome.state, outcome.cause) == ("recomputed", "peer_gone"), outcome
        assert answer["choices"][0]["token_ids"] == plain(pair, prompt)
    first_life = pair.registry.reports["P"].incarnation
    pair.prefill.start()
    pair.prefill.ready()
    wait_for(lambda: pair.registry.reports["P"].incarnation != first_life, "P's new life registers")
    assert pair.complete(prompt_of(500, seed=201)).outcome.state == "delivered"


def test_killed_target_gives_the_sources_blocks_back(pair):
    """kill -9 of D while it decodes and while another request waits for its KV. Last: D stays dead."""
    _, decode, _ = pair.send(prompt_of(600, seed=300), 1200)
    source, target = pair.tickets()
    waiting = pair._pool.submit(
        post_completion, pair.decode.url, prompt_of(600, seed=301), 4, kv_transfer_params=target.as_params()
    )
    wait_for(lambda: pair.decode.metric("vllm:num_requests_running") > 0, "D decodes")
    pair.decode.kill()
    assert isinstance(decode.exception(PATIENCE_S), (OSError, http.client.HTTPException))
    assert isinstance(waiting.exception(PATIENCE_S), (OSError, http.client.HTTPException))
    complete(pair.prefill.url, prompt_of(600, seed=301), 1, kv_transfer_params=source.as_params())
    pair.prefill.wait_all_free()
