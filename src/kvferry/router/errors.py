"""Errors in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from typing import Any

import msgspec

MAX_TOLD = 300
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {
    400: "bad_request",
    401: "not_authenticated",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    409: "conflict",
    411: "length_required",
    413: "request_too_large",
    414: "uri_too_long",
    429: "rate_limit_exceeded",
    431: "headers_too_large",
    500: "internal_error",
    501: "not_implemented",
    502: "bad_gateway",
    503: "service_unavailable",
    504: "gateway_timeout",
}


class BadRequest(Exception):
    """The client's request cannot be served as it is; `status` is 4xx."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> bytes:
        return error_body(self.status, str(self), param=self.param, code=self.code)


def error_object(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, object]:
    """The object of an error of this HTTP status."""
    kind = _TYPES.get(status) or ("server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code or _CODES.get(status)}}


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> bytes:
    """The JSON body of an error answer."""
    return msgspec.json.encode(error_object(status, message, param=param, code=code))


def told_by(body: bytes) -> str:
    """The message in the body of an instance's error, on one line; of another form, what the body begins with."""
    text = ""
    try:
        answer: Any = msgspec.json.decode(body)
        error = answer.get("error", answer)  # older vLLM has no member around it
        text = str(error.get("message") or "")
    except (msgspec.MsgspecError, UnicodeDecodeError, AttributeError):
        pass
    line = " ".join((text or body[: 4 * MAX_TOLD].decode(errors="replace")).split())
    return line if len(line) <= MAX_TOLD else line[:MAX_TOLD] + " …"


def error_event(status: int, message: str, *, code: str | None = None) -> bytes:
    """The server-sent event that ends a broken stream. OpenAI's clients raise it as an APIError."""
    return b"data: " + error_body(status, message, code=code) + b"\n\n"
