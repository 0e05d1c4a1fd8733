"""Server-sent events, passed on as bytes: what may go to the client now, and where the stream's `[DONE]` begins.

Bytes are never decoded. They are cut only between events: an event that is not complete yet waits for its rest, so
that a stream which breaks off can still be ended by a well-formed error event, and `[DONE]` is found however it is
split.
"""

from __future__ import annotations

import re

MAX_EVENT_BYTES = 1 << 20
_BLANK_LINES = (b"\n\n", b"\n\r\n", b"\r\r")
_ERROR = re.compile(rb"(?:\A|(?<=[\r\n]))data: ?\{ ?\"error\"")


class EventStream:
    """One stream. `feed` gives what may be sent; from `[DONE]` on everything is kept until `rest` takes it.

    `failed` is set once an error event went by: the instance itself says that the answer is not whole.
    """

    def __init__(self) -> None:
        self.done = False
        self.failed = False
        self.mid_event = False
        self._held = b""
        self._mid_line = False

    def feed(self, data: bytes) -> bytes:
        """The bytes that may go to the client now, in order; may be empty."""
        if self.done:
            self._held += data
            return b""
        if not self._held and not self.mid_event and data[-2:] == b"\n\n" and b"[DONE]" not in data:
            self._look_for_error(data)
            return data
        if self._held:
            data = self._held + data
        cut = _start_of_done(data, at_line_start=not self._mid_line)
        if cut >= 0:
            self.done = True
        else:
            cut = _end_of_last_event(data)
            if cut == 0 and len(data) > MAX_EVENT_BYTES:
                cut = len(data)
        self._held = data[cut:]
        out = data[:cut]
        if out:
            self._mid_line = out[-1] not in b"\r\n"
            self.mid_event = not out.endswith(_BLANK_LINES)
            self._look_for_error(out)
        return out

    def _look_for_error(self, events: bytes) -> None:
        if b'"error"' in events and _ERROR.search(events):
            self.failed = True

    def rest(self) -> bytes:
        """Everything that is still held, to be sent at a good end. At a bad end it is thrown away."""
        held, self._held = self._held, b""
        return held


def _start_of_done(data: bytes, *, at_line_start: bool) -> int:
    """The offset of the line `data: [DONE]`; -1 where there is none."""
    at = data.find(b"[DONE]")
    while at >= 0:
        start = data.rfind(b"data:", max(0, at - 6), at)
        begins_line = at_line_start if start == 0 else data[start - 1 : start] in (b"\n", b"\r")
        if start >= 0 and begins_line and data[start + 5 : at] in (b"", b" "):
            return start
        at = data.find(b"[DONE]", at + 1)
    return -1


def _end_of_last_event(data: bytes) -> int:
    """The offset after the last blank line; 0 where there is none."""
    return max((at + len(mark) for mark in _BLANK_LINES if (at := data.rfind(mark)) >= 0), default=0)
