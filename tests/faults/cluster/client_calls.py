"""What the official OpenAI client, unmodified, asks of a real cluster: each function is one check.

Greedy answers are the same however they are asked for, so each call's answer can be compared with another's.
"""

from __future__ import annotations

import json

import openai
import pytest
from openai.types.chat import ChatCompletionUserMessageParam

MODEL = "kvferry-demo"
MESSAGES: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": "What does 🚢 mean?"}]
POEM = "床前明月光，"


def completion(client: openai.OpenAI) -> None:
    raw = client.completions.with_raw_response.create(model=MODEL, prompt=POEM, max_tokens=40, temperature=0)
    outcome, answer = raw.headers["x-kvferry-outcome"], raw.parse()
    assert outcome.startswith("delivered; tokens_computed=1; bytes="), outcome
    assert raw.headers["content-type"] == "application/json"
    assert answer.model == MODEL and answer.object == "text_completion" and answer.choices[0].finish_reason
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(POEM.encode()), 40)
    assert answer.usage.total_tokens == len(POEM.encode()) + 40

    stream = client.completions.create(
        model=MODEL, prompt=POEM, max_tokens=40, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == answer.choices[0].text
    (usage,) = [chunk.usage for chunk in chunks if chunk.usage is not None]
    assert usage.total_tokens == answer.usage.total_tokens and not chunks[-1].choices
    assert "length" in {chunk.choices[0].finish_reason for chunk in chunks if chunk.choices}


def chat(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_completion_tokens=24, temperature=0)
    assert whole.object == "chat.completion" and whole.choices[0].message.role == "assistant"
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_completion_tokens=24, temperature=0, stream=True
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content != ""


def several_answers(client: openai.OpenAI) -> None:
    raw = client.completions.with_raw_response.create(model=MODEL, prompt="A ferry", n=3, max_tokens=16, seed=7)
    answer = raw.parse()
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) > 1
    assert answer.usage is not None and answer.usage.completion_tokens == 48
    assert raw.headers["x-kvferry-outcome"] == "delivered; cause=n_above_one; path=direct"
    again = client.completions.create(model=MODEL, prompt="A ferry", n=3, max_tokens=16, seed=7)
    assert [c.text for c in again.choices] == [c.text for c in answer.choices]


def stop(client: openai.OpenAI) -> None:
    text = client.completions.create(model=MODEL, prompt="What is a ferry?", max_tokens=30, temperature=0)
    whole = text.choices[0].text
    word = whole[10:14]
    stopped = client.completions.create(
        model=MODEL, prompt="What is a ferry?", max_tokens=30, temperature=0, stop=[word, "never said"]
    )
    assert stopped.choices[0].text == whole[: whole.index(word)] and stopped.choices[0].finish_reason == "stop"


def logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="A ferry", max_tokens=5, temperature=0, logprobs=2)
    told = answer.choices[0].logprobs
    assert told is not None and told.token_logprobs and told.top_logprobs and told.tokens
    assert len(told.token_logprobs) == len(told.top_logprobs) == len(told.tokens) == 5
    assert "".join(told.tokens) == answer.choices[0].text
    for logprob, top in zip(told.token_logprobs, told.top_logprobs, strict=True):
        assert len(top) == 2 and logprob == max(top.values()) <= 0
    chatted = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_completion_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    content = chatted.choices[0].logprobs
    assert content is not None and content.content is not None and len(content.content) == 5
    assert all(len(t.top_logprobs) == 3 and t.logprob == t.top_logprobs[0].logprob for t in content.content)


def several_prompts(client: openai.OpenAI) -> None:
    prompts = ["A ferry", "请背诵", "The river"]
    raw = client.completions.with_raw_response.create(model=MODEL, prompt=prompts, max_tokens=12, temperature=0)
    answer = raw.parse()
    one_by_one = [client.completions.create(model=MODEL, prompt=p, max_tokens=12, temperature=0) for p in prompts]
    assert [c.text for c in answer.choices] == [one.choices[0].text for one in one_by_one]
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert raw.headers["x-kvferry-outcome"].count("delivered; tokens_computed=") == 3
    assert answer.usage is not None and answer.usage.prompt_tokens == sum(len(p.encode()) for p in prompts)

    ids = [list(p.encode()) for p in prompts]  # The demo's model is one of bytes.
    by_ids = client.completions.create(model=MODEL, prompt=ids, max_tokens=12, temperature=0)
    assert [c.text for c in by_ids.choices] == [c.text for c in answer.choices]
    first = client.completions.create(model=MODEL, prompt=ids[0], max_tokens=12, temperature=0)
    assert first.choices[0].text == answer.choices[0].text


def errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model=MODEL, prompt="a", max_tokens=1_000_000)
    assert too_long.value.code == "context_length_exceeded" and too_long.value.param == "max_tokens"
    with pytest.raises(openai.BadRequestError) as hot:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=3)
    assert hot.value.param == "temperature" and hot.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="another", prompt="a")
    assert unknown.value.code == "model_not_found" and MODEL in unknown.value.message
    with pytest.raises(openai.BadRequestError) as own_ticket:
        client.completions.create(model=MODEL, prompt="a", extra_body={"kv_transfer_params": {}})
    assert own_ticket.value.param == "kv_transfer_params"


def looking_in(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL

    def get(path: str) -> str:
        return client.get(f"{str(client.base_url).removesuffix('/v1/')}{path}", cast_to=str)

    assert json.loads(get("/health")) == {"status": "ok"} and json.loads(get("/ready")) == {"status": "ready"}
    assert 'kvferry_requests_total{cause="",stage="",state="delivered"}' in get("/metrics")
    open_one = client.completions.create(model=MODEL, prompt="A", max_tokens=400, temperature=1, stream=True)
    next(iter(open_one))
    (seen,) = json.loads(get("/debug/handoffs"))["requests"]
    open_one.close()
    assert (seen["prefill"], seen["decode"]) == ("prefill-0", "decode-0") and len(seen["handoff"]) == 32
    assert seen["stage"] == "streaming" and 0 < seen["age_s"] < seen["deadline_s"]


CHECKS = (completion, chat, several_answers, stop, logprobs, several_prompts, errors, looking_in)
