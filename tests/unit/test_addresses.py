"""Who can reach a listener, by its host alone."""

from __future__ import annotations

import pytest

from kvferry.addresses import host_of, is_loopback, is_wildcard


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host) and not is_wildcard(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]"])
def test_wildcards_are_reachable_and_no_address_of_anybody(host: str) -> None:
    assert is_wildcard(host) and not is_loopback(host)


@pytest.mark.parametrize("host", ["", "10.0.0.1", "localhost.example", "node7"])
def test_other_hosts_are_neither(host: str) -> None:
    assert not is_loopback(host) and not is_wildcard(host)


@pytest.mark.parametrize(("address", "host"), [("tcp://[::]:7000", "::"), ("tcp://node7:0", "node7"), ("tcp://:1", "")])
def test_the_host_of_an_address(address: str, host: str) -> None:
    assert host_of(address) == host
