"""What the router must know of a client's request, and the bodies that it sends to the two legs. Pure.

The decode leg gets the client's bytes as they are, with one member more at the front of the object. Only the prefill
leg's body is written anew: its one token is thrown away.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from kvferry.router.errors import BadRequest
from kvferry.types import HandoffTicket

Endpoint = Literal["/v1/completions", "/v1/chat/completions"]
ENDPOINTS: tuple[Endpoint, ...] = ("/v1/completions", "/v1/chat/completions")
MAX_PROMPTS = 1024

_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_list_decoder = msgspec.json.Decoder(list[msgspec.Raw])
_TRANSFER_PARAMS = "kv_transfer_params"
_NOT_FOR_PREFILL = frozenset(
    {
        "stream_options",
        "n",
        "best_of",
        "logprobs",
        "top_logprobs",
        "prompt_logprobs",
        "echo",
        "min_tokens",
        "max_completion_tokens",
    }
)


class ApiRequest(msgspec.Struct):
    """A client's completion request. `prompts` has the raw prompts where the router splits the request, else none.

    `direct_reason` is not empty where the request must be served by one instance alone.
    """

    endpoint: Endpoint
    body: bytes
    fields: dict[str, msgspec.Raw]
    stream: bool
    model: str | None
    direct_reason: str
    prompts: tuple[msgspec.Raw, ...] = ()

    def part(self, prompt: msgspec.Raw) -> ApiRequest:
        """The request for one of several prompts."""
        fields = {**self.fields, "prompt": prompt}
        return ApiRequest(
            self.endpoint, msgspec.json.encode(fields), fields, self.stream, self.model, self.direct_reason
        )


def parse(endpoint: Endpoint, body: bytes) -> ApiRequest:
    """Look at a request's body. What only the instance can judge is left to it.

    Raises: BadRequest.
    """
    try:
        fields = _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the body is no JSON object: {error}") from error
    if _TRANSFER_PARAMS in fields:
        raise BadRequest(
            f"{_TRANSFER_PARAMS} is set by the router, which picks the pair of instances; leave it out",
            param=_TRANSFER_PARAMS,
        )
    stream = _field(fields, "stream", bool, False)
    model = _field(fields, "model", str, None)
    n = _field(fields, "n", int, 1)
    prompts: tuple[msgspec.Raw, ...] = ()
    if endpoint == "/v1/completions":
        prompts = _several_prompts(fields)
    direct_reason = _direct_reason(fields, n)
    if len(prompts) > 1 and (stream or direct_reason):
        # Merging would have to write the stream's events anew (their index), so one instance answers it all.
        direct_reason = direct_reason or "many_prompts_streamed"
    if direct_reason or len(prompts) == 1:
        prompts = ()
    return ApiRequest(endpoint, body, fields, stream, model, direct_reason, prompts)


def decode_body(request: ApiRequest, ticket: HandoffTicket | None) -> bytes:
    """The client's bytes, with the ticket as the first member where there is one."""
    if ticket is None:
        return request.body
    start = request.body.index(b"{") + 1
    member = b'"%b":%b' % (_TRANSFER_PARAMS.encode(), msgspec.json.encode(ticket.as_params()))
    return b"".join((b"{", member, b"," if request.fields else b"", memoryview(request.body)[start:]))


def prefill_body(request: ApiRequest, ticket: HandoffTicket, *, stream: bool = False) -> bytes:
    """The same prompt, one token; `stream`: as events, for a client that shall see it."""
    fields: dict[str, Any] = {k: v for k, v in request.fields.items() if k not in _NOT_FOR_PREFILL}
    fields["max_tokens"] = 1
    if "max_completion_tokens" in request.fields:
        fields["max_completion_tokens"] = 1
    fields["stream"] = stream
    fields[_TRANSFER_PARAMS] = ticket.as_params()
    return msgspec.json.encode(fields)


def merge_answers(bodies: list[bytes]) -> bytes:
    """One answer out of those for several prompts: choices in order, usage summed.

    Raises: msgspec.MsgspecError, KeyError, TypeError if one is no completion.
    """
    answers = [msgspec.json.decode(body, type=dict[str, Any]) for body in bodies]
    merged = dict(answers[0])
    merged["choices"] = [
        {**choice, "index": at} for at, choice in enumerate(c for answer in answers for c in answer["choices"])
    ]
    usages = [answer["usage"] for answer in answers if answer.get("usage")]
    if usages:
        counted = {key for usage in usages for key, value in usage.items() if isinstance(value, int)}
        merged["usage"] = {**usages[0], **{key: sum(u.get(key) or 0 for u in usages) for key in counted}}
    return msgspec.json.encode(merged)


def _field(fields: dict[str, msgspec.Raw], name: str, kind: type, default: Any) -> Any:
    raw = fields.get(name)
    if raw is None:
        return default
    try:
        value = msgspec.json.decode(raw, type=kind | None)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadRequest(f"{name}: {error}", param=name) from error
    return default if value is None else value


def _several_prompts(fields: dict[str, msgspec.Raw]) -> tuple[msgspec.Raw, ...]:
    """The prompts of a list of prompts; none for a text, a list of token ids, or what the instance must judge."""
    raw = fields.get("prompt")
    if raw is None or bytes(raw)[:1] != b"[":
        return ()
    inner = bytes(raw)[1:].lstrip()[:1]
    if inner not in (b'"', b"["):
        return ()
    prompts = tuple(_list_decoder.decode(raw))
    if len(prompts) > MAX_PROMPTS:
        raise BadRequest(f"prompt: {len(prompts)} prompts in one request; at most {MAX_PROMPTS}", param="prompt")
    return prompts


def _direct_reason(fields: dict[str, msgspec.Raw], n: int) -> str:
    """Why one instance must do it all: a handoff carries one prompt's KV to one sequence, and no prompt logits."""
    best_of = fields.get("best_of")
    if n > 1 or (best_of is not None and bytes(best_of) not in (b"null", b"1")):
        return "n_above_one"
    if _is_set(fields, "prompt_logprobs") or (_is_set(fields, "echo") and _is_set(fields, "logprobs")):
        return "prompt_logprobs"
    return "beam_search" if _is_set(fields, "use_beam_search") else ""


def _is_set(fields: dict[str, msgspec.Raw], name: str) -> bool:
    raw = fields.get(name)
    return raw is not None and bytes(raw) not in (b"null", b"false")
