"""What a client may ask of sampling. Values only; `sampling.py` carries them out."""

from __future__ import annotations

import msgspec


class RequestError(Exception):
    """A request that cannot be served as it is, in OpenAI's terms.

    `status` is the HTTP status, `kind` the error's `type`, `code` and `param` its fields of that name.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        kind: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How one prompt's answers are drawn. `logprobs` is the number of alternatives told for each token."""

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    skip_special_tokens: bool = True

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5

    def check(self, vocab_size: int) -> None:
        """Raises: RequestError that names the parameter, what was seen and what is possible."""
        bounds: tuple[tuple[str, float, float, float], ...] = (
            ("max_tokens", self.max_tokens, 1, 2**31),
            ("min_tokens", self.min_tokens, 0, self.max_tokens),
            ("temperature", self.temperature, 0, 2),
            ("top_k", self.top_k, 0, 2**31),
            ("min_p", self.min_p, 0, 1),
            ("n", self.n, 1, 128),
            ("presence_penalty", self.presence_penalty, -2, 2),
            ("frequency_penalty", self.frequency_penalty, -2, 2),
        )
        for name, value, low, high in bounds:
            if not low <= value <= high:
                raise RequestError(f"{name} is {value}, it must be from {low} to {high}", param=name)
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p is {self.top_p}, it must be above 0 and at most 1", param="top_p")
        if not 0 < self.repetition_penalty <= 10:
            raise RequestError(
                f"repetition_penalty is {self.repetition_penalty}, it must be above 0 and at most 10",
                param="repetition_penalty",
            )
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise RequestError(f"logprobs is {self.logprobs}, it must be from 0 to 20", param="logprobs")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise RequestError("seed must fit 64 bits", param="seed")
        if len(self.stop) > 16 or any(not s for s in self.stop):
            raise RequestError("stop takes at most 16 strings, none of them empty", param="stop")
        for name, tokens in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            foreign = [t for t in tokens if not 0 <= t < vocab_size]
            if foreign:
                raise RequestError(
                    f"{name} names token {foreign[0]}, this model has tokens 0 to {vocab_size - 1}", param=name
                )
