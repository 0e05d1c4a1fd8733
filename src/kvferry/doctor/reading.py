"""Reading what the user names, with an end to it: files, pipes such as `<(kubectl logs POD)`, and nothing endless."""

from __future__ import annotations

import os
import select
import stat
import time
from pathlib import Path

from kvferry.errors import ConfigError

PIPE_S = 30.0
MAX_INPUT_BYTES = 4 << 20
_PART = 1 << 20


def read_text(path_text: str, what: str, expected: str, max_bytes: int = MAX_INPUT_BYTES) -> str:
    """A text file or pipe.

    Raises: ConfigError, naming it by `what` and saying what was `expected`, where it cannot be read, is longer than
    `max_bytes`, is not UTF-8, or is a pipe that does not end within PIPE_S.
    """
    try:
        data, size = read_bytes(Path(path_text), max_bytes)
        if size > max_bytes:
            raise OSError(f"it is {size} bytes long, {max_bytes} at most are read")
        return data.decode("utf-8-sig")
    except (OSError, ValueError) as e:
        raise ConfigError(f"{what}: cannot be read ({reason(e)}); expected {expected}") from e


def read_bytes(path: Path, max_bytes: int) -> tuple[bytes, int]:
    """(the last `max_bytes` of a file or pipe, its whole size).

    Raises: OSError; for what is neither a file nor a pipe, and for a pipe that does not end within PIPE_S, too.
    """
    mode = path.stat().st_mode
    if stat.S_ISFIFO(mode):
        return _read_pipe(path, max_bytes)
    if not stat.S_ISREG(mode):
        raise OSError("it is a directory" if stat.S_ISDIR(mode) else "it is no file")
    with path.open("rb") as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(max(0, size - max_bytes))
        data = f.read(max_bytes)
        return data, max(size, len(data))  # Files of /proc say that they are empty.


def _read_pipe(path: Path, max_bytes: int) -> tuple[bytes, int]:
    end = time.monotonic() + PIPE_S
    # Opened without blocking, as nobody may ever write to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        data, size = bytearray(), 0
        while True:
            left = end - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise OSError(f"the pipe did not end within {PIPE_S:.0f} s")
            part = os.read(descriptor, _PART)
            if not part:
                return bytes(data), size
            size += len(part)
            data += part
            del data[: max(0, len(data) - max_bytes)]
    finally:
        os.close(descriptor)


def reason(error: Exception) -> str:
    """Why something could not be read, in a few words."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not text"
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
