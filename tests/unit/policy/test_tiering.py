"""Admission to disk: everything while it is idle, the likelier blocks as it fills, nothing beyond."""

from __future__ import annotations

from kvferry.policy.tiering import DiskLoad, admit_to_disk


def test_an_idle_disk_takes_everything_and_a_full_one_nothing() -> None:
    assert admit_to_disk(nbytes=10, depth=100, reuses=0, load=DiskLoad(0, 100))
    assert admit_to_disk(nbytes=10, depth=100, reuses=0, load=DiskLoad(40, 100))
    assert not admit_to_disk(nbytes=10, depth=0, reuses=9, load=DiskLoad(95, 100))


def test_a_busy_disk_takes_what_is_likelier_to_serve_again() -> None:
    busy = DiskLoad(60, 100)
    assert not admit_to_disk(nbytes=10, depth=100, reuses=0, load=busy)
    assert admit_to_disk(nbytes=10, depth=100, reuses=1, load=busy)
    assert admit_to_disk(nbytes=10, depth=0, reuses=0, load=busy)
