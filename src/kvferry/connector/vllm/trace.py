"""Where the time of a handoff goes: moments of each request, written to a file when asked to. Pure.

`CLOCK_MONOTONIC` is one clock for all processes of a host, so that the files of both sides can be merged by time.
"""

from __future__ import annotations

import os
import time


class Trace:
    """Appends one line a moment, `seconds who request what`, to a file that all processes of an instance share.

    Args:
        path: the file; None writes nothing.
        who: tells halves and ranks apart.
    """

    def __init__(self, path: str | None, who: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600) if path else None
        self._who = who

    def __call__(self, request_id: str, what: str) -> None:
        """Note this moment. One short append, so that lines of several threads and processes never mix."""
        if self._fd is not None:
            os.write(self._fd, f"{time.monotonic():.6f} {self._who} {request_id} {what}\n".encode())

    def close(self) -> None:
        """Later moments are not written. Idempotent."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)
