"""Transport inside one process: a copy from one engine's region to another's, for tests and single-process clusters."""

from __future__ import annotations

import os
import secrets
import threading
import weakref
from collections.abc import Mapping
from typing import Any, ClassVar

from kvferry.errors import LeaseExpired, PeerGone, RegistrationError, TransportError
from kvferry.transport.base import BlockList, Guard, Link, Region, RemoteRegion, StopToken, Transport
from kvferry.transport.copying import Limits, copy_list, load_word
from kvferry.transport.registry import TransportContext
from kvferry.types import Incarnation

_owners: weakref.WeakValueDictionary[str, InprocTransport] = weakref.WeakValueDictionary()


class InprocTransport(Transport):
    """Serves the regions of one engine to the other engines of this process."""

    scheme: ClassVar[str] = "inproc"

    def __init__(self, context: TransportContext) -> None:
        self.incarnation = context.incarnation
        self._find_region = context.find_region
        self._nonce = secrets.token_hex(16)
        self._changed = threading.Condition()
        self._readers: dict[int, int] = {}
        self.closed = False
        _owners[self._nonce] = self

    def offer(self) -> Mapping[str, Any]:
        return {"pid": os.getpid(), "nonce": self._nonce}

    def export(self, region: Region) -> dict[str, Any] | None:
        return {} if region.kind == "host" else None

    def withdraw(self, region: Region) -> None:
        with self._changed:
            self._changed.wait_for(lambda: region.region_id not in self._readers)

    def connect(self, offer: Mapping[str, Any], *, peer: str, incarnation: Incarnation, deadline_s: float) -> Link:
        owner = _owners.get(str(offer.get("nonce")))
        if owner is None or owner.closed or offer.get("pid") != os.getpid():
            raise TransportError(f"the peer is another process ({offer.get('pid')})", peer=peer)
        if owner.incarnation != incarnation:
            raise PeerGone("the peer was restarted since its offer was made", peer=peer)
        return InprocLink(owner, peer)

    def close(self) -> None:
        self.closed = True
        _owners.pop(self._nonce, None)
        with self._changed:
            self._changed.wait_for(lambda: not self._readers)

    def borrow(self, remote: RemoteRegion, *, writing: bool, peer: str) -> Region:
        """The live region behind `remote`, kept until `give_back`.

        Raises: PeerGone, RegistrationError.
        """
        with self._changed:
            if self.closed:
                raise PeerGone("the peer closed its engine", peer=peer)
            region = self._find_region(remote.region_id)
            if region is None or region.token != remote.token:
                raise RegistrationError(
                    f"region {remote.region_id} is not registered there under this token: it was unregistered, or the "
                    "token is wrong; use the peer's current regions",
                    peer=peer,
                )
            if writing and not region.writable:
                raise RegistrationError(f"region {remote.region_id} was not lent out for writing", peer=peer)
            self._readers[region.region_id] = self._readers.get(region.region_id, 0) + 1
            return region

    def give_back(self, region: Region) -> None:
        """End of a `borrow`."""
        with self._changed:
            self._readers[region.region_id] -= 1
            if not self._readers[region.region_id]:
                del self._readers[region.region_id]
            self._changed.notify_all()


class InprocLink(Link):
    scheme: ClassVar[str] = "inproc"

    def __init__(self, owner: InprocTransport, peer: str) -> None:
        self._owner: InprocTransport | None = owner
        self._peer = peer

    def read(self, blocks: list[BlockList], *, guard: Guard | None, stop: StopToken, deadline_s: float) -> None:
        self._copy(blocks, stop, deadline_s, writing=False)
        if guard is not None:
            word = self.load_word(self.guard_region(guard), guard.offset, deadline_s=deadline_s)
            if word != guard.word:
                raise LeaseExpired("the lease's word changed while its blocks were read: recompute", peer=self._peer)

    def write(self, blocks: list[BlockList], *, stop: StopToken, deadline_s: float) -> None:
        self._copy(blocks, stop, deadline_s, writing=True)

    def load_word(self, region: RemoteRegion, offset: int, *, deadline_s: float) -> int:
        owner = self._live_owner()
        live = owner.borrow(region, writing=False, peer=self._peer)
        try:
            require_word(offset, live.nbytes, self._peer)
            return load_word(live.address + offset)
        finally:
            owner.give_back(live)

    def close(self) -> None:
        self._owner = None

    def _copy(self, blocks: list[BlockList], stop: StopToken, deadline_s: float, *, writing: bool) -> None:
        owner, limits = self._live_owner(), Limits(stop, deadline_s, self._peer)
        remotes = [part.target if writing else part.source for part in blocks]
        borrowed: list[Region] = []
        try:
            for remote in remotes:
                assert isinstance(remote, RemoteRegion)
                borrowed.append(owner.borrow(remote, writing=writing, peer=self._peer))
            total = sum(part.total_bytes for part in blocks)
            for part, live in zip(blocks, borrowed, strict=True):
                local = part.source if writing else part.target
                assert isinstance(local, Region)
                source, target = (local, live) if writing else (live, local)
                copy_list(part, target.address, source.address, limits, total)
        finally:
            for live in borrowed:
                owner.give_back(live)

    def _live_owner(self) -> InprocTransport:
        owner = self._owner
        if owner is None or owner.closed:
            raise PeerGone("the peer closed its engine, or this link was closed", peer=self._peer)
        return owner


def require_word(offset: int, nbytes: int, peer: str) -> None:
    """Raises: RegistrationError unless 8 aligned bytes at `offset` lie in a region of `nbytes`."""
    if offset < 0 or offset % 8 or offset + 8 > nbytes:
        raise RegistrationError(f"a word needs 8 aligned bytes; offset {offset} of {nbytes} has none", peer=peer)
