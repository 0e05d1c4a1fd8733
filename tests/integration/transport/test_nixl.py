"""The conformance suite over NIXL (UCX on loopback), where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import ClassVar

import pytest

from kvferry.testing.conformance import TransportConformance

INSTALLED = any(importlib.util.find_spec(name) for name in ("nixl", "nixl_cu12", "nixl_cu13"))

# UCX keeps threads and sockets of its own for the life of the process.
pytestmark = [
    pytest.mark.skipif(not INSTALLED, reason="nixl is not installed"),
    pytest.mark.leaks_allowed,
]


class OverUcx(TransportConformance):
    """UCX reads its variables when an agent is made: the owner's process inherits them, readers see them here."""

    transports = ("nixl",)
    ucx: ClassVar[dict[str, str]] = {}

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def environment(cls) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in ({"UCX_NET_DEVICES": "lo"} | cls.ucx).items():
                patch.setenv(name, value)
            yield


class TestNixl(OverUcx):
    """UCX chooses: across processes of one host the kernel copies, and the owner takes no part."""


class TestNixlTcp(OverUcx):
    ucx = {"UCX_TLS": "tcp"}
    one_sided = False
