"""Child processes that end with their parent, and that say why when they end too early."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kvferry.errors import PeerGone
from kvferry.observe import LISTENING

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.05
_TAIL_BYTES = 64 << 10


class Child:
    """One process, in a process group of its own, with standard output and error in one file.

    On Linux the kernel kills it when its parent dies, however the parent dies. `start` must run on the main thread:
    the kernel's watch is on the thread that forked.

    Args:
        environ: the whole environment of the process, not an addition.
        death_signal: what the kernel sends when the parent has died; SIGTERM for a process that has children itself.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        environ: Mapping[str, str],
        log_path: Path,
        *,
        death_signal: signal.Signals = signal.SIGKILL,
    ) -> None:
        self.name = name
        self.argv = tuple(argv)
        self.log_path = log_path
        self.url: str | None = None
        self._environ = dict(environ)
        self._death_signal = death_signal
        self._process: subprocess.Popen[bytes] | None = None
        self._started_s = 0.0
        self._log_start = 0
        self._stopping = False

    def start(self) -> None:
        """Start the process.

        Raises:
            PeerGone: the program could not be started.
        """
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()  # What an earlier run wrote before is not this process's word.
            try:
                self._process = subprocess.Popen(
                    self.argv,
                    env=self._environ,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    process_group=0,
                    preexec_fn=_end_with_parent(self._death_signal),
                )
            except OSError as error:
                raise PeerGone(f"{self.name} could not be started: {error} ({' '.join(self.argv)})") from error
        self._started_s = time.monotonic()

    @property
    def pid(self) -> int | None:
        """The process id; None before the start."""
        return self._process.pid if self._process is not None else None

    @property
    def age_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started_s

    def exit_status(self) -> int | None:
        """The exit status, negative for a signal; None while it runs or before the start.

        When it has ended, what it left behind in its process group ends too.
        """
        process = self._process
        if process is None or process.returncode is not None:
            return process.returncode if process is not None else None
        try:
            # Not reaped yet, so that its id can't be another's when its group is killed.
            if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                return None
            self._kill_group(process)
        except ChildProcessError:
            # Another part of this program has waited for it: Popen then gives the status 0.
            pass
        return process.wait()

    @property
    def has_died(self) -> bool:
        """True when it ended without being stopped by `stop`."""
        return not self._stopping and self.exit_status() is not None

    def why_it_died(self, num_lines: int = 12) -> str:
        """How it ended, with the last lines of its log; for a process that `has_died`."""
        status = self.exit_status()
        how = (
            f"was killed by {signal.Signals(-status).name}" if status and status < 0 else f"ended with status {status}"
        )
        lines = self.tail(num_lines)
        said = "".join(f"\n  {line}" for line in lines) if lines else " (none)"
        return f"{self.name} (pid {self.pid}) {how} after {self.age_s:.1f} s; last lines of {self.log_path}:{said}"

    def tail(self, num_lines: int) -> list[str]:
        """The last lines of its log, without empty ones."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(0, self.log_path.stat().st_size - _TAIL_BYTES))
                text = log.read().decode(errors="replace")
        except OSError:
            return []
        return [line.rstrip() for line in text.splitlines() if line.strip()][-num_lines:]

    def told_url(self) -> str | None:
        """The URL at which the process said that it listens; None while it has not."""
        if self.url is None:
            with contextlib.suppress(OSError), self.log_path.open(errors="replace") as log:
                log.seek(self._log_start)
                for line in log:
                    # A line without its end is still being written.
                    if line.startswith(LISTENING) and line.endswith("\n"):
                        self.url = line.removeprefix(LISTENING).strip()
                        break
        return self.url

    async def stop(self, grace_s: float) -> None:
        """Ask it to end, then kill its whole group after `grace_s`. Idempotent; returns when it has ended."""
        self._stopping = True
        if self._process is None:
            return
        if self.exit_status() is None:
            self._process.terminate()
            for _ in range(math.ceil(grace_s / _POLL_S)):
                if self.exit_status() is not None:
                    break
                await asyncio.sleep(_POLL_S)
        self.kill()

    def kill(self) -> None:
        """Kill the process and what is left of its group, at once. Idempotent."""
        self._stopping = True
        if self._process is not None and self.exit_status() is None:
            self._kill_group(self._process)
            self._process.wait()

    def _kill_group(self, process: subprocess.Popen[bytes]) -> None:
        """Only while the leader is not reaped: its id is surely its own until then."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def _end_with_parent(death_signal: signal.Signals) -> Callable[[], None] | None:
    if sys.platform != "linux":
        return None
    # Looked up before the fork: between fork and exec only what is already loaded may be used.
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def in_child() -> None:
        prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return in_child
