"""Faults to inject on the way between two processes: a proxy that delays, corrupts, stalls and cuts; a network
namespace whose cable can be pulled."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import threading
import time


class FaultyLink:
    """A TCP proxy in front of a listener: connect to `address` instead. One thread for each direction."""

    def __init__(self, target: str) -> None:
        host, _, port = target.removeprefix("tcp://").rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.delay_s = 0.0
        self.refuse = False
        self.passed_bytes = 0
        self._corrupt_at: int | None = None
        self._cut_at: int | None = None
        self._flowing = threading.Event()
        self._flowing.set()
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._spawn(self._accept)

    def corrupt_after(self, nbytes: int) -> None:
        """Flip one bit of the byte that is `nbytes` further in what the target sends."""
        self._corrupt_at = self.passed_bytes + nbytes

    def cut_after(self, nbytes: int) -> None:
        """Cut every connection once the target has sent `nbytes` more."""
        self._cut_at = self.passed_bytes + nbytes

    def stall(self) -> None:
        """Hold everything back, in both directions, without closing anything."""
        self._flowing.clear()

    def resume(self) -> None:
        self._flowing.set()

    def cut(self) -> None:
        """Close every connection; new ones are made as before."""
        with self._lock:
            for sock in self._sockets:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Cut, stop listening, join all threads."""
        self.resume()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.refuse = True
        while True:
            self.cut()
            with self._lock:
                threads = list(self._threads)
            if not threads:
                return
            for thread in threads:
                thread.join(0.1)

    def _spawn(self, target: object, *args: object) -> None:
        def run() -> None:
            try:
                target(*args)  # type: ignore[operator]
            finally:
                with self._lock:
                    self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, name="kvferry-faulty-link", daemon=True)
        with self._lock:
            self._threads.add(thread)
            thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self._target, timeout=5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            if self.refuse:
                near.close()
                far.close()
                continue
            with self._lock:
                self._sockets |= {near, far}
            both = threading.Barrier(2)
            self._spawn(self._pump, near, far, False, both)
            self._spawn(self._pump, far, near, True, both)

    def _pump(self, source: socket.socket, target: socket.socket, watched: bool, both: threading.Barrier) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(64 << 10):
                if self.delay_s:
                    time.sleep(self.delay_s)
                self._flowing.wait()
                if watched:
                    data = self._harm(data)
                target.sendall(data)
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(threading.BrokenBarrierError):
            if both.wait() == 0:
                with self._lock:
                    self._sockets -= {source, target}
                source.close()
                target.close()

    def _harm(self, data: bytes) -> bytes:
        first, self.passed_bytes = self.passed_bytes, self.passed_bytes + len(data)
        if self._corrupt_at is not None and first <= self._corrupt_at < self.passed_bytes:
            at, self._corrupt_at = self._corrupt_at - first, None
            data = data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
        if self._cut_at is not None and self.passed_bytes >= self._cut_at:
            self._cut_at = None
            self.cut()
        return data


class NetworkNamespace:
    """A network of its own for a process, joined to this one by a virtual cable that can be pulled. Needs root."""

    def __init__(self) -> None:
        """Raises: OSError where namespaces can't be made; `why_not` says so beforehand for the common reasons."""
        tag = secrets.token_hex(3)
        self.name, self._near, self._far = f"kvferry-{tag}", f"kvn{tag}", f"kvf{tag}"
        net = f"10.{200 + secrets.randbelow(50)}.{secrets.randbelow(250)}"
        self.host, self.here = f"{net}.2", f"{net}.1"
        try:
            _ip("netns", "add", self.name)
            _ip("link", "add", self._near, "type", "veth", "peer", "name", self._far, "netns", self.name)
            _ip("addr", "add", f"{self.here}/24", "dev", self._near)
            _ip("link", "set", self._near, "up")
            for command in (
                ("addr", "add", f"{self.host}/24", "dev", self._far),
                ("link", "set", self._far, "up"),
                ("link", "set", "lo", "up"),
            ):
                _ip("-n", self.name, *command)
        except OSError:
            self.close()
            raise

    @staticmethod
    def why_not() -> str | None:
        """Why namespaces can't be made here; None where they probably can."""
        if os.geteuid() != 0:
            return "needs root to make a network namespace"
        return None if shutil.which("ip") else "needs the command `ip` (iproute2)"

    @property
    def prefix(self) -> tuple[str, ...]:
        """What to put before a command so that it runs inside."""
        return ("ip", "netns", "exec", self.name)

    def cut(self) -> None:
        """Pull the cable: packets vanish, nobody is told."""
        _ip("-n", self.name, "link", "set", self._far, "down")

    def mend(self) -> None:
        _ip("-n", self.name, "link", "set", self._far, "up")

    def close(self) -> None:
        """Remove it, with its cable. Idempotent."""
        for command in (("link", "del", self._near), ("netns", "del", self.name)):
            with contextlib.suppress(OSError):
                _ip(*command)


def _ip(*args: str) -> None:
    done = subprocess.run(["ip", *args], capture_output=True, text=True, timeout=10)
    if done.returncode:
        raise OSError(f"ip {' '.join(args)}: {done.stderr.strip()}")
