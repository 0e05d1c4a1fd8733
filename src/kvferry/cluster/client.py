"""A streaming client for OpenAI's completions, small enough to show what comes over the wire."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from kvferry.errors import PeerGone, WireError

OUTCOME_COMMENT = ": kvferry-outcome "
"""Begins the comment line in an event stream by which the router tells how the handoff ended."""


@dataclass
class Answer:
    """One streamed answer. `token_ids` are the engine's own, `outcome` the router's word about the handoff."""

    request_id: str
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    num_prompt_tokens: int = 0
    finish_reason: str | None = None
    outcome: str | None = None
    ttft_s: float | None = None
    total_s: float = 0.0
    error: str | None = None
    arrivals_s: list[float] = field(default_factory=list)
    """When each piece with tokens came, in seconds after the request was sent."""


async def stream_answer(
    session: aiohttp.ClientSession,
    url: str,
    path: str,
    body: dict[str, Any],
    *,
    request_id: str,
    show: Callable[[str], None] = lambda text: None,
) -> Answer:
    """Post one request with `stream` and gather its answer; an HTTP or stream error is in the answer's `error`.

    Args:
        show: gets each piece of text as it arrives.
    Raises:
        PeerGone: the server can't be reached or the connection broke.
        WireError: a line that is no event.
    """
    answer = Answer(request_id)
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
    sent_s = time.monotonic()
    try:
        async with session.post(url + path, json=asked, headers={"x-request-id": request_id}) as response:
            if response.status != 200:
                answer.error = f"HTTP {response.status}: {(await response.text())[:500]}"
            else:
                async for line in response.content:
                    _take_line(answer, line.decode().rstrip("\r\n"), sent_s, show)
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise PeerGone(f"{url}{path} broke off: {error or type(error).__name__}", request_id=request_id) from error
    answer.total_s = time.monotonic() - sent_s
    return answer


def _take_line(answer: Answer, line: str, sent_s: float, show: Callable[[str], None]) -> None:
    if line.startswith(OUTCOME_COMMENT):
        answer.outcome = line.removeprefix(OUTCOME_COMMENT)
        return
    if not line or line.startswith(":") or line == "data: [DONE]":
        return
    if not line.startswith("data: "):
        raise WireError(f"no event but {line[:100]!r} in the stream", request_id=answer.request_id)
    event = msgspec.json.decode(line.removeprefix("data: "))
    if "error" in event:
        answer.error = str(event["error"].get("message", event["error"]))
    if event.get("usage"):
        answer.num_prompt_tokens = event["usage"]["prompt_tokens"]
    for choice in event.get("choices", ()):
        text = choice.get("text") or choice.get("delta", {}).get("content") or ""
        token_ids = choice.get("token_ids") or []
        if text or token_ids:
            answer.arrivals_s.append(time.monotonic() - sent_s)
            answer.ttft_s = answer.arrivals_s[0]
        answer.text += text
        answer.token_ids += token_ids
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
        if text:
            show(text)
