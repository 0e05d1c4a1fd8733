"""Real vLLM with a pool: a cache that outlives the engines, alone and with handoffs."""

import signal
import time

import pytest
from serving import BLOCK, PATIENCE_S, PATIENT, Pair, Server, complete, kv_config, post_completion, prompt_of, wait_for

NUM_TOKENS = 16
WAIT_S = 8.0
POOL = {"pool_wait_s": WAIT_S, "pool_deadline_s": WAIT_S}
LENGTHS = (129, 300, 1000, 1900)
# No seed of hashes from the environment: the connector sees to it that all processes name a block alike.
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONHASHSEED": None}
LOADED, HITS = "vllm:kvferry_pool_loaded_blocks_total", "vllm:external_prefix_cache_hits_total"


def pool_config(node, **extra):
    return {
        "kv_connector": "KVFerryConnector",
        "kv_connector_module_path": "kvferry.connector.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"pool": node.address, **POOL, **extra},
    }


def loadable(num_tokens):
    """Blocks of a prompt that can be loaded: full ones that do not hold its last token."""
    return (num_tokens - 1) // BLOCK


def wait_until_used_again(server, prompt):
    """The pool serves this prompt (again), which is asked until it does."""
    loaded = server.metric(LOADED)

    def is_loaded():
        server.forget_prefixes()
        complete(server.url, prompt, NUM_TOKENS)
        server.wait_all_free()
        return server.metric(LOADED) > loaded

    wait_for(is_loaded, "the pool is used again")


class Talk:
    """A prompt, the reference's answer to it, and the next turn, which begins with both."""

    def __init__(self, single, seed):
        self.prompt = prompt_of(100, seed)
        self.answer = complete(single.url, self.prompt, 200)
        self.next_turn = [*self.prompt, *self.answer, *prompt_of(20, seed + 1)]


@pytest.fixture(scope="module")
def single(model_path, logs):
    server = Server("single", model_path("llama"), logs)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    return tmp_path_factory.mktemp("flags")


@pytest.fixture(scope="module")
def filled(single, model_path, logs, pool_node):
    """The pool after an instance without router or handoffs has computed prompts, and was killed; and a talk."""
    first = Server("first", model_path("llama"), logs, kv=pool_config(pool_node), environment=ENVIRONMENT)
    try:
        single.ready()
        first.ready()
        talk = Talk(single, seed=50)
        for i, length in enumerate(LENGTHS):
            prompt = prompt_of(length, seed=i + 1)
            assert complete(first.url, prompt, NUM_TOKENS) == complete(single.url, prompt, NUM_TOKENS)
        assert complete(first.url, talk.prompt, len(talk.answer)) == talk.answer
        first.wait_all_free()
        # The talk's 300 tokens but the last one were computed: two blocks, mostly of the answer's tokens.
        stored = first.metric("vllm:kvferry_pool_saved_blocks_total")
        assert stored == sum(length // BLOCK for length in LENGTHS) + 2
        first.kill()
    finally:
        first.stop()
    return talk


@pytest.fixture(scope="module")
def pair(filled, registry, model_path, logs, pool_node, flags):
    """A fresh prefill and a fresh decode instance with that pool."""
    environment = {**ENVIRONMENT, "KVFERRY_TEST_FLAGS": str(flags)}
    settings = {**PATIENT, **POOL, "pool": pool_node.address, "on_loaded": "pool_hooks:zero_on_flag"}
    servers = [
        Server(
            name,
            model_path("llama"),
            logs,
            kv=kv_config(registry, name, **settings),
            environment=environment,
        )
        for name in ("P", "D")
    ]
    try:
        for server in servers:
            server.ready()
            complete(server.url, prompt_of(120, seed=999_999), 2)
        wait_for(lambda: {"P", "D"} <= set(registry.reports), "both instances register")
        yield Pair(registry, *servers)
    finally:
        for server in servers:
            server.stop()


@pytest.fixture
def fresh(pair):
    """An instance that has computed nothing itself; afterwards all its blocks are free."""
    pair.prefill.forget_prefixes()
    yield pair.prefill
    pair.prefill.wait_all_free()


def test_what_a_killed_instance_computed_is_loaded_by_a_fresh_one(fresh, single):
    loaded, hits = fresh.metric(LOADED), fresh.metric(HITS)
    for i, length in enumerate(LENGTHS):
        prompt = prompt_of(length, seed=i + 1)
        assert complete(fresh.url, prompt, NUM_TOKENS) == complete(single.url, prompt, NUM_TOKENS), length
    expected = sum(map(loadable, LENGTHS))
    assert fresh.metric(LOADED) - loaded == expected
    assert fresh.metric(HITS) - hits == expected * BLOCK, "vLLM counts these tokens as found, not computed"
    assert fresh.metric("vllm:kvferry_pool_loaded_bytes_total") > 0
    assert fresh.metric("vllm:kvferry_pool_load_seconds_count") >= len(LENGTHS)


def test_the_next_turn_finds_the_answer_too(fresh, single, filled):
    loaded = fresh.metric(LOADED)
    assert complete(fresh.url, filled.next_turn, NUM_TOKENS) == complete(single.url, filled.next_turn, NUM_TOKENS)
    assert fresh.metric(LOADED) - loaded == 2


def test_sixteen_at_a_time(fresh, pair, single):
    """Some share prefixes, some are in the pool, some are not."""
    prompts = [
        prompt_of(length, seed=i + 1) + prompt_of(j, seed=j) for i, length in enumerate(LENGTHS) for j in range(3)
    ]
    prompts += [prompt_of(500, seed=70 + i) for i in range(4)]
    answers = list(pair._pool.map(lambda p: post_completion(fresh.url, p, NUM_TOKENS), prompts))
    for prompt, (status, answer) in zip(prompts, answers, strict=True):
        assert status == 200, answer
        assert answer["choices"][0]["token_ids"] == complete(single.url, prompt, NUM_TOKENS)


def test_the_answer_depends_on_what_was_loaded(fresh, single, flags):
    """Zeroing what came from the pool must change the output, or the tests above could not fail."""
    prompt = prompt_of(300, seed=LENGTHS.index(300) + 1)
    (flags / "zero").touch()
    try:
        assert complete(fresh.url, prompt, NUM_TOKENS) != complete(single.url, prompt, NUM_TOKENS)
    finally:
        (flags / "zero").unlink()
    fresh.forget_prefixes()
    assert complete(fresh.url, prompt, NUM_TOKENS) == complete(single.url, prompt, NUM_TOKENS)


def test_two_salts_never_meet(fresh):
    prompt = prompt_of(400, seed=80)
    first = complete(fresh.url, prompt, NUM_TOKENS, cache_salt="tenant a")
    for salt, num_blocks in (("tenant b", 0), (None, 0), ("tenant a", 3)):
        fresh.wait_all_free()
        fresh.forget_prefixes()
        loaded = fresh.metric(LOADED)
        options = {"cache_salt": salt} if salt else {}
        assert complete(fresh.url, prompt, NUM_TOKENS, **options) == first
        assert fresh.metric(LOADED) - loaded == num_blocks, salt


def test_prefill_takes_its_prefix_from_the_pool_and_hands_all_of_it_over(fresh, pair, single):
    pair.decode.forget_prefixes()
    prompt = prompt_of(1000, seed=LENGTHS.index(1000) + 1) + prompt_of(200, seed=90)
    loaded, pulled = fresh.metric(LOADED), pair.decode.metric("vllm:kvferry_pulled_blocks_total")
    result = pair.complete(prompt, NUM_TOKENS)
    assert (result.outcome.state, result.outcome.tokens_computed) == ("delivered", 1)
    assert result.token_ids == complete(single.url, prompt, NUM_TOKENS)
    assert fresh.metric(LOADED) - loaded == 1000 // BLOCK
    assert pair.decode.metric("vllm:kvferry_pulled_blocks_total") - pulled == -(-1199 // BLOCK)
    pair.decode.wait_all_free()


def test_decode_asks_the_pool_when_the_handoff_fails(pair, single):
    pair.decode.forget_prefixes()
    prompt = prompt_of(1900, seed=LENGTHS.index(1900) + 1)
    loaded = pair.decode.metric(LOADED)
    result = pair.complete(prompt, NUM_TOKENS, deadline_s=1.0, only_decode=True)
    assert result.outcome.state == "recomputed"
    assert result.token_ids == complete(single.url, prompt, NUM_TOKENS)
    assert pair.decode.metric(LOADED) - loaded == loadable(1900)
    pair.decode.wait_all_free()


def test_a_node_that_is_stopped_is_waited_for_only_so_long(fresh, single, pool_node):
    pool_node.process.send_signal(signal.SIGSTOP)
    try:
        prompt = prompt_of(300, seed=LENGTHS.index(300) + 1)
        began = time.monotonic()
        assert complete(fresh.url, prompt, NUM_TOKENS) == complete(single.url, prompt, NUM_TOKENS)
        assert time.monotonic() - began < 6 * WAIT_S
        # What it offers to a pool that does not take it is held for as long as one save may last, not for ever.
        fresh.wait_all_free()
    finally:
        pool_node.process.send_signal(signal.SIGCONT)
    assert fresh.metric("vllm:kvferry_pool_save_failures_total") > 0
    wait_until_used_again(fresh, prompt)


def test_a_node_that_dies_in_the_middle_of_a_load_is_missed_by_nobody(fresh, pair, single, pool_node, flags):
    """The node comes back with an empty arena."""
    prompt = prompt_of(1000, seed=LENGTHS.index(1000) + 1)
    (flags / "hold").touch()
    try:
        asked = pair._pool.submit(complete, fresh.url, prompt, NUM_TOKENS)
        wait_for((flags / "reading").exists, "the load is under way")
        pool_node.kill()
        assert asked.result(PATIENCE_S) == complete(single.url, prompt, NUM_TOKENS)
    finally:
        (flags / "hold").unlink()
    fresh.wait_all_free()
    assert 'vllm:kvferry_pool_loads_total{engine="0",model_name="m",result="peer_gone"} 1.0' in fresh.page()
    # Without a node everything is computed.
    other = prompt_of(1000, seed=95)
    assert complete(fresh.url, other, NUM_TOKENS) == complete(single.url, other, NUM_TOKENS)
    pool_node.start()
    wait_until_used_again(fresh, prompt)


def test_what_lies_on_disk_is_fetched_from_the_requests_arrival_on(fresh, single, pool_node):
    """Last: the node is killed, so that what it has is on its disk only."""
    prompt = prompt_of(1900, seed=96)
    expected = complete(single.url, prompt, NUM_TOKENS)
    written = pool_node.counts().get("disk_written", 0)
    assert complete(fresh.url, prompt, NUM_TOKENS) == expected
    num_blocks = 1900 // BLOCK
    wait_for(lambda: pool_node.counts().get("disk_written", 0) >= written + num_blocks, "it is on disk")
    pool_node.kill()
    pool_node.start()
    wait_until_used_again(fresh, prompt)
    assert complete(fresh.url, prompt, NUM_TOKENS) == expected
    # A load that comes soon takes over what the prefetch has not begun.
    assert 0 < pool_node.counts()["prefetched"] <= loadable(1900)
