"""Traces of real requests: one JSON object a line, as Mooncake published theirs (FAST'25, `FAST25-release/traces`).

`timestamp` in milliseconds, `input_length` and `output_length` in tokens, and `hash_ids`, one id for each block of 512
tokens of the prompt, chained over the prefix: equal ids mean equal tokens up to there.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from kvferry.errors import ConfigError

BLOCK_TOKENS = 512


class TracedRequest(msgspec.Struct, frozen=True):
    """One line; other fields are ignored. Without times, all come at once; without answers' lengths, of one token."""

    input_length: int
    hash_ids: tuple[int, ...]
    timestamp: float = 0.0
    output_length: int = 1


def read_request_trace(path: Path) -> list[TracedRequest]:
    """The requests in file order.

    Raises: ConfigError for a file that is absent, empty or no trace.
    """
    decoder = msgspec.json.Decoder(TracedRequest)
    requests: list[TracedRequest] = []
    try:
        with path.open("rb") as lines:
            requests.extend(decoder.decode(line) for line in lines if line.strip())
    except OSError as error:
        raise ConfigError(f"the trace {path} cannot be read: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(f"line {len(requests) + 1} of {path} is no request of a trace: {error}") from error
    if not requests:
        raise ConfigError(f"the trace {path} is empty; expected one JSON object a line")
    return requests
