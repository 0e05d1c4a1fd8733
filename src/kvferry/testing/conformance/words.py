"""T2 and T3: the lease's word is seen no earlier than the data, its store before later writes."""

from __future__ import annotations

import time

import numpy as np
import pytest

from kvferry.errors import LeaseExpired
from kvferry.testing.conformance.case import BLOCK, Case, OwnerAndReader, shuffled, wait_until
from kvferry.transport.base import Guard


class LeaseWords(OwnerAndReader):
    """Reads under a guard."""

    def test_a_standing_word_passes_and_another_one_is_an_expired_lease(self, case: Case) -> None:
        words = case.owner.call("region", 4096, shared=self.shared)
        case.owner.call("word", words, 8, 4711)
        wait_until(lambda: words in case.peer.regions)
        case.read(case.blocks([0], [0]), guard=Guard(words, 8, 4711))
        case.owner.call("word", words, 8, 0)
        with pytest.raises(LeaseExpired):
            case.read(case.blocks([0], [0]), guard=Guard(words, 8, 4711))
        with pytest.raises(LeaseExpired):
            case.reader.engine.read_sync(case.peer, [], guard=Guard(words, 8, 4711), deadline_s=30.0)
        loaded = case.reader.run(case.reader.engine.load_word(case.peer, words, 8, deadline_s=30.0))
        assert loaded == 0

    def test_bytes_accepted_under_a_word_were_published_under_it(self, case: Case) -> None:
        words = case.owner.call("region", 4096, shared=self.shared)
        wait_until(lambda: words in case.peer.regions)
        accepted = refused = 0
        case.owner.call("churn", case.source.region_id, words, 0, BLOCK, self.word_stands_s)
        try:
            until_s = time.monotonic() + 60.0
            everything = case.blocks(shuffled(64, 1), shuffled(64, 2))
            while time.monotonic() < until_s and (accepted < 5 or refused < 5):
                word = case.reader.engine.load_word_sync(case.peer, words, 0, deadline_s=30.0)
                if word == 0:
                    continue
                # Small reads are accepted often, large ones seldom: both must happen for the test to mean anything.
                batch = everything if refused < 5 else case.blocks([0], [0])
                try:
                    case.reader.engine.read_sync(case.peer, batch, guard=Guard(words, 0, word), deadline_s=30.0)
                except LeaseExpired:
                    refused += 1
                    continue
                accepted += 1
                seen = np.unique(case.target.buffer[: batch.total_bytes].view(np.int64))
                assert seen.tolist() == [word]
        finally:
            case.owner.call("calm")
        assert accepted, "no read was ever accepted: the test showed nothing"
        assert refused, "no read was ever refused: the test showed nothing"
