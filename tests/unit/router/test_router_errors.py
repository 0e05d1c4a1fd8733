"""Errors in OpenAI's form, ours and those of instances."""

from __future__ import annotations

import pytest

from kvferry.router.errors import MAX_TOLD, error_object, told_by


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b'{"error": {"message": "out of\\nmemory", "type": "server_error", "code": null}}', "out of memory"),
        (b'{"object": "error", "message": "bad temperature", "code": 400}', "bad temperature"),
        (b'{"detail": "Not Found"}', '{"detail": "Not Found"}'),
        (b"<html>\n<h1>502 Bad Gateway</h1>", "<html> <h1>502 Bad Gateway</h1>"),
        (b'"just text"', '"just text"'),
        (b'{"error": {"message": "cut of', '{"error": {"message": "cut of'),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"", ""),
    ],
)
def test_what_an_instance_said_is_found_in_its_body(body: bytes, told: str) -> None:
    assert told_by(body) == told


def test_what_an_instance_said_is_not_repeated_without_end() -> None:
    assert told_by(b"x" * 10_000) == "x" * MAX_TOLD + " \u2026"


@pytest.mark.parametrize(
    "status", [400, 401, 403, 404, 405, 408, 409, 411, 413, 414, 429, 431, 500, 501, 502, 503, 504]
)
def test_each_status_has_a_code(status: int) -> None:
    error = error_object(status, "why")["error"]
    assert isinstance(error, dict) and error["message"] == "why" and error["type"] and error["code"]
