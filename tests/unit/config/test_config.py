"""Settings: every source, every kind of mistake, and the way back through the environment."""

from __future__ import annotations

import argparse
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.config import (
    SETTINGS,
    FlagValue,
    Setting,
    Settings,
    add_flags,
    cluster_secret,
    flags_of,
    load,
    load_settings,
    parse_size,
    parse_time,
    to_environ,
)
from kvferry.errors import ConfigError


def refused(*parts: str, **sources: object) -> None:
    with pytest.raises(ConfigError) as caught:
        load(**sources)  # type: ignore[arg-type]
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_nothing_given_gives_the_defaults():
    assert load() == Settings()


def test_later_sources_win():
    toml, env, flag = "[router]\nport = 1\n", {"KVFERRY_ROUTER_PORT": "2"}, {"router.port": FlagValue("--port", "3")}
    assert load(toml).router.port == 1
    assert load(toml, env).router.port == 2
    assert load(toml, env, flag).router.port == 3


def test_settings_are_frozen():
    with pytest.raises(AttributeError):
        load().router.port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("64MiB", 64 << 20),
        ("64 MiB", 64 << 20),
        ("1.5KiB", 1536),
        ("2GB", 2 * 10**9),
        ("7B", 7),
    ],
)
def test_sizes(text: str, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "seconds"), [("2s", 2.0), ("250ms", 0.25), ("3", 3.0), ("1.5min", 90.0), ("1h", 3600.0), ("5us", 5e-6)]
)
def test_times(text: str, seconds: float):
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1.5", "1 2", "64mib", "64M", "nan", "inf", "0x10", "1e400", "٣"])
def test_what_is_no_size(text: str):
    with pytest.raises(ValueError):
        parse_size(text)


@pytest.mark.parametrize("text", ["", "s", "-1s", "2m", "2 s s", "nan", "inf", "1m30s"])
def test_what_is_no_time(text: str):
    with pytest.raises(ValueError):
        parse_time(text)


@given(st.text(max_size=30))
def test_any_text_is_a_quantity_or_a_value_error(text: str):
    for parse in (parse_size, parse_time):
        try:
            assert parse(text) >= 0
        except ValueError as error:
            assert str(error)


@given(st.integers(0, 10**6), st.sampled_from(["KiB", "MiB", "GiB"]))
def test_size_units_are_powers_of_1024(count: int, unit: str):
    assert parse_size(f"{count}{unit}") == count * 1024 ** (["KiB", "MiB", "GiB"].index(unit) + 1)


def test_unknown_names_are_errors_that_name_the_nearest():
    refused("my.toml", "[rooter]", "router?", toml_text="[rooter]\n", toml_source="my.toml")
    refused("kvferry.toml", "router.ttl is", "router.ttl_s?", toml_text="[router]\nttl = 3\n")
    refused("handoff.lease_ttl_s?", toml_text="[router]\nlease_ttl_s = 3\n")
    refused("KVFERRY_ROUTER_PROT", "KVFERRY_ROUTER_PORT?", environ={"KVFERRY_ROUTER_PROT": "1"})
    refused("--x", "router.port?", flags={"router.prot": FlagValue("--x", "1")})
    refused("section", toml_text="router = 3\n")
    refused("no TOML", toml_text="[router\n")


@pytest.mark.parametrize(
    ("variable", "value", "parts"),
    [
        ("ROUTER_PORT", "70000", ["65535"]),
        ("ROUTER_PORT", "eighty", ["no whole number"]),
        ("ROUTER_PORT", "", ["no whole number"]),
        ("ROUTER_TTL_S", "0s", ["> 0", "250ms"]),
        ("ROUTER_TTL_S", "3mS", ["'mS'", "did you mean ms?"]),
        ("TRANSFER_MAX_IN_FLIGHT_BYTES", "64mib", ["did you mean MiB?"]),
        ("TRANSFER_VERIFY_DIGEST", "maybe", ["neither true nor false"]),
        ("HANDOFF_ON_FAILURE", "recomput", ["did you mean recompute?", "fail"]),
        ("ENGINE_ROLE", "prefil", ["did you mean prefill?"]),
        ("ENGINE_BLOCK_SIZE", "0", [">= 1"]),
    ],
)
def test_bad_values_name_the_variable(variable: str, value: str, parts: list[str]):
    refused(f"environment variable KVFERRY_{variable}", *parts, environ={f"KVFERRY_{variable}": value})


def test_bad_values_in_the_file_name_the_key():
    refused("kvferry.toml: router.port", "bool", toml_text="[router]\nport = true\n")
    refused("kvferry.toml: transfer.transports", toml_text="[transfer]\ntransports = [1]\n")
    refused("kvferry.toml: handoff.digest", "use one of none, sum, xxh3", toml_text="[handoff]\ndigest = true\n")
    refused("kvferry.toml: router.ttl_s", "250ms", toml_text="[router]\nttl_s = -1\n")
    refused("kvferry.toml: router.ttl_s", toml_text="[router]\nttl_s = nan\n")
    refused("flag --port", "'x'", flags={"router.port": FlagValue("--port", "x")})


def test_lists_units_and_none():
    settings = load(
        '[transfer]\ntransports = ["tcp"]\nmax_in_flight_bytes = "1MiB"\n'
        '[router]\nttl_s = "2500ms"\n[engine]\nmodel = "m"\n',
        {"KVFERRY_ROUTER_PREFILL": "http://a, http://b", "KVFERRY_ENGINE_MODEL": ""},
    )
    assert settings.transfer.transports == ("tcp",)
    assert settings.transfer.max_in_flight_bytes == 1 << 20
    assert settings.router.ttl_s == 2.5
    assert settings.router.prefill == ("http://a", "http://b")
    assert settings.engine.model is None


def test_foreign_variables_are_left_alone():
    assert load(environ={"PATH": "/bin", "KVFERRY_TEST_X": "1", "KVFERRY_CONFIG": ""}) == Settings()


def test_a_heartbeat_must_fit_its_lease():
    refused("router.heartbeat_s", "router.ttl_s", toml_text='[router]\nheartbeat_s = "2s"\n')
    refused("handoff.lease_ttl_s", "hold 3", environ={"KVFERRY_HANDOFF_LEASE_TTL_S": "2900ms"})
    assert load(environ={"KVFERRY_HANDOFF_LEASE_TTL_S": "3s"}).handoff.lease_ttl_s == 3.0


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("HANDOFF_LISTEN", "7000", "tcp://host:port"),
        ("HANDOFF_LISTEN", "127.0.0.1:7000", "tcp://host:port"),
        ("HANDOFF_LISTEN", "tcp://127.0.0.1", "tcp://host:port"),
        ("HANDOFF_LISTEN", "tcp://127.0.0.1:70000", "tcp://host:port"),
        ("POOL_LISTEN", "unix://x:1", "tcp://host:port"),
        ("ENGINE_POOL", "node7", "tcp://host:port"),
        ("CLUSTER_ROUTER_URL", "router:8000", "http://host:port"),
        ("CLUSTER_ROUTER_URL", "tcp://router:8000", "http://host:port"),
    ],
)
def test_what_is_no_address_is_said_before_anything_starts(variable: str, value: str, expected: str):
    refused(f"environment variable KVFERRY_{variable}", value, expected, environ={f"KVFERRY_{variable}": value})


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ROUTER_HOST", "0.0.0.0"),
        ("ENGINE_HOST", "::"),
        ("HANDOFF_LISTEN", "tcp://10.0.0.1:0"),
        ("POOL_LISTEN", "tcp://[::]:1"),
    ],
)
def test_listening_beyond_loopback_needs_a_secret(variable: str, value: str):
    environ = {f"KVFERRY_{variable}": value}
    refused(f"KVFERRY_{variable}", "secret", environ=environ)
    load(environ=environ | {"KVFERRY_CLUSTER_SECRET": "x" * 16})
    load(environ=environ | {"KVFERRY_CLUSTER_SECRET_FILE": "/somewhere"})


def test_a_bad_secret_is_not_shown():
    with pytest.raises(ConfigError) as caught:
        load(environ={"KVFERRY_CLUSTER_SECRET": "tooshort"})
    assert "16" in str(caught.value) and "tooshort" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        load('[cluster]\nsecret = ["hush"]\n')
    assert "cluster.secret" in str(caught.value) and "hush" not in str(caught.value)


def test_the_secret_file(tmp_path: Path):
    path = tmp_path / "secret"
    settings = load(environ={"KVFERRY_CLUSTER_SECRET_FILE": str(path)})
    with pytest.raises(ConfigError, match="cannot be read"):
        cluster_secret(settings)
    path.write_text("0123456789abcdef\n")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        cluster_secret(settings)
    path.chmod(0o600)
    assert cluster_secret(settings) == b"0123456789abcdef"
    path.write_text("\n")
    with pytest.raises(ConfigError, match="empty"):
        cluster_secret(settings)
    path.write_text("short")
    with pytest.raises(ConfigError, match="16"):
        cluster_secret(settings)
    assert cluster_secret(load()) is None


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(made, "router", "cluster", "handoff", bare=("router", "cluster"))
    return made


def test_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    args = parser().parse_args(
        ["--port", "9", "--handoff-deadline-s", "2s", "--prefill", "a", "--prefill", "b,c", "--handoff-digest", "none"]
    )
    assert flags_of(args)["router.port"] == FlagValue("--port", "9")
    monkeypatch.chdir(tmp_path)
    for name in [s.variable for s in SETTINGS.values()]:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "kvferry.toml").write_text("[router]\nport = 7\nhost = 'localhost'\n")
    settings = load_settings(args)
    assert (settings.router.port, settings.router.host, settings.handoff.deadline_s) == (9, "localhost", 2.0)
    assert settings.router.prefill == ("a", "b", "c")
    assert settings.handoff.digest == "none"
    assert load_settings().router.port == 7
    monkeypatch.setenv("KVFERRY_CONFIG", "")
    assert load_settings().router.port == 8000
    monkeypatch.setenv("KVFERRY_CONFIG", "absent.toml")
    with pytest.raises(ConfigError, match=r"absent\.toml"):
        load_settings()


def test_what_a_command_decides_itself_has_no_flag():
    made = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(made, "engine", without=("engine.role",))
    assert "--engine-role" not in made.format_help() and "--engine-host" in made.format_help()


def test_the_secret_has_no_flag(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parser().parse_args(["--secret", "x" * 16])
    assert "--secret-file" in parser().format_help()
    capsys.readouterr()


def valid_value(setting: Setting) -> st.SearchStrategy[object]:
    words = st.text(string.ascii_lowercase + "/:.", min_size=1, max_size=12)
    match setting.kind:
        case "bool":
            values: st.SearchStrategy[object] = st.booleans()
        case "choice":
            values = st.sampled_from(setting.choices)
        case "int":
            values = st.integers(1, 65535)
        case "float":
            values = st.floats(1e-3, 1e6)
        case "list":
            values = st.lists(words).map(tuple)
        case _:
            values = words
    return st.none() | values if setting.optional else values


@given(st.data())
def test_to_environ_and_back(data: st.DataObject):
    """Whatever the tree holds, a child that gets it through the environment holds the same."""
    paired = ("heartbeat_s", "ttl_s", "lease_ttl_s", "host", "listen", "router_url", "pool", "secret")
    names = [s for s in SETTINGS.values() if s.key not in paired]
    chosen = data.draw(st.lists(st.sampled_from(names), unique_by=lambda s: s.name, max_size=8))
    environ = to_environ(load())
    tree: dict[str, dict[str, object]] = {}
    for setting in chosen:
        tree.setdefault(setting.section, {})[setting.key] = data.draw(valid_value(setting))
    lines = []
    for section, keys in tree.items():
        lines.append(f"[{section}]")
        lines += [f"{k} = {toml(v)}" for k, v in keys.items() if v is not None]
    settings = load("\n".join(lines))
    environ = to_environ(settings)
    assert load(None, environ) == settings
    assert environ.pop("KVFERRY_CONFIG") == ""
    assert set(environ) <= {s.variable for s in chosen}


def toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def test_every_setting_is_explained():
    for setting in SETTINGS.values():
        assert setting.help, setting.name
        assert (setting.unit == "s") == setting.key.endswith("_s"), setting.name
        assert (setting.unit == "B") == setting.key.endswith("_bytes"), setting.name


def test_the_tree_repeats_the_transfer_engines_own_defaults():
    from kvferry.transfer import TransferSettings

    ours, theirs = Settings().transfer, TransferSettings()
    assert ours.max_in_flight_bytes == theirs.max_bytes_in_flight
    for name in ("worker_threads", "max_streams", "socket_buffer_bytes", "dead_after_s", "verify_digest"):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_a_default_is_shown_as_one_would_write_it():
    for setting in SETTINGS.values():
        if setting.default_text:
            settings = load(None, {setting.variable: setting.default_text})
            assert getattr(getattr(settings, setting.section), setting.key) == setting.default
        else:
            assert setting.default in (None, ())
    assert SETTINGS["router.max_body_bytes"].default_text == "16MiB"
    assert SETTINGS["handoff.lease_ttl_s"].default_text == "5s"
