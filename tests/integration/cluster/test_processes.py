"""Real child processes: they end with their parent however it ends, and tell why when they end too early."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import psutil
import pytest

from kvferry.cluster import Child
from kvferry.errors import PeerGone

SLEEP = "import time; print('up', flush=True); time.sleep(600)"


@pytest.fixture
async def child(tmp_path: Path) -> AsyncIterator[Callable[..., Child]]:
    made: list[Child] = []

    def start(code: str, name: str = "child") -> Child:
        one = Child(name, [sys.executable, "-c", code], os.environ, tmp_path / f"{name}.log")
        made.append(one)
        one.start()
        return one

    yield start
    for one in made:
        one.kill()


async def until(condition: Callable[[], object], what: str, within_s: float = 60.0) -> None:
    give_up_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < give_up_s, f"{what} within {within_s} s"
        await asyncio.sleep(0.02)


def is_gone(pid: int) -> bool:
    """True when no such process runs; one that only waits to be reaped counts as gone."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def test_a_child_tells_where_it_listens(child: Callable[..., Child]):
    one = child(
        "print('loading'); print('kvferry listening http://127.0.0.1:4711', flush=True); import time; time.sleep(600)"
    )
    await until(one.told_url, "a URL")
    assert one.url == "http://127.0.0.1:4711"
    assert one.exit_status() is None and not one.has_died
    await one.stop(60.0)
    assert one.exit_status() == -signal.SIGTERM and not one.has_died
    await one.stop(60.0)


async def test_what_an_earlier_run_wrote_to_the_same_log_is_not_this_childs_word(child: Callable[..., Child]):
    first = child("print('kvferry listening http://127.0.0.1:1', flush=True)")
    await until(lambda: first.exit_status() is not None, "the end of the first run")
    second = child("import time; time.sleep(0.3); print('kvferry listening http://127.0.0.1:2'); time.sleep(0)")
    assert second.told_url() is None
    await until(second.told_url, "a URL")
    assert second.url == "http://127.0.0.1:2"


async def test_a_child_that_dies_is_reported_with_its_last_lines(child: Callable[..., Child]):
    one = child("import sys; print('first'); sys.exit('no such model: m')", "decode-0")
    await until(lambda: one.has_died, "the child's end")
    why = one.why_it_died()
    assert "decode-0" in why and "ended with status 1" in why and "first" in why and "no such model: m" in why
    two = child("import os; os.kill(os.getpid(), 9)")
    await until(lambda: two.has_died, "the child's end")
    assert "killed by SIGKILL" in two.why_it_died()


async def test_a_program_that_is_not_there(tmp_path: Path):
    with pytest.raises(PeerGone, match="could not be started"):
        Child("x", ["/nonexistent/program"], {}, tmp_path / "x.log").start()


async def test_a_child_that_ignores_sigterm_or_is_stopped_is_killed(child: Callable[..., Child]):
    stubborn = child(f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}")
    await until(lambda: stubborn.tail(1) == ["up"], "the child's line")
    stopped = child(SLEEP, "stopped")
    await until(lambda: stopped.tail(1) == ["up"], "the child's line")
    assert stopped.pid is not None
    os.kill(stopped.pid, signal.SIGSTOP)
    await asyncio.gather(stubborn.stop(0.3), stopped.stop(0.3))
    assert stubborn.exit_status() == -signal.SIGKILL
    # Both signals wait for it when it is woken to die; which of them is named is the kernel's affair.
    assert stopped.exit_status() in (-signal.SIGKILL, -signal.SIGTERM)


async def test_grandchildren_end_with_their_child(child: Callable[..., Child]):
    code = f"""
        import os, signal, subprocess, sys, time
        grandchild = subprocess.Popen([sys.executable, "-c", {SLEEP!r}], stdout=subprocess.DEVNULL)
        print(grandchild.pid, flush=True)
        time.sleep(600)
    """
    for end in ("stop", "die"):
        one = child(textwrap.dedent(code), end)
        await until(lambda one=one: one.tail(1), "the grandchild's id")
        grandchild = int(one.tail(1)[0])
        assert one.pid is not None
        if end == "stop":
            await one.stop(60.0)
        else:
            os.kill(one.pid, signal.SIGKILL)
            await until(lambda one=one: one.has_died, "the child's end")
        await until(lambda pid=grandchild: is_gone(pid), "the grandchild's end")


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that starts two children with kvferry's Child and then waits."""
    code = f"""
        import os, sys, time, pathlib
        from kvferry.cluster import Child
        for name in ("a", "b"):
            child = Child(name, [sys.executable, "-c", {SLEEP!r}], os.environ, pathlib.Path({str(tmp_path)!r}) / name)
            child.start()
            print(child.pid, flush=True)
        time.sleep(600)
    """
    argv = [sys.executable, "-c", textwrap.dedent(code)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's watch on the parent is Linux's")
async def test_children_end_when_their_parent_is_killed(parent: subprocess.Popen[str], tmp_path: Path):
    assert parent.stdout is not None
    pids = [int(parent.stdout.readline()) for _ in range(2)]
    await until(lambda: (tmp_path / "b").exists() and (tmp_path / "b").read_text(), "the second child's line")
    assert not any(map(is_gone, pids))
    os.kill(pids[0], signal.SIGSTOP)
    parent.kill()
    await until(lambda: all(map(is_gone, pids)), "the end of both children")
