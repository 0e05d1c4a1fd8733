"""The command line: quick help, clear ends, and no room imported before it is asked for."""

from __future__ import annotations

import argparse
import subprocess
import sys
import types
from collections.abc import Callable

import pytest

from kvferry import __version__, cli
from kvferry.errors import PeerGone


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[argparse.Namespace], int]], None]:
    """Puts a room of the test's own behind `kvferry top`."""

    def install(run: Callable[[argparse.Namespace], int]) -> None:
        def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
            parser = subparsers.add_parser("top", help="of the test")
            parser.add_argument("--port", type=int)
            parser.set_defaults(run=run)

        module = types.ModuleType("kvferry_test_room")
        module.add_parser = add_parser  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "kvferry_test_room", module)
        monkeypatch.setitem(cli.COMMANDS, "top", cli.Command("kvferry_test_room", "of the test"))

    return install


def test_help_lists_every_command_and_imports_no_room():
    code = (
        "import sys; from kvferry.cli import make_parser; text = make_parser(None).format_help(); print(text);"
        "rooms = [m for m in sys.modules if m.startswith('kvferry.') and m not in ('kvferry.cli', 'kvferry.errors')];"
        "assert not rooms, rooms; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    for name in cli.COMMANDS:
        assert f"  {name} " in done.stdout


def test_the_exit_status_is_the_commands_own(room: Callable[..., None]):
    room(lambda args: args.port)
    assert cli.main(["top", "--port", "7"]) == 7


def test_a_kverror_ends_with_one_line_and_status_2(room: Callable[..., None], capsys: pytest.CaptureFixture[str]):
    def run(args: argparse.Namespace) -> int:
        raise PeerGone("no answer from 127.0.0.1:1; start the router", stage="waiting")

    room(run)
    assert cli.main(["top"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "kvferry: no answer from 127.0.0.1:1; start the router [stage waiting]\n")


def test_a_bug_keeps_its_traceback(room: Callable[..., None]):
    def run(args: argparse.Namespace) -> int:
        raise AssertionError("a bug")

    room(run)
    with pytest.raises(AssertionError, match="a bug"):
        cli.main(["top"])


def test_ctrl_c_ends_with_130(room: Callable[..., None], capsys: pytest.CaptureFixture[str]):
    def run(args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    room(run)
    assert cli.main(["top"]) == 130
    assert capsys.readouterr().err == "kvferry: interrupted\n"


def test_a_missing_extra_says_how_to_install_it(room: Callable[..., None], capsys: pytest.CaptureFixture[str]):
    def run(args: argparse.Namespace) -> int:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    room(run)
    assert cli.main(["top"]) == 2
    assert "pip install 'kvferry[engine]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["tpo"], "did you mean top?"),
        (["top", "--prot", "1"], "did you mean --port?"),
        (["top", "--por", "1"], "--por is unknown to kvferry top"),
        (["--versoin"], "did you mean --version?"),
        (["top", "extra"], "extra is unknown"),
    ],
)
def test_unknown_words_name_the_nearest(
    room: Callable[..., None], capsys: pytest.CaptureFixture[str], line: list[str], said: str
):
    room(lambda args: 0)
    assert cli.main(line) == 2
    assert said in capsys.readouterr().err


def test_bad_flag_values_and_no_command_end_with_2(room: Callable[..., None], capsys: pytest.CaptureFixture[str]):
    room(lambda args: 0)
    with pytest.raises(SystemExit) as ended:
        cli.main(["top", "--port", "x"])
    assert ended.value.code == 2
    assert "--port" in capsys.readouterr().err
    assert cli.main([]) == 2
    assert "commands" in capsys.readouterr().out


def test_python_m_kvferry():
    line = [sys.executable, "-m", "kvferry", "--version"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, f"kvferry {__version__}\n")
