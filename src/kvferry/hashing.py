"""Chained block hashes: the content identity of a block, given everything before it. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

HASH_ALGORITHM = "sha256-chain-v1"


def root_hash(fingerprint_digest: bytes, namespace: str = "") -> bytes:
    """The chain's start: 32 bytes that differ for each fingerprint and each tenant's namespace (its salt)."""
    return hashlib.sha256(b"kvferry-root\0" + fingerprint_digest + b"\0" + namespace.encode()).digest()


def block_hashes(token_ids: Sequence[int] | npt.NDArray[np.uint32], block_size: int, root: bytes) -> list[bytes]:
    """Hash each full block of `block_size` tokens, chained over the prefix.

    Args:
        token_ids: the prompt; a tail shorter than a block gets no hash here (see `hash_list_digest`).
        root: what `root_hash` gave.
    Returns:
        `len(token_ids) // block_size` digests of 32 bytes.
    """
    tokens = np.asarray(token_ids, dtype="<u4").tobytes()
    hashes, parent, step = [], root, 4 * block_size
    for start in range(0, len(tokens) - step + 1, step):
        parent = hashlib.sha256(parent + tokens[start : start + step]).digest()
        hashes.append(parent)
    return hashes


def hash_list_digest(token_ids: Sequence[int], block_size: int, root: bytes) -> bytes:
    """One 32-byte identity for a whole prompt: its full blocks' chain, then the tail with its length.

    The partial last block has an identity of its own (hash and length), so that a block that was filled up
    later is never taken for it.
    """
    tokens = np.asarray(token_ids, dtype="<u4")
    full = block_hashes(tokens, block_size, root)
    tail = tokens[len(full) * block_size :]
    parent = full[-1] if full else root
    return hashlib.sha256(b"tail\0" + parent + len(tail).to_bytes(4, "little") + tail.tobytes()).digest()
