"""The ceiling of TCP: plain sockets, no protocol, contiguous memory on both sides, the best of 1, 2 and 4 streams."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from kvferry.transfer.bench.cases import Plan, fill
from kvferry.transfer.bench.systems import Owner, Read, Reader, System, each

STREAMS = (1, 2, 4)
_BUFFER_BYTES = 256 << 10
_REQUEST = struct.Struct("<QQ")


class _SocketOwner(Owner):
    """Answers each (offset, length) with that many bytes."""

    def __init__(self, nbytes: int) -> None:
        self._memory = np.empty(nbytes, dtype=np.uint8)
        fill(self._memory)
        self._listener = socket.socket()
        _size_buffers(self._listener)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(8)
        threading.Thread(target=self._accept, daemon=True).start()

    def hello(self) -> dict[str, Any]:
        return {"port": self._listener.getsockname()[1]}

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        view = memoryview(self._memory.data)
        with contextlib.suppress(OSError):
            while len(request := sock.recv(_REQUEST.size, socket.MSG_WAITALL)) == _REQUEST.size:
                offset, length = _REQUEST.unpack(request)
                sock.sendall(view[offset : offset + length])


class _SocketReader(Reader):
    def __init__(self, nbytes: int, hello: dict[str, Any]) -> None:
        self.memory = np.zeros(nbytes, dtype=np.uint8)
        self._sockets = [_connect(hello["port"]) for _ in range(max(STREAMS))]
        self._pool = ThreadPoolExecutor(max(STREAMS))

    def prepare(self, plan: Plan) -> Read:
        view = memoryview(self.memory.data)
        if plan.case.is_latency:
            size = plan.case.block_bytes
            source, target = plan.source.tolist(), plan.target.tolist()

            def one(index: int) -> None:
                at = target[index]
                _fetch(self._sockets[0], source[index], view[at : at + size])

            return each(plan, one)
        total = plan.case.total_bytes

        def with_streams(count: int) -> float:
            part = total // count
            began = time.perf_counter()
            jobs = [
                self._pool.submit(_fetch, self._sockets[i], i * part, view[i * part : (i + 1) * part])
                for i in range(count)
            ]
            for job in jobs:
                job.result()
            return time.perf_counter() - began

        # The ceiling is the best count, found here, once, outside of what is timed.
        best = min(STREAMS, key=lambda count: min(with_streams(count) for _ in range(2)))
        return lambda: _ignore(with_streams(best))

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()


def _ignore(_value: float) -> None:
    return


def _size_buffers(sock: socket.socket) -> None:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)


def _connect(port: int) -> socket.socket:
    sock = socket.socket()
    _size_buffers(sock)
    sock.connect(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _fetch(sock: socket.socket, offset: int, into: memoryview) -> None:
    sock.sendall(_REQUEST.pack(offset, len(into)))
    while into:
        into = into[sock.recv_into(into, 0, socket.MSG_WAITALL) :]


class Socket(System):
    name, ceiling = "socket", "socket"

    @classmethod
    def owner(cls, nbytes: int) -> Owner:
        return _SocketOwner(nbytes)

    @classmethod
    def reader(cls, nbytes: int, hello: dict[str, Any]) -> Reader:
        return _SocketReader(nbytes, hello)
