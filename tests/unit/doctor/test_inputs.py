"""Env files and configs: what is taken, and what an unusable one is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvferry.config import load
from kvferry.doctor import Facts
from kvferry.doctor.command import _secret
from kvferry.doctor.facts import Side
from kvferry.doctor.inputs import parse_env_file, read_config, read_side
from kvferry.errors import ConfigError


def test_an_env_file_takes_what_shells_write() -> None:
    text = (
        "# prefill\nexport A=1\nB='two words'\nC=three # a remark\n\n"
        'COMMAND=CUDA_VISIBLE_DEVICES=0 vllm serve m \\\n  --port 8100 --kv-transfer-config \'{"kv_role":"kv_both"}\'\n'
    )
    environment, command = parse_env_file(text, "p.env")
    assert environment == {"A": "1", "B": "two words", "C": "three", "CUDA_VISIBLE_DEVICES": "0"}
    assert command == ("vllm", "serve", "m", "--port", "8100", "--kv-transfer-config", '{"kv_role":"kv_both"}')


def test_variables_of_earlier_lines_are_put_in_and_what_only_a_pod_knows_is_unknown(tmp_path: Path) -> None:
    text = "IP1=10.0.0.1\nVLLM_HOST_IP=${IP1}\nMASTER_ADDR=$IP1\nVLLM_NIXL_SIDE_CHANNEL_HOST=$(POD_IP)\nX=${Y:-1}\n"
    (tmp_path / "p.env").write_text(text)
    side = read_side("prefill", str(tmp_path / "p.env"), "prefill")
    assert side.environment == {"IP1": "10.0.0.1", "VLLM_HOST_IP": "10.0.0.1", "MASTER_ADDR": "10.0.0.1"}
    assert side.unknown == {"VLLM_NIXL_SIDE_CHANNEL_HOST", "X"}
    assert side.sets("X") and side.sets("IP1") and not side.sets("Z")


def test_what_env_prints_and_what_proc_holds_are_taken_too() -> None:
    printed = "A=1\nBASH_FUNC_which%%=() {  ( alias;\n eval ${which_declare} )\n}\nB=2\n"
    assert parse_env_file(printed, "p.env")[0] == {"A": "1", "B": "2"}
    assert parse_env_file("A=1\0B=two words\0", "environ")[0] == {"A": "1", "B": "two words"}


def test_a_command_in_quotes_is_one_command() -> None:
    _, command = parse_env_file('COMMAND="vllm serve m --port 1"\n', "p.env")
    assert command == ("vllm", "serve", "m", "--port", "1")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("just words\n", "line 1: 'just words' is not KEY=VALUE"),
        ("A=1\n=2\n", "line 2"),
        ("COMMAND=vllm 'serve\n", "COMMAND cannot be taken apart"),
        ("\n# nothing\n", "is empty"),
    ],
)
def test_an_unusable_env_file_is_named_with_its_line(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=r"p\.env") as error:
        parse_env_file(text, "p.env")
    assert told in error.value.message


def test_a_missing_file_and_a_missing_process_say_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a pid or a text file of KEY=VALUE lines"):
        read_side("prefill", str(tmp_path / "no.env"), "prefill")
    with pytest.raises(ConfigError, match="there is no such process"):
        read_side("decode", "999999999", "decode")


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("mooncake.json", "{", "is not JSON"),
        ("mooncake.json", "[1]", "expected an object"),
        ("kvferry.toml", "= 3", "is not TOML"),
    ],
)
def test_an_unusable_config_is_named(tmp_path: Path, name: str, text: str, told: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=name) as error:
        read_config(str(path))
    assert told in error.value.message


def test_a_sides_own_mooncake_json_is_read_beside_its_description(tmp_path: Path) -> None:
    (tmp_path / "mooncake.json").write_text('{"metadata_server": "P2PHANDSHAKE"}')
    (tmp_path / "p.env").write_text("MOONCAKE_CONFIG_PATH=./mooncake.json\nVLLM_VERSION=0.26.0\n")
    side = read_side("prefill", str(tmp_path / "p.env"), "prefill")
    assert side.mooncake == {"metadata_server": "P2PHANDSHAKE"}
    assert side.versions == {"vllm": "0.26.0"}


def test_the_secret_for_the_probe_is_an_instances_own_before_the_files_and_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KVFERRY_CLUSTER_SECRET", "o" * 32)
    side = Side("prefill", "prefill", "values", {"KVFERRY_CLUSTER_SECRET": "i" * 32})
    settings = load('[cluster]\nsecret = "ffffffffffffffffffffffffffffffff"\n')
    assert _secret(Facts(sides=(side,), kvferry=settings)) == b"i" * 32
    assert _secret(Facts(kvferry=settings)) == b"f" * 32
    assert _secret(Facts(kvferry=load("[engine]\nblock_size = 16\n"))) == b"o" * 32
    monkeypatch.delenv("KVFERRY_CLUSTER_SECRET")
    assert _secret(Facts()) is None
