"""The owner's half of the tcp transport: one thread for each data stream serves requests on its own regions.

Each request is checked against the live registrations before any byte leaves or lands. The lease's word is checked
after the last byte was copied out of the region (into the socket), and the verdict follows in the trailer (R2).
Good requests for one small block do not come here: `_stream.c` answers them by the same rules (see small_blocks).
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import threading
from collections.abc import Callable

import numpy as np

from kvferry.errors import KVError, RegistrationError, WireError
from kvferry.transport.base import Region, StopToken
from kvferry.transport.blocks import require_inside
from kvferry.transport.copying import SMALL_BYTES, Limits, load_word
from kvferry.transport.inproc import require_word
from kvferry.transport.registry import TransportContext
from kvferry.transport.small_blocks import BlockRequest, ServedRegions
from kvferry.transport.streams import (
    BROKEN,
    GOOD,
    MAX_STATUS_BYTES,
    PREFACE,
    STANDS,
    TRAILER,
    DataStream,
    Part,
    ReadRequest,
    Refused,
    WordRequest,
    WriteRequest,
    accept_stream,
    decode_request,
    prepare_socket,
    refusals,
    set_timeouts,
)
from kvferry.transport.vectors import Vectors, digest_of, vectors_of
from kvferry.wire import Refusals

HANDSHAKE_S = 5.0
MAX_STREAMS = 1024
"""Data streams served at once, over all peers; further ones are closed."""

_MAX_MESSAGE = MAX_STATUS_BYTES // 2


class StreamServer:
    """All data streams that peers opened to this side."""

    def __init__(self, context: TransportContext) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._busy: dict[DataStream, set[int]] = {}
        self._sockets: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._closed = False
        self._stop = StopToken()
        self.refusals = Refusals()
        self._small_blocks = ServedRegions()

    def adopt(self, sock: socket.socket, peer: str) -> None:
        """Serve a connection whose preface was read. Returns at once; the socket now belongs to this server."""
        thread = threading.Thread(target=self._serve, args=(sock, peer), name=f"kvferry-tcp-{peer}", daemon=True)
        with self._changed:
            if self._closed or len(self._sockets) >= MAX_STREAMS:
                sock.close()
                return
            self._sockets.add(sock)
            self._threads.add(thread)
            thread.start()

    def admit(self, region: Region) -> None:
        """Small blocks of this region, which peers are told of, are answered in C from now on."""
        self._small_blocks.admit(region)

    def withdraw(self, region_id: int) -> None:
        """Break off every transfer on this region; return when none touches it any more."""
        self._small_blocks.withdraw(region_id)
        with self._changed:
            for stream, regions in self._busy.items():
                if region_id in regions:
                    stream.abort()
            self._changed.wait_for(lambda: not any(region_id in regions for regions in self._busy.values()))

    def close(self) -> None:
        """Close every stream and join every thread. Idempotent."""
        with self._changed:
            self._closed = True
            self._stop.set()
            for sock in self._sockets:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            threads = list(self._threads)
        for thread in threads:
            thread.join()

    def _serve(self, sock: socket.socket, peer: str) -> None:
        try:
            sock.setblocking(True)
            stream = accept_stream(
                sock,
                settings=self._context.settings,
                secret=self._context.secret,
                incarnation=self._context.incarnation,
                limits=Limits(self._stop, HANDSHAKE_S, peer),
            )
            while True:
                self._answer(stream, stream.receive_request(self._small_blocks))
        except WireError as error:
            self.refusals.add(peer, error)
        except (KVError, OSError):
            # The reader closed the stream, or broke it off: it knows why, and nothing here depends on it.
            pass
        finally:
            with self._changed:
                self._sockets.discard(sock)
                self._threads.discard(threading.current_thread())
            sock.close()

    def _answer(self, stream: DataStream, payload: bytes) -> None:
        request = decode_request(payload)
        try:
            if isinstance(request, BlockRequest):
                stream.send(self._copy_block(stream, request))
                return
            if isinstance(request, WordRequest):
                wanted = {request.region_id: request.token}
            else:
                wanted = {part.region_id: part.token for part in request.parts}
            guard = request.guard if isinstance(request, ReadRequest) else None
            if guard is not None:
                wanted[guard[0]] = guard[1]
            regions = self._begin(stream, wanted, writing=isinstance(request, WriteRequest))
            try:
                match request:
                    case ReadRequest():
                        last = _serve_read(stream, request, _vectors(request.parts, regions), regions)
                    case WriteRequest():
                        last = _serve_write(stream, request, _vectors(request.parts, regions))
                    case WordRequest():
                        last = _serve_word(stream, request, regions[request.region_id])
            finally:
                self._end(stream)
            # Only now, for it ends the reader's wait: memory that is taken back from here on is in nobody's use, and
            # `withdraw` has no reason to break this stream off.
            stream.send(last)
        except RegistrationError as error:
            # Padded: a reader of one block takes that many bytes at once.
            refused = refusals.encode(Refused(error.cause, error.message[:_MAX_MESSAGE].ljust(TRAILER.size)))
            stream.send_frame(b"\1" + refused)

    def _copy_block(self, stream: DataStream, request: BlockRequest) -> bytes:
        """One small block behind its verdict, ready to be sent. Copied out here and now, so that the region need not be
        kept from being withdrawn while the bytes travel. Raises: RegistrationError."""
        with self._lock:
            regions = {request.region_id: self._require(request.region_id, request.token, False)}
            if request.guard is not None:
                regions[request.guard[0]] = self._require(request.guard[0], request.guard[1], False)
            region = regions[request.region_id]
            if not (0 < request.nbytes <= SMALL_BYTES and 0 <= request.offset <= region.nbytes - request.nbytes):
                raise RegistrationError(
                    f"offset {request.offset} and {request.nbytes} bytes are no small block inside of region "
                    f"{region.region_id}"
                )
            copied = ctypes.string_at(region.address + request.offset, request.nbytes)
            verdict = _verdict(request.guard, regions, bytes(16))
        return stream.session.seal(verdict) + copied

    def _begin(self, stream: DataStream, wanted: dict[int, str], *, writing: bool) -> dict[int, Region]:
        """The regions, kept from being withdrawn until `_end`. Raises: RegistrationError."""
        with self._changed:
            found = {region_id: self._require(region_id, token, writing) for region_id, token in wanted.items()}
            self._busy[stream] = set(wanted)
            return found

    def _end(self, stream: DataStream) -> None:
        with self._changed:
            del self._busy[stream]
            self._changed.notify_all()

    def _require(self, region_id: int, token: str, writing: bool) -> Region:
        region = self._context.find_region(region_id)
        if region is None or region.token != token:
            raise RegistrationError(
                f"region {region_id} is not registered there under this token: it was unregistered, or the token is "
                "wrong; use the peer's current regions"
            )
        if region.kind != "host":
            raise RegistrationError(f"region {region_id} is {region.kind} memory, which tcp cannot serve")
        if writing and not region.writable:
            raise RegistrationError(f"region {region_id} was not lent out for writing")
        return region


def _vectors(parts: tuple[Part, ...], regions: dict[int, Region]) -> Vectors:
    """uint64 [n, 2]. Raises: RegistrationError if the reader asks for bytes outside the regions."""
    rows = []
    for part in parts:
        region = regions[part.region_id]
        if part.nbytes < 1 or not part.offsets or len(part.offsets) % 8:
            raise RegistrationError(f"a request for blocks of {part.nbytes} bytes and no whole offsets makes no sense")
        offsets = np.frombuffer(part.offsets, dtype="<i8")
        require_inside(offsets, part.nbytes, region, "requested")
        rows.append(vectors_of(region.address, offsets, part.nbytes))
    if not rows:
        raise RegistrationError("a request without blocks makes no sense")
    return rows[0] if len(rows) == 1 else np.concatenate(rows)


def _serve_word(stream: DataStream, request: WordRequest, region: Region) -> bytes:
    require_word(request.offset, region.nbytes, stream.peer)
    word = load_word(region.address + request.offset)
    return stream.session.seal(GOOD) + stream.session.seal(TRAILER.pack(STANDS, word, bytes(16)))


def _serve_read(stream: DataStream, request: ReadRequest, vectors: Vectors, regions: dict[int, Region]) -> bytes:
    stream.send_frame(GOOD)
    stream.send_vectors(vectors)
    digest = digest_of(vectors) if request.digest else bytes(16)
    return stream.session.seal(_verdict(request.guard, regions, digest))


def _verdict(guard: tuple[int, str, int, int] | None, regions: dict[int, Region], digest: bytes) -> bytes:
    if guard is None:
        return TRAILER.pack(STANDS, 0, digest)
    region_id, _token, offset, word = guard
    region = regions[region_id]
    fits = 0 <= offset <= region.nbytes - 8 and offset % 8 == 0
    seen = load_word(region.address + offset) if fits else 0
    return TRAILER.pack(STANDS if fits and seen == word else BROKEN, seen, digest)


def _serve_write(stream: DataStream, request: WriteRequest, vectors: Vectors) -> bytes:
    stream.send_frame(GOOD)
    stream.receive_vectors(vectors)
    digest = digest_of(vectors) if request.digest else bytes(16)
    return stream.session.seal(TRAILER.pack(STANDS, 0, digest))


class StreamListener:
    """A listener of its own, for a tcp transport that no engine shares its listener with."""

    def __init__(self, host: str, adopt: Callable[[socket.socket, str], None], context: TransportContext) -> None:
        self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        prepare_socket(self._socket, context.settings)
        self._socket.bind((host, 0))
        self._socket.listen(128)
        self.address = f"{host}:{self._socket.getsockname()[1]}"
        self._adopt = adopt
        self._thread = threading.Thread(target=self._run, name="kvferry-tcp-accept", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                sock, address = self._socket.accept()
            except OSError:
                return
            peer = f"{address[0]}:{address[1]}"
            try:
                set_timeouts(sock, 1.0, 1.0)
                preface = sock.recv(len(PREFACE), socket.MSG_WAITALL)
            except OSError:
                preface = b""
            if preface == PREFACE:
                self._adopt(sock, peer)
            else:
                sock.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()
