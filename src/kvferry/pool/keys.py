"""What names a block in the pool: a space (fingerprint and namespace) and the block's hash."""

from __future__ import annotations

import enum
import hashlib

import msgspec

from kvferry.errors import RegistrationError
from kvferry.layout import Fingerprint, KVLayout

MAX_HASH_BYTES = 64
MAX_NAMESPACE_BYTES = 128


class Tier(enum.StrEnum):
    """Where a block lies: a block in host memory may lie on disk too."""

    HOST = "host"
    DISK = "disk"


class BlockSpace(msgspec.Struct, frozen=True):
    """The blocks that may serve one another's requests: one model as computed one way, for one tenant.

    `fingerprint` is 32 bytes. Blocks of different spaces never meet, whatever their hashes are.
    """

    fingerprint: bytes
    namespace: str = "default"

    @classmethod
    def of(cls, fingerprint: Fingerprint, layout: KVLayout, namespace: str = "default") -> BlockSpace:
        """The space of one rank's blocks of a model in a namespace.

        What makes the bytes of two ranks' blocks differ is in its fingerprint: the packing, the order inside a block,
        the slice of heads. Where blocks lie and how many there are is not.
        """
        packing = (
            len(layout.layers),
            layout.block_size,
            layout.block_bytes,
            layout.num_kv_heads,
            layout.grid,
            layout.opaque,
            layout.tp_rank,
            layout.tp_size,
        )
        return cls(hashlib.sha256(fingerprint.digest() + msgspec.json.encode(packing)).digest(), namespace)

    def require_valid(self) -> None:
        """Raises: RegistrationError for a fingerprint or namespace of a size that no header holds."""
        if len(self.fingerprint) != 32 or len(self.namespace.encode()) > MAX_NAMESPACE_BYTES:
            raise RegistrationError(
                f"a fingerprint digest of {len(self.fingerprint)} bytes in a namespace of "
                f"{len(self.namespace.encode())}; expected 32 and at most {MAX_NAMESPACE_BYTES}"
            )


def require_hashes(hashes: list[bytes]) -> None:
    """Raises: RegistrationError if a hash is empty or longer than a header holds."""
    for block_hash in hashes:
        if not 0 < len(block_hash) <= MAX_HASH_BYTES:
            raise RegistrationError(f"a block hash of {len(block_hash)} bytes; expected 1 to {MAX_HASH_BYTES}")
