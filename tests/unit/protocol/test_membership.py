"""The table of instances: lives, silence, names used twice, edges."""

from __future__ import annotations

from typing import Any

import msgspec

from kvferry.layout import Fingerprint
from kvferry.protocol.membership import EDGE_FAILURES, STUCK_AFTER_S, InstanceReport, Membership, Verdict

FINGERPRINT = Fingerprint(model="m", dtype="f", block_size=16, num_layers=1, num_kv_heads=1, head_size=8)
EDGE = ("p", 1, "d", 2)


def report(instance_id: str = "a", incarnation: int = 1, **fields: Any) -> InstanceReport:
    given = {"role": "decode", "url": f"http://h:{incarnation}", "model": "m", **fields}
    return InstanceReport(instance_id=instance_id, incarnation=incarnation, **given)


def names(table: Membership) -> set[tuple[str, int]]:
    return {(m.report.instance_id, m.report.incarnation) for m in table}


def test_joining_is_heartbeating() -> None:
    table = Membership(3.0)
    assert table.report(report(), 0.0) is Verdict.JOINED
    assert table.report(report(running=2), 2.9) is Verdict.REFRESHED
    assert table.expire(5.8) == [] and table.is_live("a", 1)
    (gone,) = table.expire(6.0)
    assert gone.report.running == 2 and len(table) == 0
    # A stopped process that goes on is as good as before.
    assert table.report(report(), 9.0) is Verdict.JOINED


def test_a_restart_replaces_the_old_life_for_good() -> None:
    table = Membership(3.0)
    table.report(report(), 0.0)
    assert table.report(report(incarnation=2), 0.1) is Verdict.RESTARTED
    assert not table.is_live("a", 1)
    assert table.report(report(incarnation=1), 0.2) is Verdict.SUPERSEDED
    assert names(table) == {("a", 2)}
    table.expire(10.0)
    assert table.report(report(incarnation=1), 11.0) is Verdict.SUPERSEDED


def test_only_the_present_life_can_leave() -> None:
    table = Membership(3.0)
    table.report(report(incarnation=2), 0.0)
    assert table.leave("a", 1) is None and table.leave("b", 2) is None
    assert table.leave("a", 2) is not None and len(table) == 0


def test_the_table_is_bounded() -> None:
    table = Membership(3.0, max_instances=2)
    assert [table.report(report(n), 0.0) for n in "abc"] == ["joined", "joined", "full"]
    assert table.report(report("a"), 1.0) is Verdict.REFRESHED


def test_a_registration_replaces_the_poll_of_the_same_url() -> None:
    table = Membership(3.0)
    table.report(report("static", 0, url="http://h:1"), 0.0, polled=True)
    table.report(report("other", 0, url="http://h:2"), 0.0, polled=True)
    table.report(report("own", 5, url="http://h:1"), 0.0)
    assert names(table) == {("own", 5), ("other", 0)}


def test_a_loop_that_stands_still_with_work_is_stuck() -> None:
    table = Membership(3.0)
    table.report(report(step=1, running=1), 0.0)
    member = table.get("a")
    assert member is not None
    for at in range(40):
        table.report(report(step=1, running=1), float(at))
    assert not member.is_stuck(STUCK_AFTER_S - 1) and member.is_stuck(STUCK_AFTER_S + 1)
    table.report(report(step=2, running=1), 40.0)
    assert not member.is_stuck(41.0)
    # Idle loops may stand still.
    table.report(report(step=2), 80.0)
    assert not member.is_stuck(200.0)


def test_mismatches_name_both_values() -> None:
    table = Membership(3.0)
    table.report(report("a", fingerprint=FINGERPRINT), 0.0)
    other = msgspec.structs.replace(FINGERPRINT, dtype="g", protocol_version=9)
    (text,) = table.mismatches(report("b", fingerprint=other))
    assert "dtype: here 'g', there 'f'" in text and "peer a" in text
    assert f"protocol_version: here 9, there {FINGERPRINT.protocol_version}" in text
    assert table.mismatches(report("b", fingerprint=FINGERPRINT)) == []
    assert table.mismatches(report("b", fingerprint=other, model="another")) == []
    assert table.mismatches(report("b")) == []


def test_an_edge_rests_after_failures_in_a_row_and_longer_each_time() -> None:
    table = Membership(3.0)
    for _ in range(EDGE_FAILURES - 1):
        table.edge_failed(EDGE, "peer_gone", 0.0)
    assert table.edge_ok(EDGE, 0.0)
    table.edge_failed(EDGE, "transfer_timeout", 0.0)
    assert not table.edge_ok(EDGE, 0.9) and table.edge_ok(EDGE, 1.0)
    table.edge_failed(EDGE, "transfer_timeout", 1.0)
    assert not table.edge_ok(EDGE, 2.9) and table.edge_ok(EDGE, 3.0)
    for _ in range(50):
        table.edge_failed(EDGE, "x", 3.0)
    assert table.edge_ok(EDGE, 33.0)
    assert table.edge_ok(("p", 1, "d", 3), 3.0)
    table.edge_succeeded(EDGE)
    assert table.edge_ok(EDGE, 3.0) and table.edges() == {}
