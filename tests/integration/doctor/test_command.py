"""`kvferry doctor` as a process: exit status, JSON, tables, and inputs that cannot be used."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

P2P = '{"kv_connector":"NixlConnector","kv_role":"kv_both"}'


def doctor(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvferry.cli", "doctor", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        env={**os.environ, "COLUMNS": "160"},
    )


def free_ports(count: int) -> list[int]:
    """Ports below the ephemeral range that nobody holds."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(12000, 18000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            found += [port] if port not in found else []
    return found


@pytest.fixture
def sides(tmp_path: Path) -> Path:
    ports = free_ports(4)
    for i, name in enumerate(("p", "d")):
        text = (
            f"CUDA_VISIBLE_DEVICES={i}\nVLLM_NIXL_SIDE_CHANNEL_PORT={ports[i]}\n"
            f"COMMAND=vllm serve m --port {ports[2 + i]} --kv-transfer-config '{P2P}'\n"
        )
        (tmp_path / f"{name}.env").write_text(text)
    return tmp_path


def test_nothing_wrong_is_exit_status_0(sides: Path) -> None:
    done = doctor("--prefill", "p.env", "--decode", "d.env", cwd=sides)
    assert done.returncode == 0, done.stdout
    assert "Nothing wrong found" in done.stdout
    done = doctor("--prefill", "p.env", "--decode", "d.env", "--json", cwd=sides)
    assert (done.returncode, json.loads(done.stdout)) == (0, {"findings": []})


def test_errors_are_exit_status_1_with_complete_findings(sides: Path) -> None:
    text = (sides / "d.env").read_text()
    (sides / "d.env").write_text(text.replace("CUDA_VISIBLE_DEVICES=1", "CUDA_VISIBLE_DEVICES=0"))
    done = doctor("--prefill", "p.env", "--decode", "d.env", "--json", cwd=sides)
    assert done.returncode == 1
    findings = json.loads(done.stdout)["findings"]
    assert [f["id"] for f in findings] == ["KVF040"]
    assert set(findings[0]) == {"id", "severity", "title", "seen", "why", "fix"}
    assert all(findings[0].values())
    table = doctor("--prefill", "p.env", "--decode", "d.env", cwd=sides)
    assert "KVF040 error" in table.stdout
    assert "CUDA_VISIBLE_DEVICES=1" in table.stdout


def test_warnings_alone_are_exit_status_0(sides: Path) -> None:
    with (sides / "d.env").open("a") as f:
        f.write("GLOO_SOCKET_IFNAME=lo\n")
    done = doctor("--prefill", "p.env", "--decode", "d.env", "--json", cwd=sides)
    assert done.returncode == 0
    assert [f["severity"] for f in json.loads(done.stdout)["findings"]] == ["warning"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--prefill", "nowhere.env"], "nowhere.env: cannot be read"),
        (["--decode", "999999999"], "there is no such process"),
        (["--config", "broken.json"], "broken.json: is not JSON"),
        (["--logs", "nowhere.log"], "nowhere.log: cannot be read"),
        (["logs", "nowhere.log"], "nowhere.log: cannot be read"),
        ([], "nothing to examine"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_unusable_input_is_exit_status_2_with_a_message(tmp_path: Path, arguments: list[str], told: str) -> None:
    (tmp_path / "broken.json").write_text("{")
    done = doctor(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_a_probe_of_this_machine_moves_and_measures(tmp_path: Path) -> None:
    done = doctor("--probe", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bind, connect, handshake, transfer, verify, metadata" in " ".join(done.stdout.replace("│", " ").split())
    assert "64 MiB in" in " ".join(done.stdout.split())
    assert "GB/s" in done.stdout


def test_logs_tell_one_paragraph_and_give_the_status(tmp_path: Path) -> None:
    (tmp_path / "prefill.log").write_text("INFO 11-22 10:00:00 [engine.py:310] Added request cmpl-a-0.\n")
    (tmp_path / "decode.log").write_text("ERROR 11-22 10:00:02 [n.py:827] Handshake failed for request cmpl-a-0\n")
    done = doctor("logs", "prefill.log", "decode.log", cwd=tmp_path)
    assert done.returncode == 1
    assert "first cause" in done.stdout
    assert "KVF200" in done.stdout
    assert json.loads(doctor("logs", "prefill.log", "--json", cwd=tmp_path).stdout) == {"findings": []}


def test_following_a_log_shows_lines_as_they_come(tmp_path: Path) -> None:
    log = tmp_path / "decode.log"
    log.write_text("INFO 11-22 10:00:00 [engine.py:310] Added request cmpl-a-0.\n")
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "kvferry.cli", "doctor", "logs", str(log), "--follow"],
        stdout=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has them ignore it, and their children too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        assert "1 lines" in process.stdout.readline()
        time.sleep(0.5)
        with log.open("a") as f:
            f.write("ERROR 11-22 10:00:02 [n.py:827] Handshake failed for request cmpl-a-0\n")
        seen = ""
        while "handshake between the sides failed" not in seen:
            seen = process.stdout.readline()
            assert seen or process.poll() is None
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(60) == 1
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
