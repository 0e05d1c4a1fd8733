"""The arena is pinned where there is a GPU, left alone where there is none, and no GPU that refuses ends the node."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from kvferry.errors import RegistrationError, TransportError
from kvferry.pool.pinning import CUDA_RUNTIME, pin_for_cuda
from kvferry.transport.base import Region

REGION = Region(1, 0x1000, 4096, "0" * 32)


def pretend(monkeypatch: pytest.MonkeyPatch, **calls: Any) -> list[Any]:
    asked: list[Any] = []
    runtime = ModuleType(CUDA_RUNTIME)

    def pin(address: int, nbytes: int) -> bool:
        asked.append(("pin", address, nbytes))
        return True

    vars(runtime).update({"device_uuids": lambda: ["0"], "pin": pin, "unpin": lambda at: asked.append(("unpin", at))})
    vars(runtime).update(calls)
    monkeypatch.setitem(sys.modules, CUDA_RUNTIME, runtime)
    return asked


def fail(error: Exception) -> Any:
    def call(*_: object) -> None:
        raise error

    return call


def test_pinned_with_a_gpu_and_unpinned_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pretend(monkeypatch)
    unpin = pin_for_cuda(REGION)
    assert asked == [("pin", 0x1000, 4096)]
    unpin()
    assert asked == [("pin", 0x1000, 4096), ("unpin", 0x1000)]


def test_left_alone_without_a_gpu_or_a_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pretend(monkeypatch, device_uuids=fail(TransportError("no CUDA device")))
    pin_for_cuda(REGION)()
    monkeypatch.setitem(sys.modules, CUDA_RUNTIME, None)
    pin_for_cuda(REGION)()
    assert asked == []


def test_memory_that_cannot_be_pinned_costs_speed_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = pretend(monkeypatch, pin=fail(RegistrationError("4096 bytes of host memory cannot be pinned: no")))
    pin_for_cuda(REGION)()
    assert asked == []
    assert "not pinned" in caplog.text
    asked = pretend(monkeypatch, pin=lambda *_: False)
    pin_for_cuda(REGION)()
    assert asked == []
