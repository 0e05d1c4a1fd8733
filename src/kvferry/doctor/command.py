"""`kvferry doctor`: why decode is stuck, found before and while it happens."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from kvferry.config import CONFIG_FILE
from kvferry.doctor.checks import examine
from kvferry.doctor.facts import Facts, Side
from kvferry.doctor.gather import gather
from kvferry.doctor.report import as_json, exit_status, show, show_probe
from kvferry.doctor.secret import secret_of
from kvferry.errors import KVError

EXIT_UNUSABLE = 2


def add_parser(subparsers: Any) -> None:
    """Register `doctor` with its two forms: the examination, and `doctor logs`."""
    parser = subparsers.add_parser(
        "doctor",
        help="find out why a cluster does not work",
        description="Examines a cluster and says what stalls decode. A side is a pid, or a file of KEY=VALUE lines "
        "in which COMMAND= may hold the command line. Any one input is enough for the checks that it allows. "
        "Exit status: 0 nothing wrong, 1 errors found, 2 an input cannot be used.",
    )
    parser.add_argument("--config", metavar="FILE", help="kvferry.toml or mooncake.json")
    parser.add_argument("--prefill", metavar="ENV_OR_PID", action="append", default=[], help="a prefill instance")
    parser.add_argument("--decode", metavar="ENV_OR_PID", action="append", default=[], help="a decode instance")
    parser.add_argument("--router", metavar="URL", help="a running router (kvferry's, or any proxy for --probe)")
    parser.add_argument("--logs", metavar="FILE", nargs="+", default=[], help="logs of both sides")
    parser.add_argument("--probe", action="store_true", help="do a real rendezvous and send probes through the router")
    parser.add_argument("--json", action="store_true", help="findings as JSON")
    parser.add_argument("--offline", action="store_true", help="make no connection")
    parser.set_defaults(run=run_doctor)
    topics = parser.add_subparsers(dest="topic", metavar="")
    logs = topics.add_parser("logs", help="read logs of both sides and say what happened")
    logs.add_argument("files", metavar="FILE", nargs="+")
    logs.add_argument("--follow", action="store_true", help="go on as the files grow")
    logs.add_argument("--json", action="store_true", help="findings as JSON")
    logs.set_defaults(run=run_logs)


def run_doctor(args: argparse.Namespace) -> int:
    """Examine; returns 0, 1 or 2 as the help says."""
    # What peers refuse is told as a finding, not as a line of a log.
    logging.getLogger("kvferry").addHandler(logging.NullHandler())
    try:
        facts = _facts(args)
    except KVError as e:
        _unusable(e.message, args.json)
        return EXIT_UNUSABLE
    findings = examine(facts)
    if args.json:
        print(as_json(findings, facts.probe))  # noqa: T201
    else:
        if facts.probe:
            show_probe(facts.probe, Console())
        show(findings, Console(), _examined(facts, args))
    return exit_status(findings)


def run_logs(args: argparse.Namespace) -> int:
    """Read logs; returns 0, 1 or 2 as for the examination."""
    from kvferry.doctor.logs import follow, read_logs
    from kvferry.doctor.logs import report as report_logs

    try:
        if args.follow:
            return follow(args.files, Console())
        story = read_logs(args.files)
    except KVError as e:
        _unusable(e.message, args.json)
        return EXIT_UNUSABLE
    findings = examine(Facts(logs=story.findings))
    if args.json:
        print(as_json(findings))  # noqa: T201
    else:
        report_logs(story, findings, Console())
    return exit_status(findings)


def _facts(args: argparse.Namespace) -> Facts:
    config = args.config
    nothing = not (config or args.prefill or args.decode or args.router or args.logs or args.probe)
    if nothing and Path(CONFIG_FILE).is_file():
        config = CONFIG_FILE
    elif nothing:
        raise KVError(
            "nothing to examine: name at least one of --config, --prefill, --decode, --router, --logs or --probe "
            "(kvferry doctor --help says what each takes)"
        )
    facts = gather(config=config, prefill=args.prefill, decode=args.decode, offline=args.offline)
    if args.logs:
        from kvferry.doctor.logs import read_logs

        story = read_logs(args.logs)
        facts = msgspec.structs.replace(facts, logs=story.findings, sides=_with_versions(facts, story.versions))
    if args.router and not args.offline:
        from kvferry.doctor.live import look_at_router

        facts = look_at_router(facts, args.router)
        if args.probe:
            from kvferry.doctor.passage import probe_passage

            facts = msgspec.structs.replace(facts, router_probe=probe_passage(args.router, _secret(facts)))
    if args.probe and not args.offline:
        from kvferry.doctor.rendezvous import probe_transports

        facts = msgspec.structs.replace(facts, probe=probe_transports(facts))
    return facts


def _with_versions(facts: Facts, of_logs: dict[str, str]) -> tuple[Side, ...]:
    """The sides, with the version of vLLM that their log begins with where nothing else tells it."""
    return tuple(
        msgspec.structs.replace(s, versions={"vllm": of_logs[s.role], **s.versions}) if s.role in of_logs else s
        for s in facts.sides
    )


def _secret(facts: Facts) -> bytes | None:
    """The cluster secret of an instance that was named, of the settings file, or of this process's environment."""
    for side in facts.sides:
        if secret := secret_of(side, None):
            return secret
    return secret_of(None, facts.kvferry) or secret_of(Side("decode", "here", "this process", dict(os.environ)), None)


def _examined(facts: Facts, args: argparse.Namespace) -> str:
    parts = [f"{s.name} ({s.origin})" for s in facts.sides]
    parts += [args.config] if args.config else []
    parts += [args.router] if args.router else []
    parts += [f"{len(args.logs)} logs"] if args.logs else []
    parts += [f"{len(facts.probe)} probe steps"] if facts.probe else []
    parts += [facts.router_probe.note] if facts.router_probe and facts.router_probe.note else []
    return ", ".join(parts)


def _unusable(message: str, as_json_too: bool) -> None:
    print(f"kvferry doctor: {message}", file=sys.stderr)  # noqa: T201
    if as_json_too:
        print(msgspec.json.encode({"findings": [], "error": message}).decode())  # noqa: T201
