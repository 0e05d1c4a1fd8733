"""Flags of an argparse parser for the settings of some sections."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

from kvferry.config._tree import SETTINGS, Setting

_FLAG_DEST = "kvferry setting "


class FlagValue(NamedTuple):
    """A value from the command line, with the flag as it was written there."""

    flag: str
    value: str


def add_flags(
    parser: argparse.ArgumentParser, *sections: str, bare: Sequence[str] = (), without: Sequence[str] = ()
) -> None:
    """Add a flag for each setting of these sections to a parser; `load_settings(args)` reads them again.

    A setting `router.ttl_s` is `--router-ttl-s`, or `--ttl-s` when its section is in `bare`. The secret has no flag,
    since every user of a machine may read its processes' command lines.

    Args:
        without: settings that the command decides itself, by dotted name.
    """
    for section in sections:
        group = parser.add_argument_group(f"{section} settings")
        for setting in SETTINGS.values():
            if setting.section != section or setting.name in ("cluster.secret", *without):
                continue
            flag = setting.key if section in bare else f"{section}_{setting.key}"
            group.add_argument(
                "--" + flag.replace("_", "-"),
                action=_StoreSetting,
                dest=_FLAG_DEST + setting.name,
                default=argparse.SUPPRESS,
                metavar="{" + ",".join(setting.choices) + "}" if setting.choices else setting.key.upper(),
                help=_flag_help(setting),
                nargs="?" if setting.kind == "bool" else None,
            )


def flags_of(args: argparse.Namespace) -> dict[str, FlagValue]:
    """The settings given as flags that `add_flags` made, by dotted name."""
    given = vars(args).items()
    return {dest.removeprefix(_FLAG_DEST): value for dest, value in given if dest.startswith(_FLAG_DEST)}


class _StoreSetting(argparse.Action):
    """Keeps the text and the flag's spelling; lists may be given as one flag with commas or as several flags."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        value = "true" if values is None else str(values)
        setting = SETTINGS[self.dest.removeprefix(_FLAG_DEST)]
        before = getattr(namespace, self.dest, None)
        if setting.kind == "list" and before is not None:
            value = f"{before.value},{value}"
        setattr(namespace, self.dest, FlagValue(option_string or self.option_strings[0], value))


def _flag_help(setting: Setting) -> str:
    default = f" (default: {setting.default_text})" if setting.default_text else ""
    return (setting.help + default).replace("%", "%%")
