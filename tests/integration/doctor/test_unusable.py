"""Inputs that are garbage, endless, gone or forbidden: each ends with a message that says which, and none hangs."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from kvferry.doctor import Facts, examine, reading
from kvferry.doctor import logs as doctor_logs
from kvferry.doctor.inputs import read_config, read_side
from kvferry.doctor.live import look_at_router
from kvferry.doctor.logs import read_logs
from kvferry.doctor.passage import probe_passage
from kvferry.doctor.reach import ask
from kvferry.errors import ConfigError

pytestmark = pytest.mark.timeout(120)


def told(read: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as error:
        read()
    return error.value.message


@pytest.mark.parametrize("name", ["/dev/zero", "directory", "loop.env"])
def test_what_is_no_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("directory").mkdir()
    Path("loop.env").symlink_to("loop.env")
    for read in (lambda: read_side("prefill", name, "p"), lambda: read_config(name), lambda: read_logs([name])):
        assert name in told(read)
        assert "cannot be read" in told(read)


def test_binary_input_is_told_as_such_and_a_binary_log_is_no_trouble(tmp_path: Path) -> None:
    path = tmp_path / "core"
    path.write_bytes(random.Random(3).randbytes(100_000))
    assert "it is not text" in told(lambda: read_side("decode", str(path), "d"))
    assert "it is not text" in told(lambda: read_config(str(path)))
    assert read_logs([str(path)]).findings == ()


def test_an_input_that_is_far_too_long_is_refused_and_of_a_log_the_end_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "huge"
    path.write_text("A=1\n" * 2_000_000)
    assert "8000000 bytes long" in told(lambda: read_side("prefill", str(path), "p"))
    monkeypatch.setattr(doctor_logs, "MAX_LOG_BYTES", 1 << 20)
    with path.open("a") as f:
        f.write("EngineDeadError: EngineCore encountered an issue\n")
    story = read_logs([str(path)])
    assert [f.finding for f in story.findings] == ["KVF213"]
    assert story.num_lines < 300_000


def test_a_pipe_is_read_to_its_end_and_one_without_end_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = str(tmp_path / "kubectl-logs")
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: Path(pipe).write_text("EngineDeadError: it ended\n"))
    writer.start()
    assert [f.finding for f in read_logs([pipe]).findings] == ["KVF213"]
    writer.join()
    monkeypatch.setattr(reading, "PIPE_S", 0.3)
    holder = os.open(pipe, os.O_RDWR)
    try:
        assert "did not end within" in told(lambda: read_logs([pipe]))
    finally:
        os.close(holder)


@pytest.mark.parametrize("pid", ["99999999999999999999999", "²", "0", "-1"])
def test_numbers_that_are_no_pids(pid: str) -> None:
    assert pid in told(lambda: read_side("prefill", pid, "p"))


def test_a_process_that_has_ended_and_one_that_nobody_waited_for() -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", "pass"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert "the process has ended" in told(lambda: read_side("prefill", str(process.pid), "p"))
    process.wait()
    assert "there is no such process" in told(lambda: read_side("prefill", str(process.pid), "p"))


def test_a_process_that_ends_while_it_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    status = psutil.Process.status

    def ended(self: psutil.Process) -> str:
        process.kill()
        process.wait()
        return status(self)

    monkeypatch.setattr(psutil.Process, "status", ended)
    try:
        assert "there is no such process" in told(lambda: read_side("decode", str(process.pid), "d"))
    finally:
        process.kill()
        process.wait()
        if process.stdin is not None:
            process.stdin.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_another_users_process_may_not_be_read() -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    try:
        os.seteuid(65534)
        try:
            message = told(lambda: read_side("prefill", str(process.pid), "p"))
        finally:
            os.seteuid(0)
    finally:
        process.communicate(b"\n")
    assert "as the same user or as root" in message


def test_json_and_toml_that_are_too_deep_or_broken(tmp_path: Path) -> None:
    deep = tmp_path / "mooncake.json"
    deep.write_text("[" * 100_000)
    assert "is not JSON" in told(lambda: read_config(str(deep)))
    toml = tmp_path / "kvferry.toml"
    toml.write_text("a = " + "[" * 100_000)
    assert "is not TOML" in told(lambda: read_config(str(toml)))
    (tmp_path / "p.env").write_text(f"COMMAND=vllm serve m --kv-transfer-config '{'[' * 5000}'\n")
    side = read_side("prefill", str(tmp_path / "p.env"), "prefill")
    assert [f.id for f in examine(Facts(sides=(side,)))] == ["KVF002"]


def test_a_config_with_a_byte_order_mark_is_fine(tmp_path: Path) -> None:
    path = tmp_path / "mooncake.json"
    path.write_bytes(b'\xef\xbb\xbf{"metadata_server": "P2PHANDSHAKE"}')
    assert read_config(str(path)) == ({"metadata_server": "P2PHANDSHAKE"}, None)


def test_the_command_itself_gives_status_2_and_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvferry.cli", "doctor", "--config", "/dev/zero", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=110, check=False)
    assert done.returncode == 2
    assert "/dev/zero: cannot be read (it is no file)" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert json.loads(done.stdout)["findings"] == []


def _drip(connection: socket.socket, end: threading.Event) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n")
    while not end.wait(0.05):
        connection.sendall(b"x")


def _endless(connection: socket.socket, end: threading.Event) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    while not end.is_set():
        connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")


def _silent(connection: socket.socket, end: threading.Event) -> None:
    end.wait()


def _noise(connection: socket.socket, end: threading.Event) -> None:
    connection.sendall(random.Random(1).randbytes(4000))


def _deep(connection: socket.socket, end: threading.Event) -> None:
    body = b"[" * 100_000
    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))


@contextlib.contextmanager
def serving(behave: Callable[[socket.socket, threading.Event], None]) -> Iterator[int]:
    """A server that takes connections and then behaves badly; its port."""
    end = threading.Event()
    threads: list[threading.Thread] = []

    def answer(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(5)
            connection.recv(65536)
            behave(connection, end)

    def accept(listener: socket.socket) -> None:
        while not end.is_set():
            with contextlib.suppress(OSError):
                thread = threading.Thread(target=answer, args=(listener.accept()[0],))
                thread.start()
                threads.append(thread)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)
        threads.append(threading.Thread(target=accept, args=(listener,)))
        threads[0].start()
        try:
            yield listener.getsockname()[1]
        finally:
            end.set()
            for thread in threads:
                thread.join()


@pytest.mark.parametrize("behave", [_drip, _endless, _silent, _noise, _deep])
def test_a_router_that_is_none_holds_nobody(
    behave: Callable[[socket.socket, threading.Event], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvferry.doctor.live.ASK_S", 0.5)
    monkeypatch.setattr("kvferry.doctor.passage.REQUEST_S", 0.5)
    with serving(behave) as port:
        url = f"http://127.0.0.1:{port}"
        assert [f.id for f in examine(look_at_router(Facts(), url))] == ["KVF100"]
        probed = probe_passage(url)
        assert probed.failure or probed.mangled
        assert ask("redis", "127.0.0.1", port) != "ok"


@pytest.mark.parametrize("url", ["http://[::1", "http://127.0.0.1:99999", "ftp//", "http://", "http://a b:80"])
def test_urls_that_are_none(url: str) -> None:
    assert [f.id for f in examine(look_at_router(Facts(), url))] == ["KVF100"]
    assert probe_passage(url).failure


def test_a_silent_name_server_does_not_hold_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    end = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: end.wait(50) and [])
    monkeypatch.setattr("kvferry.doctor.asking.RESOLVE_S", 0.2)
    monkeypatch.setattr("kvferry.doctor.live.ASK_S", 0.2)
    try:
        findings = examine(look_at_router(Facts(), "http://router.example:8000"))
    finally:
        end.set()
    assert [f.id for f in findings] == ["KVF100"]
    assert "no name server answered" in findings[0].seen
