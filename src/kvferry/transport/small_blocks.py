"""Requests for one small block over a data stream, and what `_stream.c` makes of them, where it was built.

The reader's exchange is one call then, and the owner answers without Python: `DataStream.ask_block` and
`DataStream.receive_request`.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from kvferry.errors import WireError
from kvferry.transport.base import Region
from kvferry.wire import Session

try:
    from kvferry.transport import _stream  # type: ignore[attr-defined, unused-ignore]

    in_c: Any = _stream
except ImportError:  # The wheel was built without a C compiler.
    in_c = None

AWAKE_US = 150
"""How long a frame is waited for without sleeping, on a stream whose last one came within BUSY_S. Waking a core of a
virtual machine took up to that long here."""

BUSY_S = 1e-3

_BLOCK, _GUARD = struct.Struct("<BQ16sQq"), struct.Struct("<Q16sqq")


class BlockRequest(NamedTuple):
    """Send one small block: the status brings the verdict with it, because the block was copied out before.

    On the wire not msgpack but fixed fields, which C reads easily. `guard`: region, token, offset, word.
    """

    region_id: int
    token: str
    nbytes: int
    offset: int
    guard: tuple[int, str, int, int] | None = None

    def encode(self) -> bytes:
        block = _BLOCK.pack(self.guard is not None, self.region_id, bytes.fromhex(self.token), self.nbytes, self.offset)
        if self.guard is None:
            return block
        holder_id, holder_token, at, word = self.guard
        return block + _GUARD.pack(holder_id, bytes.fromhex(holder_token), at, word)

    @classmethod
    def decode(cls, payload: bytes) -> BlockRequest:
        """Raises: WireError."""
        guarded = payload[:1] == b"\1"
        if len(payload) != _BLOCK.size + guarded * _GUARD.size:
            raise WireError(f"{len(payload)} bytes are no request for a block")
        _, region_id, token, nbytes, offset = _BLOCK.unpack_from(payload)
        if not guarded:
            return cls(region_id, token.hex(), nbytes, offset)
        holder_id, holder_token, at, word = _GUARD.unpack_from(payload, _BLOCK.size)
        return cls(region_id, token.hex(), nbytes, offset, (holder_id, holder_token.hex(), at, word))

    @staticmethod
    def begins(payload: bytes) -> bool:
        """Whether this is one; a msgpack array begins with other bytes."""
        return payload[:1] in (b"\0", b"\1")


class ServedRegions:
    """The owner's regions from which small blocks are answered in C; without C nothing is."""

    def __init__(self) -> None:
        self._c = in_c
        self._table = None if in_c is None else in_c.regions()

    def admit(self, region: Region) -> None:
        if self._table is not None:
            self._c.admit(self._table, region.region_id, region.address, region.nbytes, bytes.fromhex(region.token))

    def withdraw(self, region_id: int) -> None:
        """When this returns, none of the region's bytes is being copied any more. Idempotent."""
        if self._table is not None:
            self._c.withdraw(self._table, region_id)

    def serve(self, fd: int, session: Session, place: memoryview, awake: bool) -> tuple[int, bool] | None:
        """Answer good requests for small blocks until something else comes: how many bytes of it lie in `place`, 0 at
        the end of the stream. None where there is no C.

        Args:
            awake: whether to wait for a while without sleeping; returned for the next call.
        Raises: OSError.
        """
        if self._table is None:
            return None
        answered, got, awake = self._c.serve(
            fd, self._table, session.in_key, session.num_opened, session.out_key, session.num_sealed,
            place, AWAKE_US, awake,
        )  # fmt: skip
        session.num_opened += answered
        session.num_sealed += answered
        return got, awake


def receive_soon(fd: int, place: memoryview) -> int | None:
    """Receive what comes within AWAKE_US, without sleeping: bytes received, 0 at the end of the stream.

    None if nothing came, or where there is no C to wait in. Raises: OSError.
    """
    got = -1 if in_c is None else int(in_c.receive_soon(fd, place, AWAKE_US))
    return None if got < 0 else got
