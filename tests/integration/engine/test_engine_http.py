"""The HTTP server of one instance, over real sockets, with plain HTTP and with the official client."""

import asyncio
import contextlib
import io
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp import web
from tests_engine_support import Driver, ticket

from kvferry.connector.transformers.metrics import EngineMetrics
from kvferry.connector.transformers.model import LoadedModel
from kvferry.connector.transformers.openai.app import OpenAIServer
from kvferry.connector.transformers.snapshot import EngineSnapshot
from kvferry.types import Incarnation, new_handoff_id

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


class Instance:
    def __init__(self, driver: Driver, url: str, session: aiohttp.ClientSession) -> None:
        self.engine, self.url, self.session = driver.engine, url, session
        self.client = openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0)

    async def post(self, path: str, **body: Any) -> dict[str, Any]:
        async with self.session.post(self.url + path, json=body) as response:
            assert response.status == 200, await response.text()
            return await response.json()

    async def error(self, path: str, body: Any, status: int = 400) -> dict[str, Any]:
        data = io.BytesIO(body if isinstance(body, bytes) else json.dumps(body).encode())
        async with self.session.post(self.url + path, data=data) as response:
            answer = await response.json()
            assert response.status == status, answer
            assert set(answer["error"]) == {"message", "type", "param", "code"}
            return answer["error"]

    async def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The events of a stream; each of its lines must be one that clients understand."""
        async with self.session.post(self.url + path, json={**body, "stream": True}) as response:
            assert response.status == 200, await response.text()
            assert response.content_type == "text/event-stream"
            raw = (await response.read()).decode()
        *events, done, rest = raw.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        assert all(e.startswith("data: {") for e in events)
        return [json.loads(e.removeprefix("data: ")) for e in events]

    async def until_empty(self) -> None:
        """Until every block is free again."""
        await self.until(lambda now: now.free_blocks == now.num_blocks)

    async def until(self, condition: Callable[[EngineSnapshot], bool]) -> None:
        end = time.monotonic() + 30.0
        while not condition(self.engine.snapshot):
            assert time.monotonic() < end, self.engine.snapshot
            await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def serve(loaded: LoadedModel, **overrides: Any) -> AsyncIterator[Instance]:
    driver = Driver(loaded, **overrides)
    metrics = EngineMetrics()
    server = OpenAIServer(
        driver.engine,
        incarnation=Incarnation(77),
        render_metrics=lambda: metrics.render(driver.engine.snapshot),
        debug_kv=lambda: {"free_blocks": driver.engine.snapshot.free_blocks},
    )
    # Requests carry the clock of the server, so the engine must have the same.
    driver.engine._clock = time.monotonic
    runner = web.AppRunner(server.make_app(), handler_cancellation=True, access_log=None, shutdown_timeout=2.0)
    driver.engine.start()
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    async with aiohttp.ClientSession() as session:
        instance = Instance(driver, f"http://{host}:{port}", session)
        try:
            yield instance
        finally:
            await instance.client.close()
            driver.engine.close()
            await runner.cleanup()


@pytest.fixture
async def instance(loaded: LoadedModel) -> AsyncIterator[Instance]:
    async with serve(loaded) as started:
        yield started


async def test_completion_of_text_lists_and_token_ids(instance: Instance, loaded: LoadedModel) -> None:
    text = "Über die Wörter 你好 👋"
    one = await instance.post(TEXT, prompt=text, temperature=0, max_tokens=8, return_token_ids=True)
    assert one["object"] == "text_completion" and one["model"] == loaded.name
    assert one["usage"]["prompt_tokens"] == len(text.encode())
    assert one["usage"]["completion_tokens"] == len(one["choices"][0]["token_ids"]) == 8
    assert one["choices"][0]["prompt_token_ids"] == loaded.encode(text)
    by_tokens = await instance.post(
        TEXT, prompt=loaded.encode(text), temperature=0, max_tokens=8, return_token_ids=True
    )
    assert by_tokens["choices"][0]["token_ids"] == one["choices"][0]["token_ids"]
    several = await instance.post(TEXT, prompt=[text, "b"], n=2, temperature=0, max_tokens=8, return_token_ids=True)
    assert [c["index"] for c in several["choices"]] == [0, 1, 2, 3]
    assert several["choices"][1]["token_ids"] == one["choices"][0]["token_ids"]
    lists = await instance.post(TEXT, prompt=[[1, 2], [3]], temperature=0, max_tokens=2)
    assert [c["finish_reason"] for c in lists["choices"]] == ["length", "length"]


async def test_stream_and_whole_answer_are_the_same_text(instance: Instance) -> None:
    for path, prompt in ((TEXT, {"prompt": "abc"}), (CHAT, {"messages": [{"role": "user", "content": "abc"}]})):
        body = {**prompt, "seed": 3, "max_tokens": 40, "return_token_ids": True, "n": 2, "logprobs": 1}
        body["logprobs"] = True if path == CHAT else 1
        whole = await instance.post(path, **body)
        events = await instance.stream(path, **body, stream_options={"include_usage": True})
        assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == 80
        assert all(e["id"] == events[0]["id"] for e in events)
        for choice in whole["choices"]:
            parts = [c for e in events for c in e["choices"] if c["index"] == choice["index"]]
            text = "".join(c["delta"].get("content", "") if path == CHAT else c["text"] for c in parts)
            assert text == (choice["message"]["content"] if path == CHAT else choice["text"])
            assert [t for c in parts for t in c.get("token_ids", [])] == choice["token_ids"]
            assert [c["finish_reason"] for c in parts][-1] == "length"
            logprobs = choice["logprobs"]["content"] if path == CHAT else choice["logprobs"]["tokens"]
            assert len(logprobs) == 40
        if path == CHAT:
            assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}


async def test_official_client(instance: Instance, loaded: LoadedModel) -> None:
    client = instance.client
    assert [m.id async for m in client.models.list()] == [loaded.name]
    done = await client.completions.create(model=loaded.name, prompt="x", max_tokens=5, temperature=0, logprobs=2)
    assert done.choices[0].finish_reason == "length"
    assert done.choices[0].logprobs is not None and len(done.choices[0].logprobs.token_logprobs or []) == 5
    messages: Any = [
        {"role": "system", "content": "short"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "!"}]},
    ]
    chat = await client.chat.completions.create(
        model=loaded.name, messages=messages, max_completion_tokens=5, logprobs=True, top_logprobs=3, seed=1
    )
    assert chat.usage is not None and chat.usage.completion_tokens == 5
    content = chat.choices[0].logprobs
    assert content is not None and content.content is not None and len(content.content[0].top_logprobs) == 3
    text = ""
    stream = await client.chat.completions.create(
        model=loaded.name, messages=messages, max_tokens=5, seed=1, stream=True
    )
    async for event in stream:
        text += event.choices[0].delta.content or ""
    assert text == chat.choices[0].message.content
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        await client.completions.create(model="other", prompt="x")


async def test_stop_strings_hide_themselves(instance: Instance) -> None:
    whole = (await instance.post(TEXT, prompt="q", seed=9, max_tokens=60))["choices"][0]["text"]
    stop = whole[20:23]
    at = whole.index(stop)
    cut = await instance.post(TEXT, prompt="q", seed=9, max_tokens=60, stop=["@@never@@", stop])
    assert cut["choices"][0]["text"] == whole[:at]
    assert (cut["choices"][0]["finish_reason"], cut["choices"][0]["stop_reason"]) == ("stop", stop)
    events = await instance.stream(TEXT, prompt="q", seed=9, max_tokens=60, stop=stop)
    assert "".join(e["choices"][0]["text"] for e in events) == whole[:at]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"not json", None),
        (b"[1]", None),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({}, "prompt"),
        ({"prompt": "a", "max_tokens": "many"}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 100000}, "max_tokens"),
        ({"prompt": "a" * 3000}, "prompt"),
        ({"prompt": "a", "temperature": 3}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "stop": ["", "b"]}, "stop"),
        ({"prompt": "a", "logprobs": 100}, "logprobs"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "kv_transfer_params": {"kvferry": {"handoff": 1}}}, "kv_transfer_params"),
    ],
)
async def test_bad_completions_are_refused_with_the_field_named(instance: Instance, body: Any, param: str) -> None:
    error = await instance.error(TEXT, body)
    assert error["type"] == "invalid_request_error" and error["param"] == param and error["message"]
    assert instance.engine.snapshot.free_blocks == instance.engine.snapshot.num_blocks


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, "top_logprobs"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "tools"),
    ],
)
async def test_bad_chats_are_refused_with_the_field_named(instance: Instance, body: Any, param: str) -> None:
    assert (await instance.error(CHAT, body))["param"] == param


async def test_context_length_and_unknown_paths_have_their_codes(instance: Instance) -> None:
    assert (await instance.error(TEXT, {"prompt": "a" * 2049}))["code"] == "context_length_exceeded"
    assert (await instance.error(TEXT, {"prompt": "a", "model": "x"}, 404))["code"] == "model_not_found"
    await instance.error("/v1/embeddings", {}, 404)
    await instance.error("/health", {}, 405)
    await instance.error(TEXT, b"x" * (17 << 20), 413)


async def test_tickets_for_another_life_or_without_a_node_are_refused(instance: Instance) -> None:
    params = ticket("target", new_handoff_id()).as_params()
    error = await instance.error(TEXT, {"prompt": "a", "kv_transfer_params": params})
    assert "no handoff" in error["message"]
    params["kvferry"]["target"]["incarnation"] = 5
    error = await instance.error(TEXT, {"prompt": "a", "kv_transfer_params": params}, 409)
    assert error["code"] == "stale_incarnation"


async def test_a_prefill_instance_refuses_the_targets_side(loaded: LoadedModel) -> None:
    async with serve(loaded, role="prefill") as prefill:
        params = ticket("target", new_handoff_id()).as_params()
        error = await prefill.error(TEXT, {"prompt": "a", "kv_transfer_params": params}, 409)
        assert error["code"] == "wrong_role"


async def test_overload_is_503(loaded: LoadedModel) -> None:
    async with serve(loaded, num_blocks=8, max_waiting=1) as small:
        body = {"prompt": "a", "max_tokens": 120, "ignore_eos": True, "stream": True}
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(2):
                await stack.enter_async_context(_begin(small, body, wait=_ == 0))
            await small.until(lambda now: now.waiting == 1)
            error = await small.error(TEXT, body, 503)
        assert error["code"] == "overloaded" and error["type"] == "server_error"
        await small.until_empty()


@contextlib.asynccontextmanager
async def _begin(instance: Instance, body: dict[str, Any], *, wait: bool) -> AsyncIterator[None]:
    """A request that is cut off at the end of the block; with `wait`, its first byte is awaited."""

    async def read() -> None:
        async with instance.session.post(instance.url + TEXT, json=body) as response:
            first.set()
            await response.read()

    first = asyncio.Event()
    task = asyncio.create_task(read())
    if wait:
        await first.wait()
    yield
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, aiohttp.ClientError):
        await task


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_blocks_at_once(instance: Instance, stream: bool) -> None:
    for prompt in ("a", "b" * 1500):
        body = {"prompt": prompt, "max_tokens": 400, "ignore_eos": True, "stream": stream, "n": 2}
        before = instance.engine.snapshot.generated_tokens
        async with _begin(instance, body, wait=stream):
            await instance.until(lambda now: now.running > 0)
            assert instance.engine.snapshot.free_blocks < instance.engine.snapshot.num_blocks
        await instance.until_empty()
        assert instance.engine.snapshot.generated_tokens - before < 2 * 400
        assert instance.engine.snapshot.running == instance.engine.snapshot.waiting == 0


async def test_health_metrics_and_debug(instance: Instance, loaded: LoadedModel) -> None:
    await instance.post(TEXT, prompt="abc", max_tokens=4, temperature=0)
    await instance.until_empty()
    async with instance.session.get(instance.url + "/health") as response:
        assert response.status == 200
    async with instance.session.get(instance.url + "/metrics") as response:
        text = await response.text()
    assert 'kvferry_engine_tokens_total{phase="decode"} 4.0' in text
    assert 'kvferry_engine_tokens_total{phase="prefill"} 3.0' in text
    assert 'kvferry_kv_blocks{use="free"} 512.0' in text
    async with instance.session.get(instance.url + "/debug/kv") as response:
        assert (await response.json())["free_blocks"] == 512
    instance.engine.close()
    async with instance.session.get(instance.url + "/health") as response:
        assert response.status == 503
    assert (await instance.error(TEXT, {"prompt": "a"}, 503))["code"] == "unhealthy"


async def test_requests_in_progress_end_with_an_honest_error_when_the_engine_stops(
    instance: Instance,
) -> None:
    async with instance.session.post(
        instance.url + TEXT, json={"prompt": "a", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    ) as response:
        await response.content.readany()
        await asyncio.to_thread(instance.engine.close)
        raw = (await response.read()).decode()
    assert '"error":{"message":"the instance is stopping"' in raw and raw.endswith("data: [DONE]\n\n")


async def test_many_at_once_each_get_their_own_answer(
    loaded: LoadedModel, prompts: list[list[int]], reference: list[tuple[list[int], Any]], driver: Callable[..., Any]
) -> None:
    async with serve(loaded, num_blocks=128) as busy:
        answers = await asyncio.gather(
            *(
                busy.post(
                    TEXT, prompt=prompts[i % 7], temperature=0, max_tokens=24, ignore_eos=True, return_token_ids=True
                )
                for i in range(16)
            )
        )
        assert [a["choices"][0]["token_ids"] for a in answers] == [reference[i % 7][0] for i in range(16)]
        await busy.until_empty()
