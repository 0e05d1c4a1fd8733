"""Bodies of /v1/completions and /v1/chat/completions, checked and turned into prompts and parameters."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import jinja2
import msgspec

from kvferry.connector.transformers.params import RequestError, SamplingParams
from kvferry.types import HandoffTicket, Role, ticket_from_params

DEFAULT_MAX_TOKENS = 16
DEFAULT_CHAT_TOKENS = 256
"""An answer's bound where a chat names none. All blocks are reserved at admission, so it is not the whole context."""

MAX_PROMPTS = 256


class Encoder(Protocol):
    """What is needed of a model to read a request."""

    name: str
    max_model_len: int

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]: ...


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _Body(msgspec.Struct, kw_only=True):
    """Fields of both kinds. A null means the default, as in OpenAI's API; fields that are not here are ignored."""

    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    kv_transfer_params: dict[str, Any] | None = None
    cache_salt: str | None = None


class CompletionBody(_Body, kw_only=True):
    prompt: Any = None
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


class ChatBody(_Body, kw_only=True):
    messages: list[dict[str, Any]] | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    response_format: dict[str, Any] | None = None


class Call(msgspec.Struct, kw_only=True):
    """One HTTP request, understood: a prompt in tokens for each entry of `prompts`, `params.n` answers to each."""

    chat: bool
    prompts: list[list[int]]
    params: SamplingParams
    stream: bool = False
    include_usage: bool = False
    return_token_ids: bool = False
    ticket: HandoffTicket | None = None
    cache_salt: str = ""


_B = TypeVar("_B", bound=_Body)


def read_completion(raw: bytes, encoder: Encoder, role: Role) -> Call:
    """Raises: RequestError that says which field is wrong and what it must be."""
    body = _decode(raw, CompletionBody)
    _refuse(("echo", body.echo), ("suffix", body.suffix))
    if body.best_of not in (None, body.n or 1):
        _refuse(("best_of", True))
    prompts = _prompts(body.prompt, encoder)
    return _call(body, encoder, role, prompts, chat=False, logprobs=body.logprobs)


def read_chat(raw: bytes, encoder: Encoder, role: Role) -> Call:
    """Raises: RequestError that says which field is wrong and what it must be."""
    body = _decode(raw, ChatBody)
    _refuse(("tools", body.tools))
    if body.response_format and body.response_format.get("type", "text") != "text":
        _refuse(("response_format", True))
    if not body.messages:
        raise RequestError("messages must be a list with at least one message", param="messages")
    messages = [_message(m, i) for i, m in enumerate(body.messages)]
    try:
        prompt = encoder.encode_chat(messages)
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise RequestError(f"the model's chat template refuses these messages: {error}", param="messages") from error
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    body.max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if body.max_tokens is None:
        body.max_tokens = max(1, min(DEFAULT_CHAT_TOKENS, encoder.max_model_len - len(prompt)))
    return _call(body, encoder, role, [prompt], chat=True, logprobs=logprobs)


def _decode(raw: bytes, kind: type[_B]) -> _B:
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        text = str(error)
        field = text.partition("`$.")[2].partition("`")[0].split(".")[0].split("[")[0] or None
        raise RequestError(text, param=field) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body is no JSON object: {error}") from error


def _call(
    body: _Body, encoder: Encoder, role: Role, prompts: list[list[int]], *, chat: bool, logprobs: int | None
) -> Call:
    if body.model is not None and body.model != encoder.name:
        raise RequestError(
            f"The model `{body.model}` does not exist here; this instance serves `{encoder.name}`.",
            param="model",
            code="model_not_found",
            status=404,
            kind="not_found_error",
        )
    ticket = _ticket(body.kv_transfer_params, role)
    if ticket is not None and len(prompts) != 1:
        raise RequestError(f"a handoff is for one prompt, here are {len(prompts)}", param="kv_transfer_params")
    params = _params(body, logprobs)
    if ticket is not None and ticket.side == "source":
        params = msgspec.structs.replace(params, max_tokens=1, min_tokens=0, n=1)
    return Call(
        chat=chat,
        prompts=prompts,
        params=params,
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        return_token_ids=bool(body.return_token_ids),
        ticket=ticket,
        cache_salt=body.cache_salt or "",
    )


def _params(body: _Body, logprobs: int | None) -> SamplingParams:
    bias = {}
    for token, value in (body.logit_bias or {}).items():
        if not token.isdecimal() or not -100 <= value <= 100:
            raise RequestError(
                f"logit_bias has {token!r}: {value}, expected a token id and a number from -100 to 100",
                param="logit_bias",
            )
        bias[int(token)] = value
    plain = {
        name: getattr(body, name)
        for name in (
            "min_tokens", "temperature", "top_p", "top_k", "min_p", "n", "seed", "ignore_eos", "skip_special_tokens",
            "presence_penalty", "frequency_penalty", "repetition_penalty",
        )
    }  # fmt: skip
    given = {name: value for name, value in plain.items() if value is not None}
    if given.get("top_k") == -1:
        given["top_k"] = 0
    return SamplingParams(
        max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        include_stop=bool(body.include_stop_str_in_output),
        logprobs=logprobs,
        logit_bias=bias,
        **given,
    )


def _prompts(prompt: Any, encoder: Encoder) -> list[list[int]]:
    """Text, token ids, or a list of either."""
    if isinstance(prompt, str):
        return [encoder.encode(prompt)]
    if isinstance(prompt, list) and prompt:
        if _is_tokens(prompt):
            return [prompt]
        if len(prompt) > MAX_PROMPTS:
            raise RequestError(f"{len(prompt)} prompts at once, at most {MAX_PROMPTS} are taken", param="prompt")
        if all(isinstance(p, str) for p in prompt):
            return [encoder.encode(p) for p in prompt]
        if all(_is_tokens(p) for p in prompt):
            return prompt
    raise RequestError(
        "prompt must be a text, a list of texts, a list of token ids, or a list of lists of token ids, none empty",
        param="prompt",
    )


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(t) is int for t in value)


def _message(message: dict[str, Any], index: int) -> dict[str, Any]:
    """A message whose content is plain text; a list of text parts is joined."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise RequestError(f"messages[{index}] has no role", param=f"messages[{index}].role")
    if isinstance(content, list):
        parts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else None for p in content]
        if any(not isinstance(p, str) for p in parts):
            raise RequestError(
                f"messages[{index}] has a part that is no text; this model reads text only",
                param=f"messages[{index}].content",
            )
        content = "".join(str(p) for p in parts)
    if not isinstance(content, str):
        raise RequestError(f"messages[{index}] has no content", param=f"messages[{index}].content")
    return {**message, "content": content}


def _ticket(params: dict[str, Any] | None, role: Role) -> HandoffTicket | None:
    try:
        ticket = ticket_from_params(params)
    except msgspec.ValidationError as error:
        raise RequestError(f"kv_transfer_params is no ticket: {error}", param="kv_transfer_params") from error
    if ticket is None:
        return None
    able = {"prefill": ("source",), "decode": ("target",), "both": ("source", "target")}[role]
    if ticket.side not in able:
        raise RequestError(
            f"this instance's role is {role}, it cannot be the {ticket.side} of a handoff; send the request to an "
            "instance of the other role",
            param="kv_transfer_params",
            code="wrong_role",
            status=409,
        )
    return ticket


def _refuse(*fields: tuple[str, Any]) -> None:
    for name, value in fields:
        if value:
            raise RequestError(f"{name} is not supported by this engine; leave it out", param=name, code="unsupported")
