"""Block hashes: equal prefixes give equal chains, anything else gives other ones."""

from __future__ import annotations

import numpy as np

from kvferry.hashing import block_hashes, hash_list_digest, root_hash

ROOT = root_hash(b"fingerprint")
TOKENS = list(range(100, 150))


def test_the_chain_covers_full_blocks_only_and_everything_before_them() -> None:
    chain = block_hashes(TOKENS, 16, ROOT)
    assert len(chain) == 3
    assert block_hashes(TOKENS[:32], 16, ROOT) == chain[:2]
    changed = block_hashes([0, *TOKENS[1:]], 16, ROOT)
    assert all(a != b for a, b in zip(chain, changed, strict=True))


def test_the_same_block_after_another_prefix_is_another_block() -> None:
    assert block_hashes([1] * 16 + [2] * 16, 16, ROOT)[1] != block_hashes([3] * 16 + [2] * 16, 16, ROOT)[1]


def test_tenants_and_models_never_share_a_hash() -> None:
    roots = [ROOT, root_hash(b"fingerprint", "tenant"), root_hash(b"another")]
    assert len({block_hashes(TOKENS, 16, r)[0] for r in roots}) == 3


def test_the_prompt_digest_knows_the_tail_and_its_length() -> None:
    digests = {hash_list_digest(TOKENS[:n], 16, ROOT) for n in range(50)}
    assert len(digests) == 50
    assert hash_list_digest(np.array(TOKENS), 16, ROOT) == hash_list_digest(TOKENS, 16, ROOT)


def test_known_value() -> None:
    """The chain is part of the protocol: a change of it must change HASH_ALGORITHM."""
    known = "b02e0d143ccacaaee83a69ef8eda1d98b38aa1e3799ee50360538059e0c2a5c4"
    assert block_hashes(range(4), 4, bytes(32))[0].hex() == known
