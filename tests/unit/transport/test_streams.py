"""Frames on a data stream, however the bytes arrive."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import numpy as np
import pytest

from kvferry.errors import PeerGone, TransferTimeout, WireError
from kvferry.transport import small_blocks
from kvferry.transport.base import StopToken
from kvferry.transport.copying import Limits
from kvferry.transport.small_blocks import BlockRequest, receive_soon
from kvferry.transport.streams import (
    BROKEN,
    MAX_REQUEST_BYTES,
    STANDS,
    TRAILER,
    DataStream,
    WordRequest,
    decode_request,
    requests,
    set_timeouts,
)
from kvferry.transport.vectors import vectors_of
from kvferry.wire import Session, encode_frame

KEY = b"k" * 32


@pytest.fixture(params=["c", "python"])
def ends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[DataStream, DataStream]]:
    """A reader's and an owner's end of one stream, with and without the C module."""
    if request.param == "c" and small_blocks.in_c is None:
        pytest.skip("built without a C compiler")
    if request.param == "python":
        monkeypatch.setattr(small_blocks, "in_c", None)
    near, far = socket.socketpair()
    reader, owner = DataStream(near, Session(KEY, "client"), "owner"), DataStream(far, Session(KEY, "server"), "reader")
    yield reader, owner
    reader.close()
    owner.close()


def test_requests_that_come_at_once_are_taken_one_by_one(ends: tuple[DataStream, DataStream]) -> None:
    reader, owner = ends
    payloads = [b"first", b"", b"x" * 70_000, b"last"]
    sealed = b"".join(reader.session.seal(payload) for payload in payloads)
    # The last one comes in two parts, the second behind the others' answers.
    reader.send(sealed[:-3])
    assert [owner.receive_request() for _ in payloads[:-1]] == payloads[:-1]
    reader.send(sealed[-3:])
    assert owner.receive_request() == payloads[-1]


def test_a_busy_stream_waits_without_sleeping_and_still_takes_everything(ends: tuple[DataStream, DataStream]) -> None:
    reader, owner = ends
    for number in range(50):
        reader.send_frame(b"ask %d" % number)
        assert owner.receive_request() == b"ask %d" % number
        owner.send_frame(b"answer %d" % number)
        assert reader.receive_frame(100, expect=4) == b"answer %d" % number


def test_bytes_that_nobody_asked_for_are_refused(ends: tuple[DataStream, DataStream]) -> None:
    reader, owner = ends
    reader.send(reader.session.seal(b"write") + b"the bytes, before the owner said that it takes them")
    assert owner.receive_request() == b"write"
    target = np.zeros(16, dtype=np.uint8)
    with pytest.raises(WireError, match="before they were asked for"):
        owner.receive_vectors(vectors_of(target.ctypes.data, np.zeros(1, dtype=np.int64), 16))
    assert not target.any()


def test_what_is_no_frame_is_out_of_step(ends: tuple[DataStream, DataStream]) -> None:
    reader, owner = ends
    reader.send(b"GET / HTTP/1.1\r\nHost: somebody-else\r\n\r\n")
    with pytest.raises(WireError, match="out of step"):
        owner.receive_request()


def test_a_frame_that_is_too_large_is_not_waited_for(ends: tuple[DataStream, DataStream]) -> None:
    reader, owner = ends
    reader.send(encode_frame(bytes(MAX_REQUEST_BYTES + 1))[:100])
    with pytest.raises(WireError, match="out of step"):
        owner.receive_request()


def test_the_end_of_the_stream_is_a_lost_peer(ends: tuple[DataStream, DataStream]) -> None:
    reader, owner = ends
    reader.send(reader.session.seal(b"cut off")[:-1])
    reader.close()
    with pytest.raises(PeerGone):
        owner.receive_request()


def place_for(nbytes: int) -> np.ndarray:
    return np.full(nbytes, 0xEE, dtype=np.uint8)


def ask(reader: DataStream, target: np.ndarray) -> bytes | None:
    request = BlockRequest(1, "ab" * 16, target.nbytes, 0).encode()
    return reader.ask_block(request, target.ctypes.data, target.nbytes, Limits(StopToken(), 5.0, "owner"))


GOOD_TRAILER = TRAILER.pack(STANDS, 0, bytes(16))


def test_a_small_block_comes_behind_its_verdict(ends: tuple[DataStream, DataStream]) -> None:
    reader, owner = ends
    for number in range(3):
        target, block = place_for(100), bytes([number]) * 100
        owner.send(owner.session.seal(GOOD_TRAILER) + block)
        assert ask(reader, target) is None
        assert target.tobytes() == block
        assert BlockRequest.decode(owner.receive_request()) == BlockRequest(1, "ab" * 16, 100, 0)
    # Both sides have counted on: the session still fits.
    owner.send_frame(b"after")
    assert reader.receive_frame(100) == b"after"


def test_a_small_block_that_comes_in_parts_is_put_together(ends: tuple[DataStream, DataStream]) -> None:
    reader, owner = ends
    target, block = place_for(3000), bytes(range(250)) * 12
    answer = owner.session.seal(GOOD_TRAILER) + block
    parts = [answer[:7], answer[7:49], answer[49:50], answer[50:]]

    class NextPart(Limits):
        """Each look at the limits, when nothing has come for a while, lets one more part come."""

        def check(self) -> None:
            owner.send(parts.pop(0))

    set_timeouts(reader.socket, 0.005, 0.005)
    request = BlockRequest(1, "ab" * 16, target.nbytes, 0).encode()
    assert reader.ask_block(request, target.ctypes.data, target.nbytes, NextPart(StopToken(), 60.0, "owner")) is None
    assert target.tobytes() == block and not parts


@pytest.mark.parametrize(
    "answer", [TRAILER.pack(BROKEN, 5, bytes(16)), b"\1" + b"refused, and this is why it was" * 20]
)
def test_without_a_good_verdict_nothing_is_put_into_place(ends: tuple[DataStream, DataStream], answer: bytes) -> None:
    reader, owner = ends
    target = place_for(100)
    owner.send(owner.session.seal(answer) + b"x" * 100)
    assert ask(reader, target) == answer
    assert (target == 0xEE).all()


def test_a_forged_verdict_is_refused(ends: tuple[DataStream, DataStream]) -> None:
    reader, owner = ends
    target = place_for(100)
    owner.send(Session(b"f" * 32, "server").seal(GOOD_TRAILER) + b"x" * 100)
    with pytest.raises(WireError, match="MAC"):
        ask(reader, target)
    assert (target == 0xEE).all()


def test_a_stream_that_ends_within_a_block_is_a_lost_peer(ends: tuple[DataStream, DataStream]) -> None:
    reader, owner = ends
    owner.send(owner.session.seal(GOOD_TRAILER) + b"x" * 99)
    owner.close()
    with pytest.raises(PeerGone):
        ask(reader, place_for(100))


def test_a_deadline_ends_the_wait_for_a_small_block(ends: tuple[DataStream, DataStream]) -> None:
    reader, _ = ends
    set_timeouts(reader.socket, 0.005, 0.005)
    request = BlockRequest(1, "ab" * 16, 8, 0).encode()
    with pytest.raises(TransferTimeout):
        reader.ask_block(request, place_for(8).ctypes.data, 8, Limits(StopToken(), 0.01, "owner"))


@pytest.mark.parametrize("guard", [None, (7, "cd" * 16, 16, -3)])
def test_a_request_for_a_block_survives_the_wire(guard: tuple[int, str, int, int] | None) -> None:
    request = BlockRequest(2**40, "0f" * 16, 4096, 2**50, guard)
    assert BlockRequest.begins(request.encode()) and not BlockRequest.begins(requests.encode(WordRequest(1, "ab", 8)))
    assert decode_request(request.encode()) == request
    with pytest.raises(WireError):
        decode_request(request.encode()[:-1])


def test_what_comes_soon_is_received_without_sleeping() -> None:
    if small_blocks.in_c is None:
        pytest.skip("built without a C compiler")
    near, far = socket.socketpair()
    place = memoryview(bytearray(10))
    with near:
        with far:
            assert receive_soon(near.fileno(), place) is None
            far.send(b"abc")
            assert receive_soon(near.fileno(), place) == 3 and bytes(place[:3]) == b"abc"
        assert receive_soon(near.fileno(), place) == 0
        with pytest.raises(OSError):
            receive_soon(-1, place)
