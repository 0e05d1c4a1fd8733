"""The port plan: no port has two uses, whatever the counts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.errors import ConfigError
from kvferry.policy.ports import InstancePorts, plan_ports

COUNTS = {"num_prefill": st.integers(0, 9), "num_decode": st.integers(0, 9), "num_ranks": st.integers(1, 8)}


@given(base=st.integers(1024, 30000), num_internal=st.integers(0, 20), **COUNTS)
def test_no_port_has_two_uses(base: int, num_internal: int, num_prefill: int, num_decode: int, num_ranks: int):
    plan = plan_ports(
        base, num_prefill=num_prefill, num_decode=num_decode, num_ranks=num_ranks, num_internal=num_internal
    )
    assert len(plan.decode) == num_decode and len(plan.prefill) == num_prefill
    assert len(set(plan.all)) == len(plan.all) == (num_decode + num_prefill) * (2 + num_ranks + num_internal)
    assert all(len(ports.handoff) == num_ranks for ports in (*plan.decode, *plan.prefill))
    for prefill in plan.prefill:
        assert prefill.http >= base + 5
        for decode in plan.decode:
            assert min(prefill.all) > max(decode.all)


def test_the_plan_of_1p1d():
    plan = plan_ports(20000, num_prefill=1, num_decode=1, num_ranks=2, num_internal=2)
    assert plan.decode == (InstancePorts(20000, (20001, 20002), 20003, (20004, 20005)),)
    assert plan.prefill == (InstancePorts(20006, (20007, 20008), 20009, (20010, 20011)),)


def test_bases_too_close_and_ports_too_high_are_named():
    with pytest.raises(ConfigError, match="use 20009 or more"):
        plan_ports(20000, num_prefill=1, num_decode=3, prefill_base=20005)
    with pytest.raises(ConfigError, match="use 20005 or more"):
        plan_ports(20000, num_prefill=1, num_decode=1, prefill_base=20004)
    assert plan_ports(20000, num_prefill=1, num_decode=1, prefill_base=20005).prefill[0].http == 20005
    with pytest.raises(ConfigError, match="65535"):
        plan_ports(65530, num_prefill=1, num_decode=1)
    with pytest.raises(ConfigError, match="1024"):
        plan_ports(1000, num_prefill=1, num_decode=1)
