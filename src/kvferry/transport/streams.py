"""One authenticated TCP data stream: sealed frames for requests and verdicts, raw bytes straight into place between.

A stream begins with `KVFD`, so that a listener shared with control connections (which begin with `KVF1`) can tell
them apart, then the handshake of kvferry.wire. Afterwards the reader sends sealed requests; the owner answers each
with a sealed status, the raw bytes if the status is good, and a sealed trailer with its verdict.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import time
from typing import Literal

import msgspec

from kvferry.errors import KVError, PeerGone, TransferTimeout, WireError
from kvferry.transport import small_blocks
from kvferry.transport.copying import Limits
from kvferry.transport.registry import TransportSettings
from kvferry.transport.small_blocks import AWAKE_US, BUSY_S, BlockRequest, ServedRegions, receive_soon
from kvferry.transport.vectors import MAX_VECTORS, VectorCursor, Vectors, merge_adjacent, view_of
from kvferry.types import Incarnation
from kvferry.wire import HEADER, MAGIC, Codec, Frame, Handshake, Session

PREFACE = b"KVFD"
TICK_S = 0.05
"""How often a waiting reader looks at its stop token and deadline."""

MAX_REQUEST_BYTES = 4 << 20
MAX_STATUS_BYTES = 4096
REQUEST_BUFFER_BYTES = 64 << 10
VECTORS_PER_CALL = MAX_VECTORS
"""Blocks a system call: between two of them nothing moves, while a stream waits for the GIL and for Python."""


class Part(msgspec.Struct, frozen=True, array_like=True):
    """Blocks of `nbytes` of one of the owner's regions; `offsets` are little-endian int64."""

    region_id: int
    token: str
    nbytes: int
    offsets: bytes


class ReadRequest(msgspec.Struct, frozen=True, array_like=True, tag="r"):
    """Send these blocks in this order, then check the guard's word (region, token, offset, word)."""

    parts: tuple[Part, ...]
    guard: tuple[int, str, int, int] | None = None
    digest: bool = False


class WriteRequest(msgspec.Struct, frozen=True, array_like=True, tag="w"):
    """Take these blocks in this order."""

    parts: tuple[Part, ...]
    digest: bool = False


class WordRequest(msgspec.Struct, frozen=True, array_like=True, tag="l"):
    """Load 8 bytes; they come in the trailer."""

    region_id: int
    token: str
    offset: int


class Refused(msgspec.Struct, frozen=True, array_like=True):
    """A status that is not good: the error's cause and message."""

    cause: str
    message: str


Request = ReadRequest | WriteRequest | WordRequest
requests: Codec[Request] = Codec(Request)


def decode_request(payload: bytes) -> Request | BlockRequest:
    """Raises: WireError."""
    return BlockRequest.decode(payload) if BlockRequest.begins(payload) else requests.decode(payload)


refusals: Codec[Refused] = Codec(Refused)
GOOD = b"\0"
TRAILER = struct.Struct("<Bq16s")
"""Verdict, word seen, digest."""

STANDS, BROKEN = 0, 1
"""Verdicts: the guard's word stands (or there was none); it was another one."""

STATUS_FRAME_BYTES = HEADER.size + len(GOOD)
TRAILER_FRAME_BYTES = HEADER.size + TRAILER.size


class DataStream:
    """A blocking socket and its session. Used by one thread at a time; `abort` may be called from any."""

    def __init__(self, sock: socket.socket, session: Session, peer: str) -> None:
        self.socket, self.session, self.peer = sock, session, peer
        self._awake = False
        self._ahead = b""
        self._buffer: memoryview | None = None
        self._head = bytearray(TRAILER_FRAME_BYTES)

    def abort(self) -> None:
        """Wake whoever waits on this stream; their calls fail."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.abort()
        self.socket.close()

    def send_frame(self, payload: bytes, limits: Limits | None = None) -> None:
        """Raises: PeerGone, and what `limits` raises."""
        self.send(self.session.seal(payload), limits)

    def send(self, data: bytes | bytearray | memoryview, limits: Limits | None = None) -> None:
        """All of `data`. Raises: PeerGone, and what `limits` raises."""
        view = memoryview(data)
        while view:
            try:
                view = view[self.socket.send(view) :]
            except OSError as error:
                self._waited(error, limits)

    def receive(self, nbytes: int, limits: Limits | None = None) -> bytearray:
        """Exactly `nbytes`. Raises: PeerGone, and what `limits` raises."""
        data = bytearray(nbytes)
        self.receive_into(memoryview(data), limits)
        return data

    def receive_frame(self, max_bytes: int, limits: Limits | None = None, *, expect: int = 0) -> bytes:
        """The payload of the next sealed frame.

        Args:
            expect: payload bytes that there will be at least; read together with the header.
        Raises: WireError for a bad or too large frame, PeerGone, and what `limits` raises.
        """
        data = bytearray(HEADER.size + expect)
        self._await_frame(memoryview(data), limits)
        return self._open(data, max_bytes, limits, expect)

    def _open(self, data: bytearray, max_bytes: int, limits: Limits | None, expect: int) -> bytes:
        """The payload of the frame that begins with `data`, header and `expect` bytes of it."""
        magic, length, check = HEADER.unpack_from(data)
        if magic != MAGIC or length > max_bytes or length < expect:
            raise WireError(f"the data stream is out of step: a frame of {length} bytes with magic {magic!r}")
        if length > expect:
            data += self.receive(length - expect, limits)
        return self.session.open(Frame(check, bytes(data[HEADER.size :])))

    def ask_block(self, request: bytes, address: int, nbytes: int, limits: Limits) -> bytes | None:
        """Ask for a small block. None: it is in place, under a verdict that stands. Else the owner's answer, a trailer
        with another verdict or a refusal; then none of its bytes is.

        Raises: WireError, PeerGone, and what `limits` raises: then the place may hold some of the block.
        """
        if small_blocks.in_c is None:
            self.send_frame(request, limits)
            answer = self.receive_frame(MAX_STATUS_BYTES, limits, expect=TRAILER.size)
            if answer[0] != STANDS:
                return answer
            self.receive_into(view_of(address, nbytes), limits)
            return None
        fd, head, session, total = self.socket.fileno(), self._head, self.session, TRAILER_FRAME_BYTES + nbytes
        got, within_us, began_s = 0, AWAKE_US if self._awake else 0, time.perf_counter()
        while True:
            try:
                got = small_blocks.in_c.ask(
                    fd, request, session.out_key, session.num_sealed, session.in_key, session.num_opened,
                    head, address, nbytes, got, within_us,
                )  # fmt: skip
            except OSError as error:
                self._waited(error, limits)
            if got == total or got < 0:
                break
            request, within_us = b"", 0
            limits.check()
        self._awake = time.perf_counter() - began_s < BUSY_S
        session.num_sealed += 1
        if got < 0:
            return self._open(head, MAX_STATUS_BYTES, limits, TRAILER.size)
        session.num_opened += 1
        return None

    def receive_request(self, regions: ServedRegions | None = None) -> bytes:
        """The payload of the reader's next sealed frame; for owners. Takes all that has come in one call: behind a
        request there is nothing but further ones, until it is answered.

        Args:
            regions: good requests for small blocks of these are answered on the way.
        Raises: WireError for a bad or too large frame, PeerGone.
        """
        while True:
            data = self._ahead
            if len(data) >= HEADER.size:
                magic, length, check = HEADER.unpack_from(data)
                if magic != MAGIC or length > MAX_REQUEST_BYTES:
                    raise WireError(f"the data stream is out of step: a frame of {length} bytes with magic {magic!r}")
                end = HEADER.size + length
                if len(data) >= end:
                    self._ahead = data[end:]
                    return self.session.open(Frame(check, data[HEADER.size : end]))
            if self._buffer is None:
                self._buffer = memoryview(bytearray(REQUEST_BUFFER_BYTES))
            served = None
            if regions is not None and not self._ahead:
                served = self._serve_blocks(regions, self._buffer)
            self._ahead += self._buffer[: self._await(self._buffer, None, 0) if served is None else served]

    def _serve_blocks(self, regions: ServedRegions, place: memoryview) -> int | None:
        try:
            served = regions.serve(self.socket.fileno(), self.session, place, self._awake)
        except OSError as error:
            raise PeerGone(f"the data stream broke: {error.strerror or error}", peer=self.peer) from error
        if served is None:
            return None
        got, self._awake = served
        if got == 0:
            raise PeerGone("the peer closed the data stream", peer=self.peer)
        return got

    def _await_frame(self, place: memoryview, limits: Limits | None) -> None:
        """Fill `place` with the beginning of the next frame."""
        got = self._await(place, limits, socket.MSG_WAITALL)
        if got < len(place):
            self.receive_into(place[got:], limits)

    def _await(self, place: memoryview, limits: Limits | None, flags: int) -> int:
        """Wait for the first bytes of a frame; how many came. Sleeps at once, unless frames have come quickly of late:
        being woken takes longer than a small block does."""
        got: int | None = None
        if self._awake:
            try:
                got = receive_soon(self.socket.fileno(), place)
            except OSError as error:
                self._waited(error, limits)
        if got is None:
            slept_s = time.perf_counter()
            while got is None:
                try:
                    got = self.socket.recv_into(place, 0, flags)
                except OSError as error:
                    self._waited(error, limits)
            self._awake = time.perf_counter() - slept_s < BUSY_S
        if got == 0:
            raise PeerGone("the peer closed the data stream", peer=self.peer)
        return got

    def receive_into(self, place: memoryview, limits: Limits | None = None) -> None:
        """Fill `place`. Raises: PeerGone, and what `limits` raises."""
        while place:
            try:
                got = self.socket.recv_into(place, 0, socket.MSG_WAITALL)
            except OSError as error:
                self._waited(error, limits)
                continue
            if got == 0:
                raise PeerGone("the peer closed the data stream", peer=self.peer)
            place = place[got:]

    def send_vectors(self, vectors: Vectors, limits: Limits | None = None) -> None:
        """Send memory as it lies. Raises: PeerGone, and what `limits` raises."""
        self._move("sendmsg", vectors, socket.MSG_NOSIGNAL, limits)

    def receive_vectors(self, vectors: Vectors, limits: Limits | None = None) -> None:
        """Receive straight into place. Raises: PeerGone, and what `limits` raises."""
        if self._ahead:
            raise WireError("the data stream is out of step: bytes came before they were asked for")
        self._move("recvmsg", vectors, socket.MSG_WAITALL, limits)

    def _move(self, call: Literal["sendmsg", "recvmsg"], vectors: Vectors, flags: int, limits: Limits | None) -> None:
        cursor, fd = VectorCursor(merge_adjacent(vectors)), self.socket.fileno()
        while not cursor.finished:
            if limits is not None:
                limits.check()
            try:
                moved = cursor.call(call, fd, flags, VECTORS_PER_CALL)
            except OSError as error:
                self._waited(error, limits)
                continue
            if moved == 0:
                raise PeerGone("the peer closed the data stream in the middle of a transfer", peer=self.peer)

    def _waited(self, error: OSError, limits: Limits | None) -> None:
        if error.errno not in (errno.EAGAIN, errno.EINTR):
            raise PeerGone(f"the data stream broke: {error.strerror or error}", peer=self.peer) from error
        if limits is not None:
            limits.check()


def prepare_socket(sock: socket.socket, settings: TransportSettings) -> None:
    """Options for a data socket, before it is connected or listens.

    Source of the buffer size: peers.md; larger default buffers slow a single stream, because bytes leave the cache.
    """
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, settings.socket_buffer_bytes)


def watch_socket(sock: socket.socket, settings: TransportSettings) -> None:
    """Let the kernel notice a network that has gone silent, within about `dead_after_s`."""
    seconds = max(1, int(settings.dead_after_s))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, seconds // 2))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, max(2, seconds // 2))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(settings.dead_after_s * 1000))


def set_timeouts(sock: socket.socket, receive_s: float, send_s: float) -> None:
    """Kernel time-outs of a blocking socket; 0 waits for ever."""
    for option, seconds in ((socket.SO_RCVTIMEO, receive_s), (socket.SO_SNDTIMEO, send_s)):
        whole = int(seconds)
        sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", whole, int((seconds - whole) * 1e6)))


def open_stream(
    address: tuple[str, int],
    *,
    settings: TransportSettings,
    secret: bytes | None,
    incarnation: Incarnation,
    expected: Incarnation,
    peer: str,
    limits: Limits,
) -> DataStream:
    """Connect and shake hands as the reader.

    Raises: PeerGone if nobody or another incarnation answers; TransferTimeout; the handshake's errors.
    """
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        prepare_socket(sock, settings)
        sock.settimeout(max(0.001, limits.remaining_s()))
        try:
            sock.connect(address)
        except TimeoutError as error:
            raise TransferTimeout(f"no answer from {address[0]}:{address[1]} in time", peer=peer) from error
        except OSError as error:
            raise PeerGone(f"cannot connect to {address[0]}:{address[1]}: {error.strerror}", peer=peer) from error
        sock.settimeout(None)
        watch_socket(sock, settings)
        set_timeouts(sock, TICK_S, TICK_S)
        handshake = Handshake("client", secret=secret, incarnation=incarnation)
        session = shake_hands(sock, handshake, PREFACE, peer, limits)
        if session.peer_incarnation != expected:
            raise PeerGone(
                f"the peer at {address[0]}:{address[1]} was restarted: incarnation {session.peer_incarnation:x}, "
                f"expected {expected:x}; its old regions are gone",
                peer=peer,
            )
    except BaseException:
        sock.close()
        raise
    return DataStream(sock, session, peer)


def accept_stream(
    sock: socket.socket, *, settings: TransportSettings, secret: bytes | None, incarnation: Incarnation, limits: Limits
) -> DataStream:
    """Shake hands as the owner; the preface was read already. Raises as `open_stream` does."""
    watch_socket(sock, settings)
    set_timeouts(sock, TICK_S, TICK_S)
    session = shake_hands(sock, Handshake("server", secret=secret, incarnation=incarnation), b"", limits.peer, limits)
    # From here on the owner waits for requests as long as the reader likes; `abort` wakes it.
    set_timeouts(sock, 0, 0)
    return DataStream(sock, session, f"{limits.peer}#{session.peer_incarnation:x}")


def shake_hands(sock: socket.socket, handshake: Handshake, preface: bytes, peer: str, limits: Limits) -> Session:
    """Run a handshake over a blocking socket; frames come one at a time, so nothing is read too far."""
    stream = DataStream(sock, Session(b"", "client"), peer)
    stream.send(preface + handshake.start(), limits)
    while handshake.session is None:
        magic, length, check = HEADER.unpack(stream.receive(HEADER.size, limits))
        if magic != MAGIC or length > MAX_STATUS_BYTES:
            raise WireError(f"expected a handshake frame, saw {length} bytes with magic {magic!r}", peer=peer)
        try:
            answer = handshake.receive(Frame(check, bytes(stream.receive(length, limits))))
        except KVError as error:
            with contextlib.suppress(KVError):
                stream.send(handshake.refusal(error), limits)
            raise
        stream.send(answer, limits)
    return handshake.session
