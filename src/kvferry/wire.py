"""Bytes on a socket: bounded frames, msgpack messages, a handshake without I/O, signed HTTP. No pickle anywhere.

A frame is `KVF1 | length u32 | check 16 bytes | payload`. Before and during the handshake the check is xxh3-128 of
the payload, which stops accidents; afterwards it is a MAC (BLAKE2b) with the session's key over direction, counter and
payload (of a long one its SHA-256), which stops attackers, replays and reordering. Payloads are authenticated, not
encrypted: the network that carries KV caches must be one that you trust to look.

The handshake proves on both sides that the peer knows the cluster secret, which itself never travels: each side
sends a nonce, and the session key is an HMAC of the secret over role, both nonces and both incarnations (challenge
and response as in ISO/IEC 9798-4). What a side tells of itself (`hello`) is sent only after the other has proved
itself.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import struct
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import msgspec
import numpy as np
import xxhash

from kvferry.addresses import is_loopback
from kvferry.errors import AuthenticationError, CompatibilityError, ConfigError, KVError, WireError
from kvferry.layout import PROTOCOL_VERSION
from kvferry.types import Incarnation

MAGIC = b"KVF1"
HEADER = struct.Struct("<4sI16s")
MAX_FRAME_BYTES = 16 << 20
MAX_HANDSHAKE_BYTES = 4 << 20
MAX_CLOCK_SKEW_S = 60.0
HASHED_FROM_BYTES = 4096
"""Payloads from here on are authenticated by their SHA-256, which processors compute in hardware: of a thousand block
hashes in half the time that BLAKE2b takes for all of it."""

_NDARRAY = 1
_log = logging.getLogger("kvferry.wire")

T = TypeVar("T")


# Frames ------------------------------------------------------------------------------------------------------------


class Frame(NamedTuple):
    """One frame as it came off the socket, not yet checked."""

    check: bytes
    payload: bytes


def encode_frame(payload: bytes, check: bytes | None = None) -> bytes:
    """A frame around `payload`; its check is xxh3-128 unless a session's MAC is given."""
    return HEADER.pack(MAGIC, len(payload), check or xxhash.xxh3_128_digest(payload)) + payload


def open_frame(frame: Frame) -> bytes:
    """The payload of a frame that no session sealed.

    Raises: WireError if the check does not match.
    """
    if frame.check != xxhash.xxh3_128_digest(frame.payload):
        raise WireError(
            f"a frame of {len(frame.payload)} bytes does not match its checksum: something between the two sides "
            "changes bytes (a proxy?), or the peer has sealed it for another session"
        )
    return frame.payload


class FrameDecoder:
    """Cuts a byte stream into frames. Holds at most one frame and what one `feed` brought.

    After a WireError the stream cannot be trusted any more: close the connection.
    """

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self.max_frame_bytes = max_frame_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> list[Frame]:
        """All frames that `data` completes.

        Raises: WireError at the first header that is no kvferry header or is too large; nothing is buffered for it.
        """
        self._buffer += data
        frames, at = [], 0
        while len(self._buffer) - at >= HEADER.size:
            magic, length, check = HEADER.unpack_from(self._buffer, at)
            if magic != MAGIC:
                raise WireError(
                    f"expected a kvferry frame, which begins with {MAGIC!r}, and saw {bytes(magic)!r}: the port "
                    "belongs to another service, or the peer speaks another kvferry version"
                )
            if length > self.max_frame_bytes:
                raise WireError(f"a frame announces {length} bytes; at most {self.max_frame_bytes} are accepted here")
            if len(self._buffer) - at - HEADER.size < length:
                break
            start = at + HEADER.size
            frames.append(Frame(check, bytes(self._buffer[start : start + length])))
            at = start + length
        del self._buffer[:at]
        return frames


# Values and messages -----------------------------------------------------------------------------------------------


class TensorMeta(msgspec.Struct, frozen=True):
    """What there is to say about a tensor without its data. `strides` are in elements."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    device: str = "cpu"

    @classmethod
    def of(cls, tensor: Any) -> TensorMeta:
        """The metadata of a torch tensor or a numpy array."""
        if isinstance(tensor, np.ndarray):
            strides = tuple(s // tensor.itemsize for s in tensor.strides)
            return cls(str(tensor.dtype), tuple(tensor.shape), strides)
        dtype = str(tensor.dtype).removeprefix("torch.")
        return cls(dtype, tuple(tensor.shape), tuple(tensor.stride()), str(tensor.device))


def _to_wire(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biufc":
            raise TypeError(f"arrays of dtype {value.dtype} cannot travel; only numbers and booleans can")
        body = msgspec.msgpack.encode((value.dtype.str, value.shape, np.ascontiguousarray(value).tobytes()))
        return msgspec.msgpack.Ext(_NDARRAY, body)
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot travel; send numbers, text, bytes, lists, dicts, arrays, Structs")


_array_decoder = msgspec.msgpack.Decoder(tuple[str, tuple[int, ...], bytes])


def _from_wire(code: int, data: memoryview) -> Any:
    if code != _NDARRAY:
        raise WireError(f"extension type {code} is unknown; this version knows {_NDARRAY} (array)")
    name, shape, raw = _array_decoder.decode(data)
    try:
        dtype = np.dtype(name)
        if dtype.kind not in "biufc" or any(n < 0 for n in shape):
            raise ValueError("not an array of numbers")
        return np.frombuffer(raw, dtype=dtype).reshape(shape).copy()
    except (TypeError, ValueError) as error:
        raise WireError(f"an array of dtype {name[:40]!r}, shape {shape[:8]} and {len(raw)} bytes is none") from error


class Codec(Generic[T]):
    """Messages of one type (a Struct, a tagged union, or Any) to msgpack and back."""

    def __init__(self, message_type: Any = Any) -> None:
        self._encoder = msgspec.msgpack.Encoder(enc_hook=_to_wire)
        self._decoder = msgspec.msgpack.Decoder(message_type, ext_hook=_from_wire)

    def encode(self, message: T) -> bytes:
        """Raises: WireError for a value that cannot travel; the message names its type."""
        try:
            return self._encoder.encode(message)
        except (TypeError, OverflowError, RecursionError) as error:
            raise WireError(f"cannot encode {type(message).__name__}: {error}") from error

    def decode(self, payload: bytes) -> T:
        """Raises: WireError for bytes that are no such message."""
        try:
            message: T = self._decoder.decode(payload)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise WireError(f"{len(payload)} bytes are no valid message: {error}") from error
        return message


# The handshake -----------------------------------------------------------------------------------------------------


class ClientHello(msgspec.Struct, frozen=True, tag="client_hello"):
    version: int
    incarnation: int
    nonce: bytes
    secured: bool


class ServerHello(msgspec.Struct, frozen=True, tag="server_hello"):
    version: int
    incarnation: int
    nonce: bytes
    proof: bytes


class Introduction(msgspec.Struct, frozen=True, tag="introduction"):
    hello: bytes


class Refusal(msgspec.Struct, frozen=True, tag="refusal"):
    cause: str
    message: str


_handshake_codec: Codec[ClientHello | ServerHello | Introduction | Refusal] = Codec(
    ClientHello | ServerHello | Introduction | Refusal
)
_refusals: dict[str, type[KVError]] = {
    "authentication_error": AuthenticationError,
    "compatibility_error": CompatibilityError,
    "wire_error": WireError,
}


class Session:
    """An authenticated connection: seals what goes out, opens what comes in. One per connection, in order.

    Keys and counts of frames are public for code that seals and opens without Python.
    """

    def __init__(self, key: bytes, role: Literal["client", "server"]) -> None:
        other = "server" if role == "client" else "client"
        self._key = key
        self.out_key, self.in_key = self.derive(role), self.derive(other)
        self.num_sealed = self.num_opened = 0
        self.peer_incarnation = Incarnation(0)
        self.peer_hello = b""

    def derive(self, label: str) -> bytes:
        """32 bytes that only the two ends of this session know, different for each label."""
        return hmac.digest(self._key, b"kvferry-derive\0" + label.encode(), "sha256")

    def seal(self, payload: bytes) -> bytes:
        """The frame that carries `payload` to the peer."""
        check = _mac(self.out_key, self.num_sealed, payload)
        self.num_sealed += 1
        return encode_frame(payload, check)

    def open(self, frame: Frame) -> bytes:
        """The payload of the peer's next frame.

        Raises: WireError if it was changed, repeated or reordered on the way; close the connection.
        """
        if not hmac.compare_digest(frame.check, _mac(self.in_key, self.num_opened, frame.payload)):
            raise WireError(
                f"frame {self.num_opened} of {len(frame.payload)} bytes has a wrong MAC: it was changed, repeated "
                "or reordered on the way"
            )
        self.num_opened += 1
        return frame.payload


def _mac(key: bytes, counter: int, payload: bytes) -> bytes:
    stamp = counter.to_bytes(8, "little")
    if len(payload) < HASHED_FROM_BYTES:
        return hashlib.blake2b(stamp + payload, key=key, digest_size=16).digest()
    digest = hashlib.sha256(payload).digest()
    # Named, so that no short payload that is such a digest has the same MAC.
    return hashlib.blake2b(stamp + digest, key=key, digest_size=16, person=b"sha256").digest()


class Handshake:
    """Both sides of the handshake, without I/O: feed frames, send what comes back, until `session` is set.

    Args:
        secret: the cluster's, or None on loopback; both sides must agree.
        hello: what this side tells an authenticated peer about itself.
        check_hello: called with the peer's hello; a KVError that it raises refuses the peer, on both sides.
    """

    def __init__(
        self,
        role: Literal["client", "server"],
        *,
        secret: bytes | None,
        incarnation: Incarnation,
        hello: bytes = b"",
        check_hello: Callable[[bytes], None] | None = None,
        version: int = PROTOCOL_VERSION,
    ) -> None:
        self._role = role
        self._secret = secret
        self._incarnation = incarnation
        self._hello = hello
        self._check_hello = check_hello
        self._version = version
        self._nonce = secrets.token_bytes(16)
        self._pending: Session | None = None
        self.session: Session | None = None

    def start(self) -> bytes:
        """What to send at once: the client's first frame, nothing for a server."""
        if self._role == "server":
            return b""
        hello = ClientHello(self._version, self._incarnation, self._nonce, self._secret is not None)
        return encode_frame(_handshake_codec.encode(hello))

    def receive(self, frame: Frame) -> bytes:
        """Take the peer's next frame; return what to send in answer (may be empty).

        Raises:
            AuthenticationError, CompatibilityError, WireError: the peer is refused, or has refused this side. Where
            `refusal(error)` gives bytes, send them before closing, so that the peer learns the cause too.
        """
        if self.session is not None:
            raise WireError("the handshake is over; frames now belong to the session")
        if self._pending is not None and frame.check != xxhash.xxh3_128_digest(frame.payload):
            message = _handshake_codec.decode(self._open_pending(frame))
        else:
            message = _handshake_codec.decode(open_frame(frame))
            if isinstance(message, Introduction):
                raise AuthenticationError("the peer introduced itself without the session's MAC")
        match message:
            case Refusal():
                raise _refusals.get(message.cause, CompatibilityError)(f"the peer refused: {message.message}")
            case ClientHello() if self._role == "server" and self._pending is None:
                return self._answer_client(message)
            case ServerHello() if self._role == "client" and self._pending is None:
                return self._answer_server(message)
            case Introduction() if self._pending is not None:
                return self._meet(message.hello)
        raise WireError(f"{type(message).__name__} is out of turn in the handshake of a {self._role}")

    def refusal(self, error: KVError) -> bytes:
        """The frame that tells the peer why it is refused."""
        return encode_frame(_handshake_codec.encode(Refusal(error.cause, error.message[:2000])))

    def _open_pending(self, frame: Frame) -> bytes:
        assert self._pending is not None
        try:
            return self._pending.open(frame)
        except WireError as error:
            raise AuthenticationError(
                "the peer could not prove that it knows the cluster secret: KVFERRY_CLUSTER_SECRET must be the same "
                "on both sides"
            ) from error

    def _answer_client(self, hello: ClientHello) -> bytes:
        self._require_version(hello.version)
        if hello.secured != (self._secret is not None):
            ours, theirs = ("a", "no") if self._secret is not None else ("no", "a")
            raise AuthenticationError(
                f"this side has {ours} cluster secret and the peer has {theirs} secret: set KVFERRY_CLUSTER_SECRET "
                "to the same value on both sides, or on neither (loopback only)"
            )
        key = self._session_key(hello.nonce, self._nonce, hello.incarnation, self._incarnation)
        self._pending = Session(key, "server")
        self._pending.peer_incarnation = Incarnation(hello.incarnation)
        proof = self._pending.derive("server-proof")
        answer = ServerHello(self._version, self._incarnation, self._nonce, proof)
        return encode_frame(_handshake_codec.encode(answer))

    def _answer_server(self, hello: ServerHello) -> bytes:
        self._require_version(hello.version)
        key = self._session_key(self._nonce, hello.nonce, self._incarnation, hello.incarnation)
        self._pending = Session(key, "client")
        self._pending.peer_incarnation = Incarnation(hello.incarnation)
        if not hmac.compare_digest(hello.proof, self._pending.derive("server-proof")):
            raise AuthenticationError(
                "the listening side could not prove that it knows the cluster secret: KVFERRY_CLUSTER_SECRET must be "
                "the same on both sides"
            )
        return self._pending.seal(_handshake_codec.encode(Introduction(self._hello)))

    def _meet(self, peer_hello: bytes) -> bytes:
        assert self._pending is not None
        if self._check_hello is not None:
            self._check_hello(peer_hello)
        self.session = self._pending
        self.session.peer_hello = peer_hello
        if self._role == "client":
            return b""
        return self.session.seal(_handshake_codec.encode(Introduction(self._hello)))

    def _session_key(self, client_nonce: bytes, server_nonce: bytes, client_inc: int, server_inc: int) -> bytes:
        transcript = msgspec.msgpack.encode((self._version, client_nonce, server_nonce, client_inc, server_inc))
        return hmac.digest(self._secret or b"", b"kvferry-session\0" + transcript, "sha256")

    def _require_version(self, theirs: int) -> None:
        if theirs != self._version:
            raise CompatibilityError(
                f"kvferry protocol version here {self._version}, there {theirs}: install the same kvferry release "
                "on both sides",
                stage="connect",
            )


class Refusals:
    """Counts and logs what was refused, one line each, at most one line a second."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._logged_s = float("-inf")

    def add(self, peer: str, error: KVError) -> None:
        """Note that `peer` was refused because of `error`."""
        self.counts[error.cause] += 1
        now_s = time.monotonic()
        if now_s - self._logged_s >= 1.0:
            self._logged_s = now_s
            _log.warning("refused %s: %s (refusals so far: %d)", peer, error, sum(self.counts.values()))


# Secrets and HTTP --------------------------------------------------------------------------------------------------


def new_secret() -> str:
    """A fresh cluster secret: 64 hex digits."""
    return secrets.token_hex(32)


def require_secret(host: str, secret: bytes | None, what: str) -> None:
    """Raises: ConfigError if `what` would listen beyond loopback without a cluster secret."""
    if secret is None and not is_loopback(host):
        raise ConfigError(
            f"{what} would listen on {host}, beyond loopback, without a cluster secret: anyone who reaches it could "
            "read KV caches. Set KVFERRY_CLUSTER_SECRET (or cluster.secret_file) to one value on all machines, or "
            "bind 127.0.0.1"
        )


def sign_http(secret: bytes, method: str, path: str, body: bytes, *, now_s: float | None = None) -> str:
    """The value of the header `x-kvferry-auth`: wall-clock milliseconds, a nonce and an HMAC over the request."""
    stamp = f"{int((time.time() if now_s is None else now_s) * 1000)}:{secrets.token_hex(8)}"
    return f"{stamp}:{_http_mac(secret, stamp, method, path, body)}"


def verify_http(
    secret: bytes, header: str | None, method: str, path: str, body: bytes, *, now_s: float | None = None
) -> None:
    """Raises: AuthenticationError if the header is absent, wrong, or older than a minute."""
    stamp, _, mac = (header or "").rpartition(":")
    millis, _, nonce = stamp.partition(":")
    if not header or not nonce or not (millis.isascii() and millis.isdigit()) or len(millis) > 16:
        raise AuthenticationError("the request carries no valid x-kvferry-auth header; a cluster secret is required")
    if not hmac.compare_digest(mac, _http_mac(secret, stamp, method, path, body)):
        raise AuthenticationError("x-kvferry-auth does not match: KVFERRY_CLUSTER_SECRET differs, or bytes changed")
    skew_s = abs((time.time() if now_s is None else now_s) - int(millis) / 1000)
    if skew_s > MAX_CLOCK_SKEW_S:
        raise AuthenticationError(
            f"x-kvferry-auth is {skew_s:.0f} s off this machine's clock, at most {MAX_CLOCK_SKEW_S:.0f} are accepted: "
            "set the clocks (NTP)"
        )


def _http_mac(secret: bytes, stamp: str, method: str, path: str, body: bytes) -> str:
    text = f"{stamp}\n{method}\n{path}\n".encode() + hashlib.sha256(body).digest()
    return hmac.new(secret, text, "sha256").hexdigest()
