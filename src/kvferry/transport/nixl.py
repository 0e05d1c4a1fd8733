"""Transport over NIXL (UCX): RDMA, RoCE, EFA and GPUDirect between hosts, shared memory and TCP on one. Optional.

Needs NVIDIA's `nixl` (or `nixl-cu12`, `nixl-cu13`). One agent for each engine; its progress thread serves peers. Reads
are one-sided: the owner's beacon (beacon.py), registered with the agent, is read before and after each transfer, so
that a wrong token or memory that was taken back is refused. Environment variables choose UCX's devices and transports
(`UCX_NET_DEVICES`, `UCX_TLS`).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from kvferry.errors import LeaseExpired, PeerGone, RegistrationError, TransferUnfinished, TransportError
from kvferry.layout import Offsets
from kvferry.transport.base import BlockList, Guard, Link, Region, RemoteRegion, StopToken, Transport
from kvferry.transport.beacon import ALIVE, BEACON_BYTES, INCARNATION, NONCE, Beacon, slot_nonce, slot_offset
from kvferry.transport.copying import Limits, slices
from kvferry.transport.inproc import require_word
from kvferry.transport.memory import SharedBuffer
from kvferry.transport.registry import TransportContext
from kvferry.types import Incarnation

_PACKAGES = ("nixl", "nixl_cu12", "nixl_cu13")
_BATCH_BYTES = 256 << 20
_BATCH_BLOCKS = 8192
_WORDS = 512
_DRAIN_S = 1.0
_LINGER_S = 10.0
"""How long memory that was taken back is kept: UCX may be reading it for a peer, in this process (tcp), and would crash
it if it were gone."""

_SPINS = 300
_MEMORY = {"host": "DRAM", "cuda": "VRAM"}


def _load() -> tuple[Any, tuple[type[Exception], ...]]:
    """NIXL's Python API and its exceptions. Raises: ImportError."""
    for package in _PACKAGES:
        with contextlib.suppress(ModuleNotFoundError):
            api = importlib.import_module(f"{package}._api")
            bindings = vars(importlib.import_module(f"{package}._bindings")).values()
            return api, tuple(kind for kind in bindings if isinstance(kind, type) and issubclass(kind, Exception))
    raise ImportError("none of nixl, nixl-cu12, nixl-cu13 is installed")


class NixlTransport(Transport):
    """One agent; serves host and CUDA memory and reads that of other agents."""

    scheme: ClassVar[str] = "nixl"

    def __init__(self, context: TransportContext) -> None:
        try:
            api, self._errors = _load()
        except ImportError as error:
            raise TransportError(f"transport nixl is not installed here: {error}") from error
        self.name = f"kvferry-{context.incarnation:x}"
        self.lock = threading.Lock()
        with self.errors("this process"):
            self.agent = api.nixl_agent(self.name, api.nixl_agent_config(backends=["UCX"]))
        self._registered: dict[int, Any] = {}
        self._lingering: deque[tuple[float, Any, Any]] = deque()
        self._known: Counter[str] = Counter()
        self._links: set[NixlLink] = set()
        self._beacon = Beacon(context.incarnation)
        self._beacon_descs = self._register(self._beacon.buffer.address, BEACON_BYTES, "host", 0)
        self._words = SharedBuffer(8 * _WORDS, name="kvferry-nixl-words")
        self._words_descs = self._register(self._words.address, 8 * _WORDS, "host", 0)
        self.free_words = list(range(_WORDS))

    @contextlib.contextmanager
    def errors(self, peer: str) -> Iterator[None]:
        """NIXL's exceptions as kvferry's."""
        try:
            yield
        except self._errors as error:
            kind = PeerGone if "Disconnect" in type(error).__name__ else TransportError
            raise kind(f"nixl: {type(error).__name__}: {error}", peer=peer) from error

    def offer(self) -> Mapping[str, Any]:
        self._deregister()
        with self.lock, self.errors("this process"):
            metadata = self.agent.get_partial_agent_metadata(self._beacon_descs, True, ["UCX"])
        return {
            "agent": self.name,
            "metadata": metadata,
            "beacon": self._beacon.buffer.address,
            "nonce": self._beacon.nonce,
        }

    def export(self, region: Region) -> dict[str, Any] | None:
        self._deregister()
        descs = self._register(region.address, region.nbytes, region.kind, region.device)
        self._registered[region.region_id] = descs
        with self.lock, self.errors("this process"):
            metadata = self.agent.get_partial_agent_metadata(descs, False, ["UCX"])
        return {"address": region.address, "metadata": metadata, "slot": self._beacon.add(region)}

    def withdraw(self, region: Region) -> None:
        self._beacon.remove(region)
        descs = self._registered.pop(region.region_id, None)
        if descs is not None:
            self._lingering.append((time.monotonic() + _LINGER_S, descs, region.buffer))
        self._deregister()

    def connect(self, offer: Mapping[str, Any], *, peer: str, incarnation: Incarnation, deadline_s: float) -> Link:
        name = str(offer["agent"])
        with self.lock, self.errors(peer):
            told = self.agent.add_remote_agent(offer["metadata"])
            # Text or bytes, by the version.
            if (told.decode() if isinstance(told, bytes) else told) != name:
                raise TransportError(f"the peer's agent is called {told!r}, and it told {name!r}", peer=peer)
            self._known[name] += 1
        link = NixlLink(self, name, int(offer["beacon"]), peer)
        try:
            link.meet(int(offer["nonce"]), incarnation, deadline_s)
        except BaseException:
            link.close()
            raise
        self._links.add(link)
        return link

    def close(self) -> None:
        self._beacon.close()
        for link in list(self._links):
            link.close()
        agent = self.__dict__.pop("agent", None)
        if agent is None:
            return
        lingering = [descs for _until_s, descs, _buffer in self._lingering]
        for descs in (*self._registered.values(), *lingering, self._beacon_descs, self._words_descs):
            with contextlib.suppress(TransportError), self.errors("this process"):
                agent.deregister_memory(descs)
        self._registered.clear()
        self._lingering.clear()
        self._words.close()

    def forget(self, link: NixlLink, name: str) -> None:
        """A link to this agent was closed; with the last one the connection goes."""
        self._links.discard(link)
        with self.lock:
            self._known[name] -= 1
            if self._known[name] <= 0 and "agent" in self.__dict__:
                del self._known[name]
                # A dead peer can't be parted from in good order; nothing is held of it afterwards either way.
                with contextlib.suppress(TransportError), self.errors(name):
                    self.agent.remove_remote_agent(name)

    def _deregister(self) -> None:
        """Let go of what was taken back long enough ago."""
        with self.lock, self.errors("this process"):
            while self._lingering and self._lingering[0][0] <= time.monotonic():
                _until_s, descs, _buffer = self._lingering.popleft()
                self.agent.deregister_memory(descs)

    def word_address(self, index: int) -> int:
        return self._words.address + 8 * index

    def _register(self, address: int, nbytes: int, kind: str, device: int) -> Any:
        with self.lock, self.errors("this process"):
            return self.agent.register_memory([(address, nbytes, device, "")], _MEMORY[kind], ["UCX"])


class NixlLink(Link):
    """The way to one remote agent."""

    scheme: ClassVar[str] = "nixl"

    def __init__(self, transport: NixlTransport, name: str, beacon: int, peer: str) -> None:
        self._transport, self._name, self._beacon, self._peer = transport, name, beacon, peer
        self._loaded: set[tuple[int, str]] = set()
        self._closed = False

    def meet(self, nonce: int, incarnation: Incarnation, deadline_s: float) -> None:
        """Read the beacon. Raises: PeerGone if it is another process's."""
        limits = Limits(StopToken(), deadline_s, self._peer)
        seen = self._load_words([self._beacon + NONCE, self._beacon + INCARNATION], limits)
        if seen != [nonce, incarnation]:
            raise PeerGone("the peer was restarted since its offer was made", peer=self._peer)

    def read(self, blocks: list[BlockList], *, guard: Guard | None, stop: StopToken, deadline_s: float) -> None:
        limits = Limits(stop, deadline_s, self._peer)
        slots = self._slots([part.source for part in blocks])
        if guard is not None:
            holder = self.guard_region(guard)
            require_word(guard.offset, holder.nbytes, self._peer)
            slots |= self._slots([holder])
        self._require_registered(slots, limits)
        for piece in slices(blocks, _BATCH_BYTES, _BATCH_BLOCKS):
            self._move("READ", piece, piece.target, piece.source, limits)
        # One call after all data: the word, and once more whether the memory was still registered.
        last = [] if guard is None else [_address(self.guard_region(guard)) + guard.offset]
        words = self._require_registered(slots, limits, last)
        if guard is not None and words != [guard.word]:
            raise LeaseExpired("the lease's word changed while its blocks were read: recompute", peer=self._peer)

    def write(self, blocks: list[BlockList], *, stop: StopToken, deadline_s: float) -> None:
        limits = Limits(stop, deadline_s, self._peer)
        slots = self._slots([part.target for part in blocks])
        self._require_registered(slots, limits)
        for piece in slices(blocks, _BATCH_BYTES, _BATCH_BLOCKS):
            self._move("WRITE", piece, piece.source, piece.target, limits)
        self._require_registered(slots, limits)

    def load_word(self, region: RemoteRegion, offset: int, *, deadline_s: float) -> int:
        require_word(offset, region.nbytes, self._peer)
        slots, limits = self._slots([region]), Limits(StopToken(), deadline_s, self._peer)
        self._require_registered(slots, limits)
        return self._require_registered(slots, limits, [_address(region) + offset])[0]

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._transport.forget(self, self._name)

    def _slots(self, regions: list[Any]) -> dict[int, int]:
        """Address of each region's slot and what it must hold; loads what the agent must know of the region."""
        slots = {}
        for remote in regions:
            assert isinstance(remote, RemoteRegion)
            handle = remote.handles.get("nixl")
            if handle is None:
                raise RegistrationError(f"region {remote.region_id} is not offered over nixl", peer=self._peer)
            key = (remote.region_id, remote.token)
            if key not in self._loaded:
                with self._transport.lock, self._transport.errors(self._peer):
                    self._require_open()
                    self._transport.agent.add_remote_agent(handle["metadata"])
                self._loaded.add(key)
            slots[self._beacon + slot_offset(int(handle["slot"]))] = slot_nonce(remote.token)
        return slots

    def _require_registered(self, slots: dict[int, int], limits: Limits, further: list[int] | None = None) -> list[int]:
        """Words at the `further` addresses, loaded together with the slots. Raises: RegistrationError, PeerGone."""
        alive, *seen = self._load_words([self._beacon + ALIVE, *slots, *(further or [])], limits)
        if alive != 1:
            raise PeerGone("the peer closed its engine", peer=self._peer)
        if seen[: len(slots)] != list(slots.values()):
            raise RegistrationError(
                "a region is not registered there under this token: it was unregistered, or the token is wrong; use "
                "the peer's current regions",
                peer=self._peer,
            )
        return seen[len(slots) :]

    def _load_words(self, addresses: list[int], limits: Limits) -> list[int]:
        transport = self._transport
        with transport.lock:
            if len(transport.free_words) < len(addresses):
                raise TransportError("too many transfers at once load words; run fewer", peer=self._peer)
            places = [transport.free_words.pop() for _ in addresses]
        try:
            local = np.array([[transport.word_address(place), 8, 0] for place in places], dtype=np.uint64)
            remote = np.array([[address, 8, 0] for address in addresses], dtype=np.uint64)
            self._run("READ", local, "host", remote, "host", limits)
            return [int(np.asarray(transport._words)[8 * p : 8 * p + 8].view(np.int64)[0]) for p in places]
        except TransferUnfinished:
            # Words may still land there, and would be taken for another transfer's: these places are lost.
            places = []
            raise
        finally:
            with transport.lock:
                transport.free_words += places

    def _move(self, operation: str, piece: BlockList, local: Any, remote: Any, limits: Limits) -> None:
        assert isinstance(local, Region) and isinstance(remote, RemoteRegion)
        here, there = piece.target_offsets, piece.source_offsets
        if operation == "WRITE":
            here, there = there, here
        ours = _rows(here, local.address, piece.nbytes, local.device)
        theirs = _rows(there, _address(remote), piece.nbytes, remote.device)
        self._run(operation, ours, local.kind, theirs, remote.kind, limits)

    def _run(self, operation: str, local: Any, local_kind: str, remote: Any, remote_kind: str, limits: Limits) -> None:
        """Start a transfer and wait for it. Raises: what `limits` raises, once nothing can land any more."""
        transport = self._transport
        limits.check()
        with transport.lock, transport.errors(self._peer):
            self._require_open()
            agent = transport.agent
            ours = agent.get_xfer_descs(local, _MEMORY[local_kind])
            theirs = agent.get_xfer_descs(remote, _MEMORY[remote_kind])
            handle = agent.initialize_xfer(operation, ours, theirs, self._name, b"", ["UCX"])
            state = agent.transfer(handle)
        try:
            spins = 0
            while state == "PROC":
                limits.check()
                spins += 1
                # Busy at first, for small transfers; then give the core to whoever moves the bytes.
                time.sleep(0.0001) if spins > _SPINS else os.sched_yield()
                self._require_open()
                state = self._state(handle)
        except BaseException as error:
            until_s = time.monotonic() + _DRAIN_S
            while not self._is_over(handle):
                if time.monotonic() > until_s:
                    # Neither releasing the handle nor parting from the peer stops UCX: the caller has to wait.
                    raise TransferUnfinished(
                        f"a nixl transfer that was given up is still pending after {_DRAIN_S} s: its target blocks may "
                        "still be written; keep them aside until it has ended, or this engine is closed",
                        is_over=lambda: self._is_over(handle),
                        peer=self._peer,
                    ) from error
                time.sleep(0.001)
            self._release(handle)
            raise
        self._release(handle)
        if state != "DONE":
            raise PeerGone(f"nixl's transfer ended as {state}: the peer is dead or cut off", peer=self._peer)

    def _state(self, handle: Any) -> str:
        transport = self._transport
        with transport.lock, transport.errors(self._peer):
            agent = transport.__dict__.get("agent")
            return "CLOSED" if agent is None else str(agent.check_xfer_state(handle))

    def _is_over(self, handle: Any) -> bool:
        """Whether a transfer that was given up can write nothing more (T4): it ended, failed, or its agent is gone."""
        try:
            return self._state(handle) != "PROC"
        except TransportError:
            return True

    def _release(self, handle: Any) -> None:
        with contextlib.suppress(TransportError), self._transport.errors(self._peer):
            handle.release()

    def _require_open(self) -> None:
        if self._closed or "agent" not in self._transport.__dict__:
            raise PeerGone("the link to the peer was closed", peer=self._peer)


def _rows(offsets: Offsets, base: int, nbytes: int, device: int) -> Any:
    rows = np.empty((len(offsets), 3), dtype=np.uint64)
    rows[:, 0], rows[:, 1], rows[:, 2] = offsets + base, nbytes, device
    return rows


def _address(remote: RemoteRegion) -> int:
    return int(remote.handles["nixl"]["address"])
