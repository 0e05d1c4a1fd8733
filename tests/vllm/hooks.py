"""Runs inside vLLM's workers, loaded through the setting `on_loaded`; harm is done while a flag file is there."""

import ctypes
import os
import time
from pathlib import Path

import msgspec

from kvferry.errors import HandoffAborted
from kvferry.transport.registry import register_transport
from kvferry.transport.shm import ShmLink, ShmTransport


def zero_on_flag(kv_caches, block_ids):
    """Zero the KV that was received."""
    if _flag("zero"):
        for tensor in kv_caches.values():
            tensor[block_ids] = 0


class CorruptingLink(ShmLink):
    """Flips one bit of what it read, or does not come back from a read."""

    scheme = "corrupting"

    def read(self, blocks, *, guard, stop, deadline_s):
        whole = [b._replace(source=_as_shm(b.source)) for b in blocks]
        super().read(whole, guard=guard, stop=stop, deadline_s=deadline_s)
        if _flag("corrupt"):
            address = blocks[0].target.address + int(blocks[0].target_offsets[0]) + 77
            ctypes.c_ubyte.from_address(address).value ^= 0x10
        if _flag("hold"):
            _path("reading").touch()
            while _flag("hold"):
                if stop.is_set():
                    raise HandoffAborted("stopped")
                time.sleep(0.01)

    def load_word(self, region, offset, *, deadline_s):
        return super().load_word(_as_shm(region), offset, deadline_s=deadline_s)


class CorruptingTransport(ShmTransport):
    """Shared memory that lies."""

    scheme = "corrupting"

    def connect(self, offer, *, peer, incarnation, deadline_s):
        return CorruptingLink(offer, peer=peer, incarnation=incarnation)


def _as_shm(region):
    return msgspec.structs.replace(region, handles={"shm": region.handles["corrupting"]})


def _path(name):
    return Path(os.environ["KVFERRY_TEST_FLAGS"]) / name


def _flag(name):
    return _path(name).exists()


register_transport("corrupting", "hooks:CorruptingTransport", reach="host")
