"""Frames, values, the handshake and signed HTTP: round trips, and what hostile bytes can do (nothing)."""

from __future__ import annotations

import hashlib
import random
import tracemalloc
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry import wire
from kvferry.errors import AuthenticationError, CompatibilityError, ConfigError, KVError, WireError
from kvferry.layout import PROTOCOL_VERSION
from kvferry.types import Incarnation
from kvferry.wire import Codec, FrameDecoder, Handshake, encode_frame, open_frame

SECRET = b"s" * 32
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    scalars | st.binary(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text() | st.integers(0, 99), inner, max_size=5),
    max_leaves=30,
)


@given(values)
def test_nested_values_survive_a_round_trip(value: Any) -> None:
    codec: Codec[Any] = Codec()
    assert codec.decode(codec.encode(value)) == value


@pytest.mark.parametrize("dtype", ["int64", "uint8", "float32", "float16", "bool", ">i4", "complex64"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4), (0, 5)])
def test_arrays_survive_a_round_trip_inside_nested_data(dtype: str, shape: tuple[int, ...]) -> None:
    array = (np.arange(int(np.prod(shape))) % 2).reshape(shape).astype(dtype)
    codec: Codec[Any] = Codec()
    back = codec.decode(codec.encode({"deep": [{"er": array}]}))["deep"][0]["er"]
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert (back == array).all()


def test_tensor_metadata_survives_a_round_trip() -> None:
    meta = wire.TensorMeta.of(np.zeros((4, 6), dtype=np.float32).T)
    assert (meta.dtype, meta.shape, meta.strides) == ("float32", (6, 4), (1, 6))
    codec: Codec[wire.TensorMeta] = Codec(wire.TensorMeta)
    assert codec.decode(codec.encode(meta)) == meta


@pytest.mark.parametrize("value", [object(), {1, object()}, np.array(["text"]), np.array([None])])
def test_what_cannot_travel_is_refused_by_name(value: Any) -> None:
    with pytest.raises(WireError, match="cannot"):
        Codec().encode({"x": [value]})


@given(st.lists(st.binary(max_size=200), max_size=8), st.integers(1, 50))
def test_frames_survive_any_split(payloads: list[bytes], step: int) -> None:
    stream = b"".join(encode_frame(p) for p in payloads)
    decoder = FrameDecoder()
    seen = [open_frame(f) for i in range(0, len(stream), step) for f in decoder.feed(stream[i : i + step])]
    assert seen == payloads


def test_a_changed_byte_is_noticed() -> None:
    frame = bytearray(encode_frame(b"the quick brown fox"))
    frame[-1] ^= 1
    with pytest.raises(WireError, match="does not match its checksum"):
        open_frame(FrameDecoder().feed(frame)[0])


def test_a_frame_that_announces_too_much_is_refused_before_it_is_buffered() -> None:
    decoder = FrameDecoder(max_frame_bytes=100)
    with pytest.raises(WireError, match=r"announces 101 bytes; at most 100"):
        decoder.feed(wire.HEADER.pack(wire.MAGIC, 101, b""))


def test_another_services_bytes_are_named() -> None:
    with pytest.raises(WireError, match="another service"):
        FrameDecoder().feed(b"HTTP/1.1 200 OK\r\nServer: something\r\n\r\n")


class _Server:
    """A listening side that has come to a stage, and the frame that it waits for then."""

    def __init__(self, stage: str) -> None:
        client, self.handshake = _pair()
        self.good = client.start()
        if stage == "hello":
            return
        self.good = client.receive(*FrameDecoder().feed(self.handshake.receive(*FrameDecoder().feed(self.good))))
        if stage == "introduction":
            return
        client.receive(*FrameDecoder().feed(self.handshake.receive(*FrameDecoder().feed(self.good))))
        assert client.session is not None
        self.good = client.session.seal(msgspec.msgpack.encode({"step": 7}))

    def take(self, data: bytes) -> None:
        """Everything up to the end of the connection. Raises: KVError where it is refused."""
        frames = FrameDecoder(wire.MAX_HANDSHAKE_BYTES).feed(data)
        for frame in frames:
            if self.handshake.session is None:
                self.handshake.receive(frame)
            else:
                Codec[Any]().decode(self.handshake.session.open(frame))
        if not frames:
            raise WireError("the connection ended inside a frame")


def _malform(rng: random.Random, good: bytes) -> bytes:
    """The frame with some of its bytes changed, cut off, put in, or replaced by others; never a good frame in front."""
    data = bytearray(good)
    match rng.randrange(6):
        case 0:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 1:
            data = data[: rng.randrange(len(data))] + bytearray(rng.randrange(1, 200))
        case 2:
            at = rng.randrange(len(data))
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        case 3:
            data = bytearray(encode_frame(rng.randbytes(rng.randrange(0, 60))))
        case 4:
            data[4:8] = rng.randbytes(4)  # the length
        case _:
            data = bytearray(rng.randbytes(rng.randrange(0, 80)))
    return _malform(rng, good) if data.startswith(good) else bytes(data)


def test_a_hundred_thousand_malformed_frames_each_end_in_a_counted_logged_refusal(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rng = random.Random(20261122)
    servers = [_Server(stage) for stage in ("hello", "introduction", "session")]
    refusals, num_frames = wire.Refusals(), 100_000
    tracemalloc.start()
    for number in range(num_frames):
        server = servers[number % 3]
        try:
            server.take(_malform(rng, server.good))
        except KVError as error:
            refusals.add("fuzz", error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(refusals.counts.values()) == num_frames
    assert set(refusals.counts) == {"wire_error", "authentication_error"}
    assert caplog.records and all(record.getMessage().startswith("refused fuzz: ") for record in caplog.records)
    assert peak < 8 << 20
    for server in servers:
        server.take(server.good)  # None of it has left a trace.


def _introduce(client: Handshake, server: Handshake) -> None:
    """Carry frames between the two until neither has anything to say."""
    to_server, decoders = client.start(), (FrameDecoder(), FrameDecoder())
    while to_server:
        to_client = b"".join(server.receive(f) for f in decoders[0].feed(to_server))
        to_server = b"".join(client.receive(f) for f in decoders[1].feed(to_client))


def _pair(client_secret: bytes | None = SECRET, server_secret: bytes | None = SECRET, **server: Any):
    return (
        Handshake("client", secret=client_secret, incarnation=Incarnation(7), hello=b"I am the client"),
        Handshake("server", secret=server_secret, incarnation=Incarnation(9), hello=b"I am the server", **server),
    )


@pytest.mark.parametrize("secret", [SECRET, None])
def test_a_handshake_introduces_both_sides(secret: bytes | None) -> None:
    client, server = _pair(secret, secret)
    _introduce(client, server)
    assert client.session is not None and server.session is not None
    assert (client.session.peer_hello, client.session.peer_incarnation) == (b"I am the server", 9)
    assert (server.session.peer_hello, server.session.peer_incarnation) == (b"I am the client", 7)
    frame = FrameDecoder().feed(client.session.seal(b"payload"))[0]
    assert server.session.open(frame) == b"payload"
    assert client.session.derive("tcp-data") == server.session.derive("tcp-data") != client.session.derive("x")


def test_the_secret_never_travels_and_nothing_is_told_to_a_stranger() -> None:
    client, server = _pair(b"w" * 32)
    answer = b"".join(server.receive(f) for f in FrameDecoder().feed(client.start()))
    assert SECRET not in answer and b"I am the server" not in answer
    with pytest.raises(AuthenticationError, match="cluster secret"):
        for frame in FrameDecoder().feed(answer):
            client.receive(frame)


def test_a_client_that_does_not_know_the_secret_is_refused() -> None:
    client, server = _pair(b"w" * 32)
    answer = server.receive(FrameDecoder().feed(client.start())[0])
    client._secret = SECRET  # The impostor takes the server's proof for granted and goes on.
    forged = client._session_key(b"guess", b"guess", 7, 9)
    introduction = wire.Session(forged, "client").seal(wire._handshake_codec.encode(wire.Introduction(b"let me in")))
    assert answer
    with pytest.raises(AuthenticationError, match="could not prove"):
        server.receive(FrameDecoder().feed(introduction)[0])
    assert server.session is None


@pytest.mark.parametrize("secrets", [(SECRET, None), (None, SECRET)])
def test_a_secret_on_one_side_only_is_named(secrets: tuple[bytes | None, bytes | None]) -> None:
    with pytest.raises(AuthenticationError, match="KVFERRY_CLUSTER_SECRET"):
        _introduce(*_pair(*secrets))


def test_another_protocol_version_is_refused_with_both_values() -> None:
    client, server = _pair(version=99)
    with pytest.raises(CompatibilityError, match=f"version here 99, there {PROTOCOL_VERSION}"):
        _introduce(client, server)


def test_a_refused_hello_tells_both_sides_why() -> None:
    def refuse(hello: bytes) -> None:
        raise CompatibilityError(f"block_size: here 16, there {hello!r}")

    client, server = _pair(check_hello=refuse)
    answer = server.receive(FrameDecoder().feed(client.start())[0])
    introduction = client.receive(FrameDecoder().feed(answer)[0])
    with pytest.raises(CompatibilityError) as seen:
        server.receive(FrameDecoder().feed(introduction)[0])
    with pytest.raises(CompatibilityError, match="the peer refused: block_size: here 16"):
        client.receive(FrameDecoder().feed(server.refusal(seen.value))[0])


@pytest.mark.parametrize("order", [[1], [0, 0], [0, 2]])
def test_lost_repeated_or_reordered_frames_are_noticed(order: list[int]) -> None:
    client, server = _pair()
    _introduce(client, server)
    assert client.session is not None and server.session is not None
    frames = [FrameDecoder().feed(client.session.seal(bytes([i])))[0] for i in range(3)]
    with pytest.raises(WireError, match="wrong MAC"):
        for i in order:
            server.session.open(frames[i])


def test_a_frame_sent_back_to_its_sender_is_noticed() -> None:
    client, server = _pair()
    _introduce(client, server)
    assert client.session is not None
    reflected = FrameDecoder().feed(client.session.seal(b"x"))[0]
    with pytest.raises(WireError, match="wrong MAC"):
        client.session.open(reflected)


@pytest.mark.parametrize("nbytes", [wire.HASHED_FROM_BYTES - 1, wire.HASHED_FROM_BYTES, 100_000])
def test_any_byte_of_a_long_frame_that_changes_is_noticed(nbytes: int) -> None:
    client, server = _pair()
    _introduce(client, server)
    assert client.session is not None and server.session is not None
    payload = bytes(nbytes)
    assert server.session.open(FrameDecoder().feed(client.session.seal(payload))[0]) == payload
    frame = FrameDecoder().feed(client.session.seal(payload))[0]
    for at in (0, nbytes // 2, nbytes - 1):
        changed = payload[:at] + b"\1" + payload[at + 1 :]
        with pytest.raises(WireError, match="wrong MAC"):
            server.session.open(frame._replace(payload=changed))
    with pytest.raises(WireError, match="wrong MAC"):
        server.session.open(frame._replace(payload=hashlib.sha256(payload).digest()))
    assert server.session.open(frame) == payload


@given(st.binary(max_size=300))
@settings(max_examples=300)
def test_hostile_messages_end_in_a_wire_error(data: bytes) -> None:
    codec: Codec[Any] = Codec(wire.ClientHello | wire.ServerHello | wire.Introduction | wire.Refusal)
    with pytest.raises(WireError):
        codec.decode(data)


@pytest.mark.parametrize("head", [b"\xdd", b"\xdf", b"\xc6", b"\xdb"])
def test_a_length_that_lies_takes_no_memory(head: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(WireError):
        Codec().decode(head + b"\xff\xff\xff\xff")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_depth_without_end_is_refused() -> None:
    with pytest.raises(WireError):
        Codec().decode(b"\x91" * 100_000)


def test_signed_http() -> None:
    header = wire.sign_http(SECRET, "POST", "/kvferry/v1/instances", b"{}", now_s=1000.0)
    wire.verify_http(SECRET, header, "POST", "/kvferry/v1/instances", b"{}", now_s=1030.0)
    for args in [
        ("PUT", "/kvferry/v1/instances", b"{}"),
        ("POST", "/x", b"{}"),
        ("POST", "/kvferry/v1/instances", b""),
    ]:
        with pytest.raises(AuthenticationError, match="does not match"):
            wire.verify_http(SECRET, header, *args, now_s=1000.0)
    with pytest.raises(AuthenticationError, match="120 s off"):
        wire.verify_http(SECRET, header, "POST", "/kvferry/v1/instances", b"{}", now_s=1120.0)
    for bad in (None, "", "x", "1:2:3:4:5", "²:x:y"):
        with pytest.raises(AuthenticationError):
            wire.verify_http(SECRET, bad, "POST", "/x", b"")


@pytest.mark.parametrize(
    ("host", "refused"), [("127.0.0.1", False), ("::1", False), ("0.0.0.0", True), ("node7", True)]
)
def test_a_listener_beyond_loopback_needs_a_secret(host: str, refused: bool) -> None:
    wire.require_secret(host, SECRET, "the router")
    if refused:
        with pytest.raises(ConfigError, match="KVFERRY_CLUSTER_SECRET"):
            wire.require_secret(host, None, "the router")
    else:
        wire.require_secret(host, None, "the router")
