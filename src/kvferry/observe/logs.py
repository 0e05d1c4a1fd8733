"""One line for each event, with its facts as fields: text for people, JSON for machines.

    log = get_log(__name__)
    log.info("handoff ended", handoff=ticket.handoff, state="delivered", bytes=8192)

    2026-11-22T22:16:03.120Z INFO    decode-0  handoff ended  handoff=4f0e… state=delivered bytes=8192

An event is a fixed text, so that lines can be counted; everything that varies is a field, and a field that is None is
left out. The ids are always called
`request` and `handoff`. Lines go to standard error. It is the standard library's logging below, so that the lines of
other libraries come out in the same form.
"""

from __future__ import annotations

import datetime
import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

import msgspec

from kvferry.config import LogSettings

_FIELDS = "kvferry_fields"
_BARE_VALUE = re.compile(r"[^\s\"'=\\]+")
_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


class Log:
    """A named log whose calls take an event and its facts; `bind` gives one that adds the same facts to each line."""

    __slots__ = ("_bound", "_logger")

    def __init__(self, logger: logging.Logger, bound: Mapping[str, Any] | None = None) -> None:
        self._logger = logger
        self._bound = dict(bound or {})

    def bind(self, **fields: Any) -> Log:
        """A log that writes these fields into every line, before the line's own."""
        return Log(self._logger, {**self._bound, **fields})

    def debug(self, event: str, /, **fields: Any) -> None:
        self._write(logging.DEBUG, event, fields)

    def info(self, event: str, /, **fields: Any) -> None:
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, /, **fields: Any) -> None:
        self._write(logging.WARNING, event, fields)

    def error(self, event: str, /, **fields: Any) -> None:
        self._write(logging.ERROR, event, fields)

    def exception(self, event: str, /, *, of: BaseException | None = None, **fields: Any) -> None:
        """An error line with the traceback of `of`, or of the exception being handled, for failures that nobody
        foresaw."""
        self._write(logging.ERROR, event, fields, traceback_of=of or True)

    def _write(
        self, level: int, event: str, fields: Mapping[str, Any], traceback_of: BaseException | bool = False
    ) -> None:
        if self._logger.isEnabledFor(level):
            extra = {_FIELDS: {**self._bound, **fields}}
            self._logger.log(level, "%s", event, extra=extra, exc_info=traceback_of, stacklevel=3)


def get_log(name: str) -> Log:
    """The log of a module; call it with `__name__`."""
    return Log(logging.getLogger(name))


def configure_logs(settings: LogSettings, *, process: str, stream: TextIO | None = None) -> None:
    """Send all log lines of this process to standard error, in the form and from the level that the settings say.

    May be called again: the earlier handler of this function is replaced, others stay.

    Args:
        process: name of this process in its lines, such as `router` or `decode-0`.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines(process) if settings.format == "json" else TextLines(process))
    handler.set_name("kvferry")
    root = logging.getLogger()
    for old in [h for h in root.handlers if h.get_name() == "kvferry"]:
        root.removeHandler(old)
    root.addHandler(handler)
    # Others' debug lines would drown ours: they begin at warning, unless everything is asked for.
    level = _LEVELS[settings.level]
    root.setLevel(level if level == logging.DEBUG else max(level, logging.WARNING))
    logging.getLogger("kvferry").setLevel(level)


class TextLines(logging.Formatter):
    """`time LEVEL process  event  key=value …`; a value with spaces or quotes is written as a JSON text, a mapping as
    `key.inner=value …`."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        event, fields = _event_and_fields(record)
        facts = " ".join(f"{key}={_text_value(value)}" for key, value in _flat(fields))
        line = f"{_utc(record)} {record.levelname:<7} {self._process}  {_one_line(event)}"
        return f"{line}  {facts}" if facts else line


class JsonLines(logging.Formatter):
    """One object for each event: `ts` (UTC), `level`, `process`, `log`, `event`, then the fields."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        event, fields = _event_and_fields(record)
        head = {
            "ts": _utc(record),
            "level": record.levelname.lower(),
            "process": self._process,
            "log": record.name,
            "event": event,
        }
        # A field that has a head's name must not overwrite it; it is kept under a longer one.
        body = {f"field_{key}" if key in head else key: value for key, value in fields.items()}
        try:
            return msgspec.json.encode({**head, **body}).decode()
        except (TypeError, ValueError, UnicodeEncodeError):
            return json.dumps({**head, **body}, default=str, skipkeys=True)


def _utc(record: logging.LogRecord) -> str:
    when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _event_and_fields(record: logging.LogRecord) -> tuple[str, dict[str, Any]]:
    fields = {key: value for key, value in getattr(record, _FIELDS, {}).items() if value is not None}
    if record.exc_info and record.exc_info[0] is not None:
        fields["traceback"] = logging.Formatter().formatException(record.exc_info)
    try:
        return record.getMessage(), fields
    except (TypeError, ValueError):
        return str(record.msg), fields


def _flat(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in fields.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", each) for inner, each in value.items())
        else:
            yield key, value


def _text_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text if _BARE_VALUE.fullmatch(text) and text.isprintable() else f'"{_escaped(text)}"'


def _one_line(text: str) -> str:
    return text if text.isprintable() else _escaped(text)


def _escaped(text: str) -> str:
    """The inside of a JSON text, readable except for what a terminal or a line reader would take for a command."""
    quoted = json.dumps(text, ensure_ascii=False)[1:-1]
    return quoted if quoted.isprintable() else json.dumps(text)[1:-1]
