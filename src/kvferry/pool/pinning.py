"""Pinning the arena for the GPUs of this host, where there are any."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from kvferry.errors import KVError
from kvferry.observe import get_log
from kvferry.transport.base import Region

CUDA_RUNTIME = "kvferry.transport.cuda_runtime"
_log = get_log(__name__)


def pin_for_cuda(region: Region) -> Callable[[], None]:
    """Pin memory for CUDA in this process; returns what undoes it. Does nothing on a host without a GPU.

    A GPU that does not take it costs speed only, so that is told and no error.
    """
    try:
        runtime: Any = import_module(CUDA_RUNTIME)
        runtime.device_uuids()
    except (ImportError, KVError):
        return _nothing
    try:
        if not runtime.pin(region.address, region.nbytes):
            return _nothing
    except KVError as error:
        _log.warning("the arena is not pinned; copies to and from GPUs are slower", cause=error.cause, error=str(error))
        return _nothing
    _log.info("the arena is pinned for CUDA", nbytes=region.nbytes)
    address = region.address
    return lambda: runtime.unpin(address)


def _nothing() -> None:
    pass
