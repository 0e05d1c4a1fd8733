"""How many streams a transfer gets."""

from __future__ import annotations

from kvferry.policy.streams import StreamCount


def test_the_stream_count_settles_on_what_gave_most() -> None:
    count = StreamCount(4)
    rates = {1: 5.0, 2: 9.0, 4: 7.0}
    chosen = []
    for _ in range(20):
        streams = count.choose()
        chosen.append(streams)
        count.learn(streams, rates[streams])
    assert chosen[:3] == [1, 2, 4]
    assert set(chosen[3:]) == {2}


def test_a_count_that_became_slow_is_left_when_the_others_are_checked_again() -> None:
    count = StreamCount(4)
    chosen = []
    for batch in range(200):
        streams = count.choose()
        chosen.append(streams)
        fast, slow = (2, 4) if batch < 50 else (4, 2)
        count.learn(streams, 9.0 if streams == fast else 2.0 if streams == slow else 5.0)
    assert set(chosen[3:31]) == {2} and chosen[-1] == 4


def test_a_limit_below_every_count_leaves_one_stream() -> None:
    assert StreamCount(0).choose() == StreamCount(1).choose() == 1
