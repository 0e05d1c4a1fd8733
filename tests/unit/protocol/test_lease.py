"""Leases, settings and timers."""

from __future__ import annotations

import math

import pytest

from kvferry.errors import ConfigError
from kvferry.protocol.lease import HandoffSettings, Lease, Timers
from kvferry.types import Word


def lease() -> Lease:
    return Lease(3, Word(7), ttl_s=2.0, now_s=10.0, latest_s=20.0)


def test_a_lease_lasts_a_term_from_the_tick_that_came_back() -> None:
    held = lease()
    assert held.expires_s == 12.0
    held.renew(11.0, now_s=11.9)
    assert held.expires_s == 13.0 and held.remaining_s(12.5) == 0.5 and held.remaining_s(14.0) == 0.0


def test_an_old_echo_does_not_revive_a_lease_and_none_shortens_it() -> None:
    held = lease()
    held.renew(9.0, now_s=15.0)
    held.renew(None, now_s=15.0)
    assert held.expires_s == 12.0


@pytest.mark.parametrize("echo_s", [16.0, math.inf, math.nan])
def test_an_echo_from_the_future_is_a_lie(echo_s: float) -> None:
    held = lease()
    held.renew(echo_s, now_s=15.0)
    assert held.expires_s == 12.0


def test_no_lease_outlives_its_latest_end() -> None:
    held = lease()
    held.renew(19.5, now_s=19.6)
    assert held.expires_s == 20.0


def test_a_lease_is_claimed_once() -> None:
    held = lease()
    assert [held.claim(), held.claim(), held.claim()] == [True, False, False]


def test_a_lease_must_hold_three_heartbeats() -> None:
    with pytest.raises(ConfigError, match="does not hold three heartbeats"):
        HandoffSettings(lease_ttl_s=1.0, heartbeat_s=0.5)


@pytest.mark.parametrize(("said", "believed"), [(5.0, 5.0), (-1.0, 0.0), (math.nan, 0.0), (math.inf, 60.0)])
def test_a_peers_remaining_time_is_bounded(said: float, believed: float) -> None:
    assert HandoffSettings(max_remaining_s=60.0).bounded_s(said) == believed


def test_timers_wake_in_order_and_a_later_setting_replaces_an_earlier_one() -> None:
    timers: Timers[str] = Timers()
    timers.set("a", 5.0)
    timers.set("b", 3.0)
    timers.set("c", 4.0)
    timers.set("b", 9.0)
    timers.drop("c")
    timers.drop("never set")
    assert timers.next_s() == 5.0 and "b" in timers and "c" not in timers
    assert timers.due(4.9) == []
    assert timers.due(9.0) == ["a", "b"]
    assert timers.next_s() is None and "a" not in timers


def test_a_timer_that_is_set_again_and_again_wakes_once() -> None:
    timers: Timers[str] = Timers()
    for at_s in (1.0, 2.0, 1.0, 2.0):
        timers.set("a", at_s)
    assert timers.due(5.0) == ["a"] and timers.due(5.0) == []
