"""Frames on a data stream, however the bytes arrive."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import numpy as np
import pytest

from kvferry.errors import PeerGone, WireError
from kvferry.transport import copying
from kvferry.transport.streams import MAX_REQUEST_BYTES, DataStream
from kvferry.transport.vectors import vectors_of
from kvferry.wire import Session, encode_frame

KEY = b"k" * 32


@pytest.fixture(params=["c", "python"])
def ends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[DataStream, DataStream]]:
    """A reader's and an owner's end of one stream, with and without the C module."""
    if request.param == "c" and copying._copy is None:
        pytest.skip("built without a C compiler")
    if request.param == "python":
        monkeypatch.setattr(copying, "_copy", None)
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
