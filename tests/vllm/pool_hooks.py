"""Runs inside vLLM's workers, loaded through the setting `on_loaded`: what was loaded can be zeroed, a load held up."""

import time

from hooks import _flag, _path, zero_on_flag

from kvferry.errors import HandoffAborted
from kvferry.transport.shm import ShmLink

__all__ = ["zero_on_flag"]

_read = ShmLink.read


def _read_and_hold(self, blocks, *, guard, stop, deadline_s):
    _read(self, blocks, guard=guard, stop=stop, deadline_s=deadline_s)
    if _flag("hold"):
        _path("reading").touch()
        while _flag("hold"):
            if stop.is_set():
                raise HandoffAborted("stopped")
            time.sleep(0.01)


ShmLink.read = _read_and_hold
