"""Transport over TCP: several authenticated streams to one peer, bytes straight from and into place.

The reader cuts a batch into chunks; its streams, a thread each, take chunk after chunk, and ask for the next while
the last one still arrives. How many streams pay is learned from what they gave (StreamCount).
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ClassVar, NamedTuple, NoReturn

from kvferry.errors import (
    HandoffAborted,
    IntegrityError,
    LeaseExpired,
    PeerGone,
    RegistrationError,
    TransferTimeout,
    TransportError,
)
from kvferry.policy.streams import StreamCount
from kvferry.transport.base import BlockList, Guard, Link, Region, RemoteRegion, StopToken, Transport
from kvferry.transport.copying import SMALL_BYTES, Limits, slices
from kvferry.transport.registry import TransportContext
from kvferry.transport.small_blocks import BlockRequest
from kvferry.transport.streams import (
    BROKEN,
    GOOD,
    MAX_STATUS_BYTES,
    TRAILER,
    DataStream,
    Part,
    ReadRequest,
    WordRequest,
    WriteRequest,
    open_stream,
    refusals,
    requests,
)
from kvferry.transport.tcp_owner import StreamListener, StreamServer
from kvferry.transport.vectors import Vectors, digest_of, vectors_of
from kvferry.types import Incarnation

CHUNK_BYTES = 64 << 20
CHUNK_BLOCKS = 4096
REQUESTS_AHEAD = 2
_DRAIN_S = 1.0
_NEVER = StopToken()


class TcpTransport(Transport):
    """Serves and reads host memory over TCP. The engine may share its listener (see `adopt`)."""

    scheme: ClassVar[str] = "tcp"

    def __init__(self, context: TransportContext) -> None:
        self._context = context
        self._server = StreamServer(context)
        self._lock = threading.Lock()
        self._listener: StreamListener | None = None

    def offer(self) -> Mapping[str, Any]:
        if self._context.shared_listener:
            return {"shared": True}
        with self._lock:
            if self._listener is None:
                self._listener = StreamListener("127.0.0.1", self._server.adopt, self._context)
            return {"shared": False, "address": self._listener.address}

    def export(self, region: Region) -> dict[str, Any] | None:
        if region.kind != "host":
            return None
        self._server.admit(region)
        return {}

    def withdraw(self, region: Region) -> None:
        self._server.withdraw(region.region_id)

    def adopt(self, sock: socket.socket, peer: str) -> None:
        """Serve a data connection that arrived at the engine's listener; its preface was read."""
        self._server.adopt(sock, peer)

    def connect(self, offer: Mapping[str, Any], *, peer: str, incarnation: Incarnation, deadline_s: float) -> Link:
        address = offer.get("address")
        if not isinstance(address, str):
            raise TransportError("the peer told no address for data streams", peer=peer)
        link = TcpLink(self._context, split_address(address), peer=peer, incarnation=incarnation)
        link.open_first(deadline_s)
        return link

    def close(self) -> None:
        with self._lock:
            listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()
        self._server.close()


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `tcp://host:port` or `host:port`; brackets around an IPv6 host are taken off.

    Raises: TransportError for anything else.
    """
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    if not host or not port.isdigit():
        raise TransportError(f"{address!r} is no address; expected tcp://host:port")
    return host.strip("[]"), int(port)


class _Chunk(NamedTuple):
    vectors: Vectors
    request: bytes


class TcpLink(Link):
    """Data streams to one peer; opened when needed, kept for the next transfer, dropped after any failure."""

    scheme: ClassVar[str] = "tcp"

    def __init__(
        self, context: TransportContext, address: tuple[str, int], *, peer: str, incarnation: Incarnation
    ) -> None:
        self._context, self._address, self._peer, self._expected = context, address, peer, incarnation
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._num_waiting = 0
        self._idle: list[DataStream] = []
        self._open: set[DataStream] = set()
        self._opening = 0
        self._closed = False
        self._most = max(1, context.settings.max_streams)
        self._count = StreamCount(self._most)
        self._pool = ThreadPoolExecutor(max_workers=2 * self._most, thread_name_prefix="kvferry-tcp-read")

    def open_first(self, deadline_s: float) -> None:
        """Open one stream, which shows that the peer can be reached. Raises as `connect` of the contract does."""
        self.give(self.take(Limits(StopToken(), deadline_s, self._peer)))

    def read(self, blocks: list[BlockList], *, guard: Guard | None, stop: StopToken, deadline_s: float) -> None:
        digest = self._context.settings.verify_digest
        if len(blocks) == 1 and len(blocks[0].source_offsets) == 1 and blocks[0].nbytes <= SMALL_BYTES and not digest:
            self._read_small(blocks[0], guard, Limits(stop, deadline_s, self._peer))
            return
        words = self._words(guard)
        chunks = deque(
            _Chunk(vectors, requests.encode(ReadRequest((part,), words, digest)))
            for part, vectors in self._chunks(blocks, writing=False)
        )
        self._run(chunks, self._read_chunks, Limits(stop, deadline_s, self._peer))

    def read_block(self, block: BlockList, *, guard: Guard | None, deadline_s: float) -> None:
        if block.nbytes > SMALL_BYTES or self._context.settings.verify_digest:
            super().read_block(block, guard=guard, deadline_s=deadline_s)
        else:
            self._read_small(block, guard, Limits(_NEVER, deadline_s, self._peer))

    def _words(self, guard: Guard | None) -> tuple[int, str, int, int] | None:
        """The guard as requests carry it."""
        if guard is None:
            return None
        holder = self.guard_region(guard)
        return holder.region_id, holder.token, guard.offset, guard.word

    def write(self, blocks: list[BlockList], *, stop: StopToken, deadline_s: float) -> None:
        digest = self._context.settings.verify_digest
        chunks = deque(
            _Chunk(vectors, requests.encode(WriteRequest((part,), digest)))
            for part, vectors in self._chunks(blocks, writing=True)
        )
        self._run(chunks, self._write_chunks, Limits(stop, deadline_s, self._peer))

    def load_word(self, region: RemoteRegion, offset: int, *, deadline_s: float) -> int:
        limits = Limits(StopToken(), deadline_s, self._peer)
        with self._stream(limits) as stream:
            stream.send_frame(requests.encode(WordRequest(region.region_id, region.token, offset)), limits)
            self._receive_status(stream, limits)
            _verdict, word, _digest = TRAILER.unpack(stream.receive_frame(TRAILER.size, limits, expect=TRAILER.size))
            return int(word)

    def close(self) -> None:
        with self._changed:
            if self._closed:
                return
            self._closed = True
            for stream in self._open:
                stream.abort()
            for stream in self._idle:
                stream.close()
                self._open.discard(stream)
            self._idle.clear()
            self._changed.notify_all()
        self._pool.shutdown(wait=True)

    def _chunks(self, blocks: list[BlockList], *, writing: bool) -> Iterator[tuple[Part, Vectors]]:
        for piece in slices(blocks, CHUNK_BYTES, CHUNK_BLOCKS):
            local, remote = (piece.source, piece.target) if writing else (piece.target, piece.source)
            here, there = piece.source_offsets, piece.target_offsets
            if not writing:
                here, there = there, here
            assert isinstance(local, Region) and isinstance(remote, RemoteRegion)
            offsets = there.astype("<i8", copy=False).tobytes()
            part = Part(remote.region_id, remote.token, piece.nbytes, offsets)
            yield part, vectors_of(local.address, here, piece.nbytes)

    def _run(
        self, chunks: deque[_Chunk], work: Callable[[DataStream, deque[_Chunk], Limits], None], limits: Limits
    ) -> None:
        """Let streams work on the chunks until none is left; raise the first failure once all have stopped."""
        if len(chunks) < 2:
            with self._stream(limits) as stream:
                work(stream, chunks, limits)
            return
        count = min(self._count.choose(), len(chunks))
        total = sum(int(chunk.vectors[:, 1].sum()) for chunk in chunks)
        began_s = time.monotonic()
        broken_off = _AnyStop(limits)

        def on_stream() -> None:
            if not chunks:
                return
            try:
                with self._stream(broken_off) as stream:
                    work(stream, chunks, broken_off)
            except BaseException:
                broken_off.failed.set()
                raise

        others: list[Future[None]] = []
        # The link may be closed at this moment: then this thread finds out, too. Or no thread can be had: then it works
        # alone.
        with contextlib.suppress(RuntimeError):
            others.extend(self._pool.submit(on_stream) for _ in range(count - 1))
        failures: list[BaseException] = []
        for attempt in [on_stream, *(future.result for future in others)]:
            try:
                attempt()
            except Exception as error:  # noqa: BLE001  (collected, and the first one raised below)
                failures.append(error)
        if failures:
            # A stream that stopped because another one failed says "aborted"; the other one knows the cause.
            causes = [error for error in failures if not isinstance(error, HandoffAborted)]
            raise (causes or failures)[0]
        self._count.learn(count, total / max(1e-9, time.monotonic() - began_s))

    def _read_chunks(self, stream: DataStream, chunks: deque[_Chunk], limits: Limits) -> None:
        asked: deque[_Chunk] = deque()
        while True:
            while len(asked) < REQUESTS_AHEAD and chunks:
                with contextlib.suppress(IndexError):  # Another stream took the last one.
                    asked.append(chunks.popleft())
                    stream.send_frame(asked[-1].request, limits)
            if not asked:
                return
            chunk = asked.popleft()
            self._receive_status(stream, limits)
            stream.receive_vectors(chunk.vectors, limits)
            self._receive_trailer(stream, chunk, limits)

    def _read_small(self, block: BlockList, guard: Guard | None, limits: Limits) -> None:
        """One block that the owner sends together with its verdict."""
        remote, local, sources, targets, nbytes = block
        assert isinstance(remote, RemoteRegion) and isinstance(local, Region)
        words = None if guard is None else self._words(guard)
        request = BlockRequest(remote.region_id, remote.token, nbytes, sources.item(), words).encode()
        stream = self.take(limits)
        try:
            answer = stream.ask_block(request, local.address + targets.item(), nbytes, limits)
            if answer is not None:
                if len(answer) != TRAILER.size:
                    self._refuse(answer)
                self._check_trailer(answer)
        except BaseException:
            # Also where the owner refused: the answers to further requests may still be on their way.
            self.drop(stream)
            raise
        self.give(stream)

    def _write_chunks(self, stream: DataStream, chunks: deque[_Chunk], limits: Limits) -> None:
        while chunks:
            try:
                chunk = chunks.popleft()
            except IndexError:
                return
            stream.send_frame(chunk.request, limits)
            self._receive_status(stream, limits)
            try:
                stream.send_vectors(chunk.vectors, limits)
                self._receive_trailer(stream, chunk, limits)
            except (HandoffAborted, TransferTimeout):
                self._await_stop(stream)
                raise

    def _receive_status(self, stream: DataStream, limits: Limits) -> None:
        status = stream.receive_frame(MAX_STATUS_BYTES, limits, expect=len(GOOD))
        if status != GOOD:
            self._refuse(status)

    def _refuse(self, status: bytes) -> NoReturn:
        refused = refusals.decode(status[1:])
        raise RegistrationError(f"the owner refused: {refused.message}", peer=self._peer)

    def _receive_trailer(self, stream: DataStream, chunk: _Chunk, limits: Limits) -> None:
        frame = stream.receive_frame(TRAILER.size, limits, expect=TRAILER.size)
        digest = self._check_trailer(frame)
        if self._context.settings.verify_digest and digest_of(chunk.vectors) != digest:
            raise IntegrityError("a chunk's digest differs from the owner's: bytes changed on the way", peer=self._peer)

    def _check_trailer(self, frame: bytes) -> bytes:
        """The digest in it. Raises: LeaseExpired."""
        verdict, word, digest = TRAILER.unpack(frame)
        if verdict == BROKEN:
            raise LeaseExpired(
                f"the lease's word changed while its blocks were read (now {'0' if word == 0 else 'another one'}): "
                "recompute",
                peer=self._peer,
            )
        return bytes(digest)

    def _await_stop(self, stream: DataStream) -> None:
        """Tell the owner that no more will come, and wait until it has stopped writing (T4)."""
        deadline = Limits(StopToken(), _DRAIN_S, self._peer)
        try:
            stream.socket.shutdown(socket.SHUT_WR)
            while True:
                stream.receive(1, deadline)
        except (OSError, PeerGone):
            # End of file, or a broken connection: the owner writes nothing more for this request.
            return
        except TransferTimeout as error:
            raise PeerGone(
                "the owner did not confirm that it stopped writing: keep the lent memory aside until it is dead",
                peer=self._peer,
            ) from error

    def _stream(self, limits: Limits) -> _Borrowed:
        return _Borrowed(self, limits)

    def take(self, limits: Limits) -> DataStream:
        """A stream that nobody uses, opened if need be. Raises: PeerGone, what `limits` raises."""
        with self._lock:
            while True:
                if self._closed:
                    raise PeerGone("the link to the peer was closed", peer=self._peer)
                if self._idle:
                    return self._idle.pop()
                if len(self._open) + self._opening < self._most:
                    self._opening += 1
                    break
                limits.check()
                self._num_waiting += 1
                self._changed.wait(0.05)
                self._num_waiting -= 1
        try:
            stream = open_stream(
                self._address,
                settings=self._context.settings,
                secret=self._context.secret,
                incarnation=self._context.incarnation,
                expected=self._expected,
                peer=self._peer,
                limits=limits,
            )
        except BaseException:
            with self._changed:
                self._opening -= 1
                self._changed.notify()
            raise
        with self._changed:
            self._opening -= 1
            self._open.add(stream)
            closed: bool = self._closed
        if closed:
            stream.abort()
        return stream

    def give(self, stream: DataStream) -> None:
        """Give a stream back for the next transfer."""
        with self._lock:
            if not self._closed:
                self._idle.append(stream)
                if self._num_waiting:
                    self._changed.notify()
                return
        self.drop(stream)

    def drop(self, stream: DataStream) -> None:
        """Close a stream whose state is not known."""
        with self._changed:
            self._open.discard(stream)
            self._changed.notify()
        stream.close()


class _Borrowed:
    """A stream of a link for the time of a `with` block; dropped if the block fails, given back otherwise."""

    __slots__ = ("_limits", "_link", "_stream")

    def __init__(self, link: TcpLink, limits: Limits) -> None:
        self._link, self._limits = link, limits

    def __enter__(self) -> DataStream:
        self._stream = self._link.take(self._limits)
        return self._stream

    def __exit__(self, kind: object, *exc: object) -> None:
        if kind is None:
            self._link.give(self._stream)
        else:
            # Also where the owner refused: the answers to further requests may still be on their way.
            self._link.drop(self._stream)


class _AnyStop(Limits):
    """The caller's limits, and the failure of a sibling stream."""

    __slots__ = ("failed",)

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits.stop, limits.deadline_s, limits.peer)
        self.until_s = limits.until_s
        self.failed = threading.Event()

    def check(self) -> None:
        super().check()
        if self.failed.is_set():
            raise HandoffAborted("another stream of this transfer failed", peer=self.peer)
