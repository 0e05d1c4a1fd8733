"""Requests to one vLLM instance and over pairs of them, each timed from its sending."""

from __future__ import annotations

import json
import random
import statistics
import time
import urllib.error
import urllib.request
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgspec
from vllm_instances import Registry, Server

from kvferry.types import HandoffId, HandoffTicket, new_handoff_id

Token = list[int]
ANSWER_LIMIT_S = 90


def random_prompt(rng: random.Random, num_tokens: int) -> Token:
    """Token ids that every model here has."""
    return [rng.randrange(300, 31000) for _ in range(num_tokens)]


def body(prompt: Token, num_tokens: int, **more: Any) -> bytes:
    options = {"temperature": 0, "ignore_eos": True, "detokenize": False, "return_token_ids": True}
    return json.dumps({"model": "m", "prompt": prompt, "max_tokens": num_tokens, **options, **more}).encode()


def post(server: Server, data: bytes) -> tuple[float, dict[str, Any]]:
    """(moment of the answer, answer). Raises: RuntimeError for an HTTP error, OSError where the server is gone."""
    request = urllib.request.Request(f"{server.url}/v1/completions", data, headers={"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_LIMIT_S) as answer:
            raw = answer.read()
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{server.name}: {error.code} {error.read().decode()[:2000]}") from error
    return time.perf_counter(), json.loads(raw)


def tokens_of(answer: dict[str, Any]) -> Token:
    return list(answer["choices"][0]["token_ids"])


def complete(server: Server, prompt: Token, num_tokens: int) -> tuple[float, Token]:
    """(seconds, tokens) of a request without a handoff."""
    data = body(prompt, num_tokens)
    began_s = time.perf_counter()
    ended_s, answer = post(server, data)
    return ended_s - began_s, tokens_of(answer)


def median_ms(values: list[float]) -> float:
    return round(statistics.median(values) * 1e3, 3)


class Measured(msgspec.Struct):
    """One request over a pair: seconds from its sending, both sides' tokens, and how the handoff ended."""

    ttft_s: float
    source_s: float
    token: Token
    source_token: Token
    note: str = ""


class KVFerryPair:
    """Both legs at once."""

    name = "kvferry"

    def __init__(self, prefill: Server, decode: Server, registry: Registry) -> None:
        self.prefill, self.decode, self._registry = prefill, decode, registry
        self._pool = ThreadPoolExecutor(16)

    def legs(self, prompt: Token, num_tokens: int, deadline_s: float = 60.0) -> tuple[HandoffId, bytes, bytes]:
        """(id, what the source gets, what the target gets) of a new handoff."""
        handoff = new_handoff_id()
        source, target = (self._registry.ref(s.name) for s in (self.prefill, self.decode))
        as_source = HandoffTicket(handoff, "source", source, target, deadline_s).as_params()
        as_target = HandoffTicket(handoff, "target", source, target, deadline_s).as_params()
        to_source = body(prompt, 1, kv_transfer_params=as_source)
        to_target = body(prompt, num_tokens, kv_transfer_params=as_target)
        return handoff, to_source, to_target

    def send(self, server: Server, data: bytes) -> Future[tuple[float, dict[str, Any]]]:
        return self._pool.submit(post, server, data)

    def request(self, prompt: Token, num_tokens: int = 1) -> Measured:
        """With more than one token, `ttft_s` is the time to the last of them."""
        handoff, to_source, to_target = self.legs(prompt, num_tokens)
        began_s = time.perf_counter()
        prefill, decode = self.send(self.prefill, to_source), self.send(self.decode, to_target)
        try:
            ended_s, answer = decode.result(ANSWER_LIMIT_S)
        except RuntimeError as error:
            raise RuntimeError(f"{error}: {self.how_it_ended(handoff)}") from error
        source_s, source_answer = prefill.result(ANSWER_LIMIT_S)
        note = self.how_it_ended(handoff)
        return Measured(ended_s - began_s, source_s - began_s, tokens_of(answer), tokens_of(source_answer), note)

    def how_it_ended(self, handoff: HandoffId) -> str:
        outcome = self._registry.outcome(handoff)
        if outcome is None:
            return "no outcome"
        return f"{outcome.as_header()}; {outcome.transport}; {outcome.duration_s * 1e3:.1f} ms"


class NixlPair:
    """First the prefill leg, then the decode leg with what the first one answered, as NixlConnector wants it."""

    name = "nixl"

    def __init__(self, prefill: Server, decode: Server) -> None:
        self.prefill, self.decode = prefill, decode

    def request(self, prompt: Token) -> Measured:
        keys = ("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")
        ask = {"do_remote_decode": True, "do_remote_prefill": False, **dict.fromkeys(keys)}
        data = body(prompt, 1, kv_transfer_params=ask)
        began_s = time.perf_counter()
        source_s, source = post(self.prefill, data)
        ended_s, answer = post(self.decode, body(prompt, 1, kv_transfer_params=source["kv_transfer_params"]))
        return Measured(ended_s - began_s, source_s - began_s, tokens_of(answer), tokens_of(source))


Pair = KVFerryPair | NixlPair
