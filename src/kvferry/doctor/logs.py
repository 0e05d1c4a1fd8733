"""Reading logs of both sides: merged by time, matched against the rules, told in one paragraph."""

from __future__ import annotations

import datetime
import re
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvferry.doctor.case import version_tuple
from kvferry.doctor.causes import cause_of
from kvferry.doctor.facts import LogFinding
from kvferry.doctor.findings import Finding, catalogue
from kvferry.doctor.log_lines import Line, failure_of, parse_time, request_of, side_of
from kvferry.doctor.log_rules import Rule, candidates, rules
from kvferry.doctor.reading import read_bytes, reason
from kvferry.doctor.report import show
from kvferry.errors import ConfigError

MAX_LINE = 4000
MAX_LOG_BYTES = 64 << 20
"""Of a longer log the end is read."""
MAX_FOLLOWED_LINES = 100_000
MAX_REQUESTS_SHOWN = 10
PROBE_MARK = "kvferry-doctor-"
"""In every line about the doctor's own probe requests, some of which are meant to fail."""
POLL_S = 0.3
_ENDED = 6
_VERSION = re.compile(r"(?:vLLM API server version|Initializing an? (?:V1 )?LLM engine \(v)\s*v?([\w.+-]+)")


class Sign(msgspec.Struct, frozen=True):
    """A line that a rule of a finding matched."""

    line: Line
    rule: Rule
    request: str | None


class Request(msgspec.Struct, frozen=True):
    """One request: the last stage that went well, when and where, and the first sign of trouble after that."""

    name: str
    stage: str
    step: int
    at: float | None
    source: str
    trouble: str = ""


class Story(msgspec.Struct, frozen=True):
    """What the logs tell: how many lines, the signs in order, each request, findings, and one paragraph.

    `versions` are those of vLLM, by the side whose log begins with them.
    """

    num_lines: int
    sources: tuple[str, ...]
    signs: tuple[Sign, ...]
    requests: tuple[Request, ...]
    findings: tuple[LogFinding, ...]
    paragraph: str
    versions: dict[str, str] = {}


def read_logs(paths: Sequence[str]) -> Story:
    """Read and merge logs.

    Raises: ConfigError, naming the file that cannot be read.
    """
    return tell(_load(paths)[0])


def _load(paths: Sequence[str]) -> tuple[list[Line], dict[str, int]]:
    """The lines of every log, and how far each was read."""
    lines: list[Line] = []
    sizes: dict[str, int] = {}
    for path_text in paths:
        path = Path(path_text)
        try:
            data, sizes[path_text] = read_bytes(path, MAX_LOG_BYTES)
            year = datetime.datetime.fromtimestamp(path.stat().st_mtime).year
        except (OSError, ValueError) as e:
            raise ConfigError(
                f"{path_text}: cannot be read ({reason(e)}); expected a log of vLLM, kvferry, Mooncake or NIXL"
            ) from e
        text = data.decode(errors="replace")
        lines += parse_lines(text.splitlines(), _source(path, paths, text), year)
    return lines, sizes


def parse_lines(texts: Iterable[str], source: str, year: int) -> list[Line]:
    """Lines with times; a line without one (of a traceback) has the time of the line before it."""
    at: float | None = None
    out = []
    for text in texts:
        if text.strip():
            at = parse_time(text, year) or at
            out.append(Line(at, source, text[:MAX_LINE].rstrip()))
    return out


def tell(lines: Iterable[Line]) -> Story:
    """Match the lines, follow each request, and say what happened."""
    ordered = sorted(lines, key=lambda x: x.at or 0.0)  # sorted is stable: lines of one file keep their order
    signs: list[Sign] = []
    requests: dict[str, Request] = {}

    @cache
    def speaking_of(words: tuple[str, ...]) -> set[str]:
        return {x.source for x in ordered if any(w in x.text for w in words)}

    for line in ordered:
        if PROBE_MARK in line.text:
            continue
        for i in candidates(line.text):
            rule, pattern = rules()[i]
            m = pattern.search(line.text)
            if m is None or (rule.side and side_of(line.source, "") != rule.side):
                continue
            if rule.unless and line.source in speaking_of(rule.unless):
                continue
            named = m.groupdict().get("request")
            name = (request_of(named) or named.rstrip(".,")) if named else request_of(line.text)
            if rule.stage:
                _advance(requests, name, rule, line)
            else:
                # The first rule that matches has the line: the file puts the specific before the general.
                signs.append(Sign(line, rule, name))
                _trouble(requests, name, rule)
                break
    versions = _versions_of(ordered)
    findings = (*_findings(signs), *_differing(versions))
    sources = tuple(dict.fromkeys(x.source for x in ordered))
    every = tuple(requests.values())
    paragraph = _paragraph(ordered, sources, signs, every, findings)
    by_side = {_side(source): v for source, v in versions.items() if _side(source)}
    return Story(len(ordered), sources, tuple(signs), every, findings, paragraph, by_side)


def _advance(requests: dict[str, Request], name: str | None, rule: Rule, line: Line) -> None:
    if name is None:
        return
    known = requests.get(name)
    if known is None or rule.step >= known.step:
        trouble = known.trouble if known and rule.step < _ENDED else ""
        requests[name] = Request(name, rule.stage, rule.step, line.at, line.source, trouble)


def _trouble(requests: dict[str, Request], name: str | None, rule: Rule) -> None:
    if name is None:
        return
    known = requests.get(name) or Request(name, "", 0, None, "")
    if not known.trouble:
        requests[name] = msgspec.structs.replace(known, trouble=catalogue()[rule.finding].title.removeprefix("Logs: "))


def _findings(signs: Sequence[Sign]) -> tuple[LogFinding, ...]:
    """One finding for each id, causes before consequences, then by time."""
    groups: dict[str, list[Sign]] = {}
    for sign in signs:
        groups.setdefault(sign.rule.finding, []).append(sign)
    ordered = sorted(groups.values(), key=lambda g: (min(s.rule.rank for s in g), g[0].line.at or 0.0))
    out = []
    for group in ordered:
        first = min(group, key=lambda s: s.rule.rank)
        entry = catalogue()[first.rule.finding]
        meaning, mend = _explained(first)
        shown = first.line.text if len(first.line.text) <= 300 else first.line.text[:300] + " …"
        out.append(
            LogFinding(
                rule=first.rule.id,
                finding=first.rule.finding,
                severity=first.rule.severity,
                title=entry.title,
                why=f"{entry.why} {meaning}".rstrip(),
                fix=first.rule.fix or mend or entry.mend,
                count=len(group),
                first=shown,
                source=first.line.source,
            )
        )
    return tuple(out)


def _explained(sign: Sign) -> tuple[str, str]:
    """What the cause in the line means, as a sentence, and what to do; empty where it names none."""
    failure = failure_of(sign.line.text) if sign.rule.causes else None
    if failure is None or sign.rule.causes is None:
        return "", ""
    texts = cause_of(failure.cause, failure.stage, sign.rule.causes)
    if texts is None:
        return "", ""
    named = texts.named(prefill=failure.prefill, decode=failure.decode)
    return f"Here ({failure.cause}): {named.meaning}.", "" if named.mend == "none" else named.mend


def _versions_of(lines: Sequence[Line]) -> dict[str, str]:
    """The version of vLLM that each log begins with, by its source."""
    versions: dict[str, str] = {}
    for line in lines:
        if ("vLLM" in line.text or "LLM engine" in line.text) and (m := _VERSION.search(line.text)):
            versions.setdefault(line.source, m[1].rstrip(".,)"))
    return versions


def _differing(versions: dict[str, str]) -> tuple[LogFinding, ...]:
    """A finding if the logs of prefill and decode begin with different versions of vLLM."""
    sides = {source: version for source, version in versions.items() if _side(source) in ("prefill", "decode")}
    if len(set(sides.values())) < 2:
        return ()
    entry = catalogue()["KVF070"]
    said = "; ".join(f"{source}: vllm {version}" for source, version in sides.items())
    return (
        LogFinding(
            rule="versions",
            finding="KVF070",
            severity=entry.severity,
            title=entry.title,
            why=entry.why,
            fix=f"install vllm {max(sides.values(), key=version_tuple)} on both sides and start them again",
            count=1,
            first=said,
            source="logs",
        ),
    )


def _side(source: str) -> str:
    return side_of(source, "")


def _paragraph(
    lines: Sequence[Line],
    sources: Sequence[str],
    signs: Sequence[Sign],
    requests: Sequence[Request],
    findings: Sequence[LogFinding],
) -> str:
    """What happened, in one paragraph."""
    times = [x.at for x in lines if x.at is not None]
    span = f"between {_clock(times[0])} and {_clock(times[-1])}" if times else "in lines without times"
    start = f"{len(lines)} lines of {', '.join(sources)} {span}."
    if not findings:
        done = sum(r.step >= _ENDED for r in requests)
        return f"{start} No line tells of trouble." + (f" {done} requests ended well." if done else "")
    cause = findings[0]
    first = next((s for s in signs if s.rule.finding == cause.finding), None)
    title = cause.title.removeprefix("Logs: ")
    where = f"At {_clock(first.line.at)} {first.line.source} shows" if first else "They show"
    parts = [start, f"{where} the first cause: {title} ({cause.first})."]
    parts.append(cause.why)
    if len(findings) > 1:
        rest = "; ".join(f"{f.title.removeprefix('Logs: ')} ({f.count} x in {f.source})" for f in findings[1:4])
        parts.append(f"Then: {rest}.")
    if stuck := unended(requests):
        stages = Counter(r.stage or "seen only in that trouble" for r in stuck)
        reached = ", ".join(f"{n} {s}" for s, n in stages.items())
        last = max(stuck, key=lambda r: r.at or 0.0)
        parts.append(
            f"Of {len(requests)} requests {len(stuck)} have no good end in these logs ({reached})"
            + (f"; {last.name} was last well at {_clock(last.at)} in {last.source}." if last.at is not None else ".")
        )
    parts.append(f"To mend it: {cause.fix}.")
    return " ".join(parts)


def unended(requests: Sequence[Request]) -> list[Request]:
    """Requests whose end no line tells of, those in trouble first."""
    return sorted((r for r in requests if r.step < _ENDED), key=lambda r: not r.trouble)


def _clock(at: float | None) -> str:
    if at is None:
        return "an unknown time"
    return datetime.datetime.fromtimestamp(at).strftime("%H:%M:%S.%f")[:-3]


def _source(path: Path, paths: Sequence[str], text: str) -> str:
    side = side_of(path.name, text[:20000])
    alone = sum(Path(p).name == path.name for p in paths) == 1
    name = path.name if alone else str(path)
    return f"{side} ({name})" if side and side not in name.lower() else name


def report(story: Story, findings: list[Finding], console: Console) -> None:
    """Print the paragraph, then the findings."""
    console.print(Text(story.paragraph))
    if findings:
        console.print()
        if stuck := unended(story.requests):
            table = Table(
                "request", "last good stage", "at", "in", "trouble", title_justify="left", title="no good end"
            )
            for r in stuck[:MAX_REQUESTS_SHOWN]:
                at = "" if r.at is None else _clock(r.at)
                table.add_row(*map(Text, (r.name, r.stage or "none logged", at, r.source, r.trouble)))
            console.print(table)
        show(findings, console, f"{story.num_lines} log lines")


def follow(paths: Sequence[str], console: Console) -> int:
    """Print signs as the files grow, until interrupted; then the paragraph.

    Returns: 1 if a sign of level error was seen, else 0.
    Raises: ConfigError as `read_logs`.
    """
    lines, positions = _load(paths)
    story = tell(lines)
    console.print(Text(story.paragraph))
    pending = dict.fromkeys(paths, "")
    recent: deque[Line] = deque(lines, MAX_FOLLOWED_LINES)
    seen_error = any(f.severity == "error" for f in story.findings)
    try:
        while True:
            time.sleep(POLL_S)
            for p in paths:
                fresh, positions[p] = _grown(p, positions[p])
                whole, _, pending[p] = (pending[p] + fresh).rpartition("\n")
                source = _source(Path(p), paths, whole)
                new = parse_lines(whole.splitlines(), source, datetime.datetime.now().year)
                recent.extend(new)
                for sign in tell(new).signs:
                    seen_error |= sign.rule.severity == "error"
                    title = catalogue()[sign.rule.finding].title.removeprefix("Logs: ")
                    console.print(Text(f"{_clock(sign.line.at)} {sign.line.source}: {title}: {sign.line.text}"))
    except KeyboardInterrupt:
        console.print(Text(tell(recent).paragraph))
    return 1 if seen_error else 0


def _grown(path: str, position: int) -> tuple[str, int]:
    """What was appended since; a file that was cut or replaced is read from its start."""
    try:
        size = Path(path).stat().st_size
        with Path(path).open("rb") as f:
            f.seek(position if size >= position else 0)
            data = f.read(MAX_LOG_BYTES)
            return data.decode(errors="replace"), f.tell()
    except OSError:
        return "", position
