"""Trying connections: from here, and from inside a side's network namespace. Every wait has an end."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import Literal
from urllib.parse import urlsplit

import psutil

from kvferry.addresses import is_loopback, is_wildcard
from kvferry.doctor.asking import connect, ended_after, get
from kvferry.doctor.case import Case
from kvferry.doctor.facts import ClockReading, PrefixCounts, Reach, ReachOutcome, Resolution
from kvferry.doctor.settings import split_host_port

Job = tuple[str, str, int, str, int | None]
"""Seen from, host, port, purpose, and the pid whose network namespace it is tried from (None: ours)."""

Answers = Literal["yes", "refused", "silent", "unknown"]

CONNECT_S = 1.0
ANSWER_S = 1.0
HEALTH_S = 2.0
_PREFIX_COUNT = {
    "asked": re.compile(r"^vllm:external_prefix_cache_queries_total(?:\{[^\n]*\})? ([\d.e+]+)$", re.M),
    "came": re.compile(r"^vllm:external_prefix_cache_hits_total(?:\{[^\n]*\})? ([\d.e+]+)$", re.M),
}
_DEFAULT_PORTS = {"etcd": 2379, "redis": 6379, "http": 80, "master": 50051}
_ASKED = ("etcd", "redis", "http")
_KINDS = ("etcd", "redis", "http", "https")
_CONNECT = (
    "import socket,sys\n"
    "try: socket.create_connection((sys.argv[1],int(sys.argv[2])),float(sys.argv[3])).close(); print('open')\n"
    "except socket.gaierror: print('unresolved')\n"
    "except TimeoutError: print('timeout')\n"
    "except ConnectionRefusedError: print('refused')\n"
    "except OSError: print('unreachable')\n"
)


def gather_reaches(case: Case) -> tuple[Reach, ...]:
    """Connect to every server and address that the facts name, side by side."""
    jobs = [*_server_jobs(case), *_directory_jobs(case), *_router_jobs(case), *_master_jobs(case)]
    jobs += _advertised_jobs(case)
    if not jobs:
        return ()
    with ThreadPoolExecutor(max_workers=16) as threads:
        return tuple(threads.map(lambda job: _try(*job), jobs))


def _server_jobs(case: Case) -> list[Job]:
    jobs: list[Job] = []
    seen: set[tuple[str, int]] = set()
    for path, config in case.configs:
        server = config.get("metadata_server")
        if isinstance(server, str) and server and server.upper() != "P2PHANDSHAKE":
            kind, addresses = _metadata(server, str(config.get("metadata_backend") or ""))
            for text in addresses:
                host, port = split_host_port(text)
                place = (host, port or _DEFAULT_PORTS.get(kind, 2379))
                if host and place not in seen:
                    seen.add(place)
                    jobs.append(("this node", *place, f"{kind} metadata_server ({path})", None))
        master = config.get("master_server_address")
        if isinstance(master, str) and master and "://" not in master:
            host, port = split_host_port(master)
            place = (host, port or _DEFAULT_PORTS["master"])
            if host and place not in seen:
                seen.add(place)
                jobs.append(("this node", *place, f"master master_server_address ({path})", None))
    return jobs


def _metadata(server: str, backend: str) -> tuple[str, list[str]]:
    """Kind and addresses of a metadata server; etcd takes several, separated by commas."""
    scheme, mark, rest = server.partition("://")
    kind = scheme if mark and scheme in _KINDS else backend or "etcd"
    return ("http" if kind == "https" else kind), (rest if mark else server).split(",")


def _directory_jobs(case: Case) -> list[Job]:
    """The pool's directory, as the settings file and the instances name it."""
    named = [(s.name, case.settings[s.name].flag("pool-directory")) for s in case.facts.sides]
    if case.facts.kvferry is not None:
        named.append((str(case.facts.kvferry_path), case.facts.kvferry.pool.directory))
    jobs: dict[tuple[str, int], Job] = {}
    for who, url in named:
        try:
            parts = urlsplit(url or "")
            place = (parts.hostname or "", parts.port or _DEFAULT_PORTS["redis"])
        except ValueError:
            continue
        if parts.scheme == "redis" and place[0]:
            jobs.setdefault(place, ("this node", *place, f"pool-directory pool.directory of {who}", None))
    return list(jobs.values())


def _router_jobs(case: Case) -> list[Job]:
    """The router that a running instance reports to."""
    jobs: list[Job] = []
    for side in case.facts.sides:
        try:
            parts = urlsplit(case.settings[side.name].flag("cluster-router-url") or "")
            host, port = parts.hostname, parts.port or 80
        except ValueError:
            continue
        if side.process is not None and host:
            jobs.append((side.name, host, port, "router", _foreign(case, side.process)))
    return jobs


def _master_jobs(case: Case) -> list[Job]:
    jobs: list[Job] = []
    for side in case.facts.sides:
        host, port = side.environment.get("MASTER_ADDR"), side.environment.get("MASTER_PORT", "29500")
        if host and port.isdecimal() and not is_wildcard(host):
            jobs.append((side.name, host, int(port), "MASTER_ADDR", _foreign(case, side.process)))
    return jobs


def _advertised_jobs(case: Case) -> list[Job]:
    """Each side tries what the other tells it, where that side is on this machine and the other is not."""
    jobs: list[Job] = []
    for teller in case.facts.sides:
        told = {k: h for k, h in case.addresses[teller.name].items() if not is_wildcard(h)}
        ports = [p for p in case.ports if p.side == teller.name and p.purpose != "HTTP"]
        for listener in case.facts.sides:
            if listener.role == teller.role or not told or not ports:
                continue
            key, host = next(iter(told.items()))
            if listener.process is None:
                stated = case.addresses[listener.name].values()
                here = bool(stated) and all(case.is_ours(h) for h in stated)
                if here and not case.is_ours(host):
                    jobs.append((listener.name, host, min(ports[0].ports), f"advertised {teller.name}'s {key}", None))
                continue
            if is_loopback(host) and case.same_node(teller, listener) is not False:
                continue
            pid = _foreign(case, listener.process)
            jobs.append((listener.name, host, min(ports[0].ports), f"advertised {teller.name}'s {key}", pid))
    return jobs


def _foreign(case: Case, process: object) -> int | None:
    """The pid whose network namespace must be entered to see what it sees, or None."""
    netns, pid = getattr(process, "netns", ""), getattr(process, "pid", None)
    return pid if netns and netns != case.facts.host.netns else None


def _try(seen_from: str, host: str, port: int, purpose: str, inside: int | None) -> Reach:
    if inside is not None:
        return Reach(seen_from, host, port, _connect_inside(inside, host, port), purpose)
    outcome, address = _connect(host, port)
    answer = stopped = ""
    kind = purpose.partition(" ")[0].replace("pool-directory", "redis")
    if outcome == "open" and kind in (*_DEFAULT_PORTS, "router"):
        stopped = stopped_owner(host, port)
        answer = "" if stopped or kind not in _ASKED else ask(kind, host, port)
    return Reach(seen_from, host, port, outcome, purpose, address, answer, stopped)


def _connect(host: str, port: int) -> tuple[ReachOutcome, str]:
    try:
        with connect(host, port, CONNECT_S) as s:
            return "open", s.getpeername()[0]
    except socket.gaierror:
        return "unresolved", ""
    except TimeoutError:
        return "timeout", ""
    except ConnectionRefusedError:
        return "refused", ""
    except OSError:
        return "unreachable", ""


def _connect_inside(pid: int, host: str, port: int) -> ReachOutcome:
    """Connect from a process's network namespace (needs root and util-linux); `open` where that cannot be tried."""
    nsenter = shutil.which("nsenter")
    if nsenter is None:
        return "open"
    command = [nsenter, "-t", str(pid), "-n", sys.executable, "-c", _CONNECT, host, str(port), str(CONNECT_S)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CONNECT_S + 5, check=False)
    except subprocess.TimeoutExpired:
        return "timeout"
    word = done.stdout.strip()
    known: dict[str, ReachOutcome] = {
        "unresolved": "unresolved",
        "timeout": "timeout",
        "refused": "refused",
        "unreachable": "unreachable",
    }
    return known.get(word, "open")


def ask(kind: str, host: str, port: int) -> str:
    """How a server answers a question in its own protocol: `ok`, `silent` where it took the question and said nothing
    twice, `closed` where it hung up, or the first line of what it said."""
    expected: tuple[bytes, ...]
    if kind == "redis":
        request, expected = b"PING\r\n", (b"+PONG", b"-NOAUTH", b"-ERR")
    else:
        path = "/version" if kind == "etcd" else "/metadata?key=kvferry-doctor"
        request = f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode()
        expected = (b"HTTP/",)
    answer, is_open = _answer(host, port, request, 512)
    if not answer and is_open:
        # Once more, with more time: one that is busy is not silent.
        answer, is_open = _answer(host, port, request, 512, 2 * ANSWER_S)
    if not answer:
        return "silent" if is_open else "closed"
    if not answer.startswith(expected):
        return answer.splitlines()[0][:80].decode(errors="replace")
    if kind == "etcd" and b"etcd" not in answer and b"etcd" not in _answer(host, port, request, 8192)[0]:
        return "HTTP, but not as etcd"
    return "ok"


def _answer(host: str, port: int, request: bytes, size: int, within_s: float = ANSWER_S) -> tuple[bytes, bool]:
    """What comes back in time, up to its end or `size` bytes, for few bytes one part of it is enough; and whether the
    server was still holding the connection when the time was over."""
    body, late = b"", False
    try:
        with connect(host, port, CONNECT_S) as s, ended_after(s, within_s) as over:
            s.settimeout(None)
            s.sendall(request)
            while len(body) < size and (part := s.recv(4096)):
                body += part
                if size <= 512:
                    break
            late = over.is_set()
    except OSError:
        pass
    return body, late


def stopped_owner(host: str, port: int) -> str:
    """The stopped process of this machine that listens on a port, as `name (pid N)`."""
    if not is_loopback(host) and host not in {
        a.address for addresses in psutil.net_if_addrs().values() for a in addresses
    }:
        return ""
    try:
        pids = {c.pid for c in psutil.net_connections(kind="tcp") if c.laddr and c.laddr.port == port and c.pid}
        for pid in pids:
            process = psutil.Process(pid)
            if process.status() == psutil.STATUS_STOPPED:
                return f"{process.name()} (pid {pid})"
    except psutil.Error:
        return ""
    return ""


def gather_resolutions(case: Case) -> tuple[Resolution, ...]:
    """What each side's own hosts file makes of the names that sides use; only for processes of this machine."""
    names = {
        h
        for s in case.facts.sides
        for h in (s.environment.get("MASTER_ADDR"), s.environment.get("VLLM_HOST_IP"), *case.addresses[s.name].values())
        if h and not h.replace(".", "").isdecimal() and ":" not in h and h != "localhost"
    }
    out = []
    for name in sorted(names):
        sides = [s for s in case.facts.sides if s.process and name in s.process.hosts_file]
        if len(sides) > 1:
            out += [Resolution(s.name, name, s.process.hosts_file[name]) for s in sides if s.process]
    return tuple(out)


def gather_clocks(urls: dict[str, str]) -> tuple[ClockReading, ...]:
    """Read the Date header of each URL (by name). Who does not answer has no reading."""
    readings = (ask_health(name, url)[1] for name, url in urls.items())
    return tuple(r for r in readings if r is not None)


def ask_health(name: str, url: str) -> tuple[Answers, ClockReading | None]:
    """Whether the HTTP server of an instance answers, and its clock where it tells.

    `silent` means that connections are taken and nothing is said on them; `unknown` that it cannot be reached from
    here, which tells nothing of it.
    """
    before = time.time()
    try:
        answer = get(url.rstrip("/") + "/health", HEALTH_S)
    except ConnectionRefusedError:
        return "refused", None
    except TimeoutError:
        return ("silent" if _takes_connections(url) else "unknown"), None
    except (OSError, ValueError):
        return "unknown", None
    middle = (before + time.time()) / 2
    try:
        told = parsedate_to_datetime(answer.date).timestamp() if answer.date else None
    except ValueError:
        told = None
    # The header has whole seconds, cut off: half a second is the best guess for the rest.
    return "yes", None if told is None else ClockReading(name, url, told + 0.5 - middle)


def gather_prefix_counts(urls: dict[str, str]) -> tuple[PrefixCounts, ...]:
    """Ask vLLM's /metrics (by name) what its connector was asked for. Versions that do not count it give none."""
    out = []
    for name, url in urls.items():
        try:
            text = get(url.rstrip("/") + "/metrics", HEALTH_S).body.decode(errors="replace")
        except (OSError, ValueError):
            continue
        sums = {k: sum(float(m[1]) for m in _PREFIX_COUNT[k].finditer(text)) for k in _PREFIX_COUNT}
        if all(_PREFIX_COUNT[k].search(text) for k in _PREFIX_COUNT):
            out.append(PrefixCounts(name, int(sums["asked"]), int(sums["came"])))
    return tuple(out)


def _takes_connections(url: str) -> bool:
    parts = urlsplit(url)
    try:
        return _connect(parts.hostname or "", parts.port or 80)[0] == "open"
    except ValueError:
        return False
