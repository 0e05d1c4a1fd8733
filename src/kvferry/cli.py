"""The command `kvferry`. Each room brings its own subcommands in a module `command`, imported only when it is used.

A room's `command.add_parser(subparsers)` registers parsers and sets `run`, a function of the parsed arguments that
returns the exit status. So `kvferry --help` imports no room, and no room but the engine needs torch.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol, cast

from kvferry import __version__
from kvferry.errors import ConfigError, KVError

EXIT_FAILED = 2
EXIT_INTERRUPTED = 130


class Command(NamedTuple):
    """A subcommand, where it lives, and its line in the help."""

    module: str
    help: str


COMMANDS = {
    "up": Command("kvferry.cluster.command", "start a cluster on this machine and show it until Ctrl-C"),
    "demo": Command("kvferry.cluster.command", "start a small cluster, run a few requests through it and check them"),
    "top": Command("kvferry.cluster.command", "show instances and requests of a running router"),
    "load": Command("kvferry.cluster.command", "put load on a running router and measure what its clients see"),
    "router": Command("kvferry.router.command", "run the OpenAI-compatible router"),
    "engine": Command("kvferry.connector.transformers.command", "run one instance of the embedded engine"),
    "doctor": Command("kvferry.doctor.command", "find out why a cluster does not work"),
    "node": Command("kvferry.pool.command", "run one node of the KV pool"),
    "pool": Command("kvferry.pool.command", "look into a node of the KV pool, drain or clear it"),
    "sim": Command("kvferry.sim.command", "run the protocol under a virtual clock and look for faults"),
    "bench": Command("kvferry.pool.bench.command", "measure the transfer engine or the pool beside other systems"),
}

_EXTRAS = {"torch": "engine", "transformers": "engine", "safetensors": "engine", "tokenizers": "engine"}
_EXTRAS |= {"matplotlib": "plot", "redis": "redis"}


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviated flags: an abbreviation changes its meaning with the next version."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        kwargs["allow_abbrev"] = False
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_FAILED, f"kvferry: {message}\n{self.prog} --help shows what it takes\n")


def make_parser(command: str | None) -> Parser:
    """The parser for one subcommand, complete; all others are listed by name only."""
    parser = Parser(prog="kvferry", description="A distributed KV cache for LLM serving: prefill here, decode there.")
    parser.add_argument("--version", action="version", version=f"kvferry {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    if command is not None:
        _import_room(command).add_parser(subparsers)
    for name, (_, text) in COMMANDS.items():
        if name not in subparsers.choices:
            subparsers.add_parser(name, help=text)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Returns:
        the command's exit status; 2 for a wrong command line or a KVError, which ends with one line and no traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    named = next((a for a in arguments if not a.startswith("-")), None)
    try:
        parser = make_parser(named if named in COMMANDS else None)
        if named is None and not arguments:
            parser.print_help()
            return EXIT_FAILED
        if named is not None and named not in COMMANDS:
            raise ConfigError(f"command {named} is unknown{_nearest(named, COMMANDS)}; kvferry --help lists them all")
        args, rest = parser.parse_known_args(arguments)
        if rest:
            flag = rest[0].partition("=")[0]
            known = _nearest(flag, list(_flags(parser))) if flag.startswith("-") else ""
            asked = f"kvferry {named}" if named else "kvferry"
            raise ConfigError(f"{flag} is unknown to {asked}{known}; {asked} --help lists what it takes")
        return int(args.run(args))
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        need = f"kvferry {named} needs {error.name}, which is not installed"
        print(f"kvferry: {need}; do: pip install 'kvferry[{extra}]'", file=sys.stderr)
        return EXIT_FAILED
    except KVError as error:
        print(f"kvferry: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("kvferry: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone, as with `| head`; the interpreter's own flush must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_FAILED


class Room(Protocol):
    """What a room's module `command` has."""

    def add_parser(self, subparsers: argparse._SubParsersAction[Parser]) -> None:
        """Register the room's commands; each sets the default `run`."""


def _import_room(command: str) -> Room:
    room: Any = importlib.import_module(COMMANDS[command].module)
    return cast(Room, room)


def _flags(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _flags(child)


def _nearest(seen: str, known: Sequence[str] | dict[str, Command]) -> str:
    near = difflib.get_close_matches(seen, list(known), 1, 0.6)
    return f"; did you mean {near[0]}?" if near else ""


if __name__ == "__main__":
    sys.exit(main())
