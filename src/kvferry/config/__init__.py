"""One tree of settings: defaults < kvferry.toml < environment < flags. An unknown key or a bad value is an error.

    kvferry.toml          [router]            environment               flag
                          ttl_s = "3s"        KVFERRY_ROUTER_TTL_S=3s   --ttl-s 3s  or  --router-ttl-s 3s

A setting is one annotated field below: its type, bounds, default and help text are written once, and the file, the
environment, the flags and the error messages all read them from here. Sizes and times take units (`64MiB`, `250ms`);
a bare number means bytes or seconds. `load` is pure; `load_settings` reads the file and the process environment.
"""

from __future__ import annotations

from kvferry.config._flags import FlagValue, add_flags, flags_of
from kvferry.config._load import (
    CONFIG_FILE,
    CONFIG_VARIABLE,
    cluster_secret,
    load,
    load_settings,
    to_environ,
)
from kvferry.config._tree import (
    ENVIRONMENT_PREFIX,
    SETTINGS,
    ClusterSettings,
    EngineSettings,
    HandoffSettings,
    LogSettings,
    RouterSettings,
    Setting,
    Settings,
    TransferSettings,
)
from kvferry.config._units import parse_size, parse_time

__all__ = [
    "CONFIG_FILE",
    "CONFIG_VARIABLE",
    "ENVIRONMENT_PREFIX",
    "SETTINGS",
    "ClusterSettings",
    "EngineSettings",
    "FlagValue",
    "HandoffSettings",
    "LogSettings",
    "RouterSettings",
    "Setting",
    "Settings",
    "TransferSettings",
    "add_flags",
    "cluster_secret",
    "flags_of",
    "load",
    "load_settings",
    "parse_size",
    "parse_time",
    "to_environ",
]
