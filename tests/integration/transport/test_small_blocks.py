"""One small block over tcp: each side with and without its C, which must speak and refuse alike."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from msgspec.structs import replace

from kvferry.errors import LeaseExpired, RegistrationError
from kvferry.testing.conformance import BLOCK, Case, offsets, shuffled, wait_until
from kvferry.testing.engines import EngineThread, LocalOwner
from kvferry.testing.owner import random_bytes
from kvferry.transport import small_blocks
from kvferry.transport.base import BlockList, Guard

NUM_BLOCKS = 16


@pytest.fixture(params=["c to c", "c to python", "python to c", "python to python"])
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    """Named by the reader's side and the owner's."""
    built = small_blocks.in_c
    asking, answering = request.param.split(" to ")
    if "c" in (asking, answering) and built is None:
        pytest.skip("built without a C compiler")
    monkeypatch.setattr(small_blocks, "in_c", built if answering == "c" else None)
    owner = LocalOwner(("tcp",))
    monkeypatch.setattr(small_blocks, "in_c", built if asking == "c" else None)
    with EngineThread(("tcp",)) as reader:
        region_id = owner.call("region", NUM_BLOCKS * BLOCK, seed=7, shared=False, writable=True)
        peer = reader.connect(owner.address)
        target = reader.engine.allocate(NUM_BLOCKS * BLOCK)
        target.buffer[:] = 0xEE
        yield Case(reader, owner, peer, peer.regions[region_id], target, random_bytes(NUM_BLOCKS * BLOCK, 7))
    owner.close()


def read_one(case: Case, source: int, target: int, nbytes: int, guard: Guard | None = None) -> None:
    case.reader.engine.read_sync(case.peer, case.blocks([source], [target], nbytes), guard=guard, deadline_s=60.0)


def word_of(case: Case, word: int) -> int:
    words = case.owner.call("region", 4096, shared=False)
    case.owner.call("word", words, 8, word)
    wait_until(lambda: words in case.peer.regions)
    return int(words)


@pytest.mark.parametrize("nbytes", [1, 4096, BLOCK])
def test_a_block_comes_into_place_and_nothing_else(case: Case, nbytes: int) -> None:
    guard = Guard(word_of(case, -5), 8, -5)
    for source, target in ((13, 77), (BLOCK + 1, 3 * BLOCK)):
        read_one(case, source, target, nbytes, guard)
        assert np.array_equal(case.target.buffer[target : target + nbytes], case.expected[source : source + nbytes])
        case.target.buffer[target : target + nbytes] = 0xEE
        assert (case.target.buffer == 0xEE).all()


def test_small_and_large_requests_take_turns_on_a_stream(case: Case) -> None:
    words = word_of(case, 9)
    order = shuffled(NUM_BLOCKS, 3)
    for _ in range(3):
        for index in range(NUM_BLOCKS):
            read_one(case, index * BLOCK, index * BLOCK, 4096)
        case.target.buffer[:] = 0
        case.read(case.blocks(order, order))
        assert np.array_equal(case.target.buffer, case.expected)
        assert case.reader.engine.load_word_sync(case.peer, words, 8, deadline_s=60.0) == 9
        case.write(BlockList(case.target, case.source, order, order, BLOCK))


def test_another_word_is_an_expired_lease(case: Case) -> None:
    words = word_of(case, 4711)
    read_one(case, 0, 0, 64, Guard(words, 8, 4711))
    with pytest.raises(LeaseExpired):
        read_one(case, 0, 0, 64, Guard(words, 8, 4712))
    case.owner.call("word", words, 8, 0)
    with pytest.raises(LeaseExpired):
        read_one(case, 0, 0, 64, Guard(words, 8, 4711))


def test_what_the_owner_must_refuse_is_refused(case: Case) -> None:
    """Where this side's own checks are circumvented: the owner's stand, whoever answers."""
    known = case.source
    beyond = replace(known, nbytes=2 * known.nbytes)
    forged = replace(known, token="00" * 16)
    unknown = replace(known, region_id=known.region_id + 100)
    link = case.peer.ways[0].link
    assert link is not None
    for region, source in ((beyond, known.nbytes - 4095), (beyond, 2**62), (forged, 0), (unknown, 0)):
        block = BlockList(region, case.target, offsets([source]), offsets([0]), 4096)
        with pytest.raises(RegistrationError):
            link.read_block(block, guard=None, deadline_s=60.0)
    words = word_of(case, 1)
    for at in (-8, 4, 4096):
        with pytest.raises((RegistrationError, LeaseExpired)):
            link.read_block(case.blocks([0], [0], 4096), guard=Guard(words, at, 0), deadline_s=60.0)
    assert (case.target.buffer == 0xEE).all()
    read_one(case, 0, 0, 4096)
    assert np.array_equal(case.target.buffer[:4096], case.expected[:4096])


def test_memory_that_was_taken_back_is_not_served(case: Case) -> None:
    link = case.peer.ways[0].link
    assert link is not None
    link.read_block(case.blocks([0], [0], 4096), guard=None, deadline_s=60.0)
    case.target.buffer[:] = 0xEE
    case.owner.call("unregister", case.source.region_id)
    with pytest.raises(RegistrationError):
        link.read_block(case.blocks([0], [0], 4096), guard=None, deadline_s=60.0)
    assert (case.target.buffer == 0xEE).all()
