"""Stop strings in text that comes in pieces."""

from __future__ import annotations

from typing import NamedTuple


class Stopped(NamedTuple):
    """`text` may be shown; `stop` is the stop string that was found, if one was."""

    text: str
    stop: str | None


class StopStrings:
    """Finds the first stop string and holds back text that may turn out to be the beginning of one."""

    def __init__(self, stops: tuple[str, ...], *, include: bool = False) -> None:
        self._stops = stops
        self._include = include
        self._held = ""

    def feed(self, piece: str) -> Stopped:
        """Text that no stop string can begin in; once `stop` is set, the answer ends with this text."""
        if not self._stops:
            return Stopped(piece, None)
        text = self._held + piece
        found = [(text.find(s), -len(s), s) for s in self._stops if s in text]
        if found:
            at, _, stop = min(found)
            self._held = ""
            return Stopped(text[: at + len(stop)] if self._include else text[:at], stop)
        num_held = max(_overlap(text, s) for s in self._stops)
        self._held = text[len(text) - num_held :]
        return Stopped(text[: len(text) - num_held], None)

    def flush(self) -> str:
        """What was held back, when the answer ends for another reason."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
