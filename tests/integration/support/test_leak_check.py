"""The leak check itself: it sees each kind of leak, and lets a clean test pass."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

CONFTEST = Path(__file__).parents[2] / "conftest.py"

LEAKS = """
import os, socket, subprocess, threading
import pytest

held = []

def test_memfd(): held.append(os.memfd_create("leaked-memory"))
def test_socket(): held.append(socket.socket())
def test_thread(): threading.Thread(target=threading.Event().wait, name="leaked-thread", daemon=True).start()
def test_child(): held.append(subprocess.Popen(["sleep", "20"]))
def test_shm(): open(f"/dev/shm/leaked-{os.getpid()}", "w").close()

def test_clean(): threading.Thread(target=lambda: None).start()

@pytest.mark.leaks_allowed
def test_marked(): held.append(socket.socket())

def test_end():
    os.unlink(f"/dev/shm/leaked-{os.getpid()}")
    held[2].kill()
    held[2].wait()
"""


def test_each_kind_of_leak_is_seen_and_nothing_else(pytester: pytest.Pytester):
    pytester.makeconftest(re.sub("LEAK_GRACE_S = .*", "LEAK_GRACE_S = 0.5", CONFTEST.read_text()))
    pytester.makeini("[pytest]\nmarkers =\n  leaks_allowed: x\nasyncio_mode = auto\n")
    (pytester.mkdir("integration") / "test_it.py").write_text(LEAKS)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-p", "no:randomly", "integration", timeout=110)
    result.assert_outcomes(passed=8, errors=5)
    said = result.stdout.str()
    for word in ("leaked-memory", "socket:[", "leaked-thread", "sleep 20", "shared memory", "leaked-"):
        assert word in said
    for name in ("test_memfd", "test_socket", "test_thread", "test_child", "test_shm"):
        assert f"ERROR at teardown of {name}" in said
