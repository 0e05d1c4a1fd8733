"""The systems: each has an owner's half and a reader's half, which run in processes of their own (`worker.py`)."""

from __future__ import annotations

import abc
import asyncio
import ctypes
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from kvferry.transfer.bench.cases import Bytes, Case, Plan, fill
from kvferry.transfer.engine import TransferEngine
from kvferry.transport.base import BlockList, Region

Read = Callable[[], None]


class Owner(abc.ABC):
    """Holds the source memory."""

    @abc.abstractmethod
    def hello(self) -> dict[str, Any]:
        """What the reader must know; JSON."""

    def meet(self, message: dict[str, Any]) -> None:  # noqa: B027  (most systems need no second meeting)
        """Take what the reader answered, where the system needs both sides to know each other."""

    @abc.abstractmethod
    def close(self) -> None: ...


class Reader(abc.ABC):
    """Holds the target memory, `memory`, and reads into it."""

    memory: Bytes

    def answer(self) -> dict[str, Any] | None:
        """What the owner must know before the first read; JSON."""
        return None

    @abc.abstractmethod
    def prepare(self, plan: Plan) -> Read:
        """A function that moves the case's blocks once; of a latency case, the next single block."""

    @abc.abstractmethod
    def close(self) -> None: ...


def each(plan: Plan, one: Callable[[int], None]) -> Read:
    """For a latency case: a function that moves the next block, in turn."""
    state = {"next": 0}
    count = len(plan.source)

    def call() -> None:
        one(state["next"] % count)
        state["next"] += 1

    return call


class System(abc.ABC):
    """One system under test. `ceiling` names the one that it is compared with."""

    name: ClassVar[str]
    ceiling: ClassVar[str]

    @classmethod
    def why_not(cls) -> str | None:
        """Why it can't run here; None where it can."""
        return None

    @classmethod
    @abc.abstractmethod
    def owner(cls, nbytes: int) -> Owner: ...

    @classmethod
    @abc.abstractmethod
    def reader(cls, nbytes: int, hello: dict[str, Any]) -> Reader: ...


# memcpy --------------------------------------------------------------------------------------------------------------


class _Memcpy(Owner, Reader):
    """One process, one thread, one contiguous copy."""

    def __init__(self, nbytes: int) -> None:
        self._source = np.empty(nbytes, dtype=np.uint8)
        self.memory = np.zeros(nbytes, dtype=np.uint8)
        fill(self._source)

    def hello(self) -> dict[str, Any]:
        return {}

    def prepare(self, plan: Plan) -> Read:
        source, target = self._source.ctypes.data, self.memory.ctypes.data
        if plan.case.is_latency:
            pairs = list(zip((plan.target + target).tolist(), (plan.source + source).tolist(), strict=True))
            size = plan.case.block_bytes
            return each(plan, lambda i: _memmove(*pairs[i], size))
        return lambda: _memmove(target, source, plan.case.total_bytes)

    def close(self) -> None:
        return


def _memmove(target: int, source: int, nbytes: int) -> None:
    ctypes.memmove(target, source, nbytes)


class _Nothing(Owner):
    def hello(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        return


class Memcpy(System):
    name, ceiling = "memcpy", "memcpy"

    @classmethod
    def owner(cls, nbytes: int) -> Owner:
        return _Nothing()

    @classmethod
    def reader(cls, nbytes: int, hello: dict[str, Any]) -> Reader:
        return _Memcpy(nbytes)


# kvferry -------------------------------------------------------------------------------------------------------------


class _Loop:
    """An event loop on a thread, for the engine's connections."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)


async def _started(transports: tuple[str, ...]) -> TransferEngine:
    engine = TransferEngine(transports=transports)
    await engine.start()
    return engine


class _KvferryOwner(Owner):
    def __init__(self, nbytes: int, transports: tuple[str, ...]) -> None:
        self._loop = _Loop()
        self._engine: TransferEngine = self._loop.run(_started(transports))
        # What peers shall map must be shared memory; elsewhere plain memory, as in the other systems here.
        shared = transports == ("shm",)
        self._region = self._engine.allocate(nbytes) if shared else self._engine.register(np.zeros(nbytes, np.uint8))
        fill(self._region.buffer)

    def hello(self) -> dict[str, Any]:
        return {"address": self._engine.address, "region": self._region.region_id}

    def close(self) -> None:
        self._loop.run(self._engine.close())


class _KvferryReader(Reader):
    """Calls the synchronous facade, as an engine's thread does."""

    def __init__(self, nbytes: int, hello: dict[str, Any], transports: tuple[str, ...]) -> None:
        self._loop = _Loop()
        self._engine: TransferEngine = self._loop.run(_started(transports))
        self._peer = self._loop.run(self._engine.connect(hello["address"], deadline_s=20.0))
        self._source = self._peer.regions[hello["region"]]
        self._target: Region = self._engine.register(np.zeros(nbytes, np.uint8))
        self.memory = self._target.buffer
        self.memory[:] = 0

    def prepare(self, plan: Plan) -> Read:
        engine, peer = self._engine, self._peer

        def blocks(source: Any, target: Any) -> BlockList:
            return BlockList(self._source, self._target, source, target, plan.case.block_bytes)

        if plan.case.is_latency:
            singles = [blocks(plan.source[i : i + 1], plan.target[i : i + 1]) for i in range(len(plan.source))]

            def one(index: int) -> None:
                engine.read_sync(peer, singles[index], deadline_s=5.0)

            return each(plan, one)
        whole = blocks(plan.source, plan.target)

        def all_blocks() -> None:
            engine.read_sync(peer, whole, deadline_s=60.0)

        return all_blocks

    def close(self) -> None:
        self._loop.run(self._engine.close())


class _Kvferry(System):
    transports: ClassVar[tuple[str, ...]]

    @classmethod
    def owner(cls, nbytes: int) -> Owner:
        return _KvferryOwner(nbytes, cls.transports)

    @classmethod
    def reader(cls, nbytes: int, hello: dict[str, Any]) -> Reader:
        return _KvferryReader(nbytes, hello, cls.transports)


class KvferryShm(_Kvferry):
    name, ceiling, transports = "kvferry-shm", "memcpy", ("shm",)


class KvferryTcp(_Kvferry):
    name, ceiling, transports = "kvferry-tcp", "socket", ("tcp",)


class KvferryNixl(_Kvferry):
    name, ceiling, transports = "kvferry-nixl", "memcpy", ("nixl",)

    @classmethod
    def why_not(cls) -> str | None:
        if importlib.util.find_spec("kvferry.transport.nixl") is None:
            return "the nixl transport is not part of this version"
        return _missing("nixl_cu12", "nixl", "nixl_cu13")


class KvferryCuda(_Kvferry):
    name, ceiling, transports = "kvferry-cuda", "memcpy", ("cuda",)

    @classmethod
    def why_not(cls) -> str | None:
        return "measured on GPUs by bench/gpu/transfer.py"


# Others --------------------------------------------------------------------------------------------------------------


def _missing(*modules: str) -> str | None:
    if any(importlib.util.find_spec(module) for module in modules):
        return None
    return f"{modules[0]} is not installed (make bench-peers installs it)"


class _MooncakeOwner(Owner):
    def __init__(self, nbytes: int) -> None:
        self._memory = np.zeros(nbytes, dtype=np.uint8)
        fill(self._memory)
        self._engine = _mooncake(self._memory)

    def hello(self) -> dict[str, Any]:
        return {"segment": f"127.0.0.1:{self._engine.get_rpc_port()}", "address": self._memory.ctypes.data}

    def close(self) -> None:
        os._exit(0)  # Its threads do not end by themselves.


class _MooncakeReader(Reader):
    """Batches of 1,024: more are refused with rc -1 by default."""

    def __init__(self, nbytes: int, hello: dict[str, Any]) -> None:
        self.memory = np.zeros(nbytes, dtype=np.uint8)
        self._engine = _mooncake(self.memory)
        self._segment, self._address = hello["segment"], hello["address"]

    def prepare(self, plan: Plan) -> Read:
        local = (plan.target + self.memory.ctypes.data).tolist()
        remote = (plan.source + self._address).tolist()
        sizes = [plan.case.block_bytes] * 1024

        def batch(first: int, count: int) -> None:
            here, there = local[first : first + count], remote[first : first + count]
            if self._engine.batch_transfer_sync_read(self._segment, here, there, sizes[: len(here)]):
                raise RuntimeError("mooncake's read failed")

        if plan.case.is_latency:
            return each(plan, lambda index: batch(index, 1))

        def all_blocks() -> None:
            for first in range(0, len(local), 1024):
                batch(first, 1024)

        return all_blocks

    def close(self) -> None:
        return


def _mooncake(memory: Bytes) -> Any:
    os.environ |= {"MC_FORCE_TCP": "1", "MC_TCP_BIND_ADDRESS": "127.0.0.1", "MC_LOG_LEVEL": "ERROR"}
    from mooncake.engine import TransferEngine as MooncakeEngine

    engine = MooncakeEngine()
    if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""):
        raise RuntimeError("mooncake did not initialize")
    if engine.register_memory(memory.ctypes.data, memory.nbytes):
        raise RuntimeError("mooncake did not register the memory")
    return engine


class MooncakeTcp(System):
    name, ceiling = "mooncake-tcp", "socket"

    @classmethod
    def why_not(cls) -> str | None:
        return _missing("mooncake")

    @classmethod
    def owner(cls, nbytes: int) -> Owner:
        return _MooncakeOwner(nbytes)

    @classmethod
    def reader(cls, nbytes: int, hello: dict[str, Any]) -> Reader:
        return _MooncakeReader(nbytes, hello)


class _NixlOwner(Owner):
    def __init__(self, nbytes: int) -> None:
        self._memory = np.zeros(nbytes, dtype=np.uint8)
        fill(self._memory)
        self._agent = _nixl("owner", self._memory)

    def hello(self) -> dict[str, Any]:
        return {"address": self._memory.ctypes.data, "metadata": self._agent.get_agent_metadata().hex()}

    def meet(self, message: dict[str, Any]) -> None:
        self._agent.add_remote_agent(bytes.fromhex(message["metadata"]))

    def close(self) -> None:
        os._exit(0)  # UCX complains at an orderly end where the other side has gone.


class _NixlReader(Reader):
    """Descriptor lists prepared once, as vLLM's connector does; yields while it waits."""

    def __init__(self, nbytes: int, hello: dict[str, Any]) -> None:
        self.memory = np.zeros(nbytes, dtype=np.uint8)
        self._agent = _nixl("reader", self.memory)
        self._address = hello["address"]
        self._peer = self._agent.add_remote_agent(bytes.fromhex(hello["metadata"]))

    def answer(self) -> dict[str, Any] | None:
        return {"metadata": self._agent.get_agent_metadata().hex()}

    def prepare(self, plan: Plan) -> Read:
        agent = self._agent
        ours = agent.prep_xfer_dlist(
            "NIXL_INIT_AGENT", self._descriptors(plan.target, self.memory.ctypes.data, plan.case)
        )
        theirs = agent.prep_xfer_dlist(self._peer, self._descriptors(plan.source, self._address, plan.case))

        def move(index: Any) -> None:
            handle = agent.make_prepped_xfer("READ", ours, index, theirs, index, b"")
            state = agent.transfer(handle)
            while state == "PROC":
                os.sched_yield()
                state = agent.check_xfer_state(handle)
            agent.release_xfer_handle(handle)
            if state != "DONE":
                raise RuntimeError(f"nixl's read ended as {state}")

        every = np.arange(len(plan.source), dtype=np.int32)
        if plan.case.is_latency:
            return each(plan, lambda index: move(every[index : index + 1]))
        return lambda: move(every)

    def _descriptors(self, offsets: Any, base: int, case: Case) -> Any:
        rows = np.zeros((len(offsets), 3), dtype=np.uint64)
        rows[:, 0], rows[:, 1] = offsets + base, case.block_bytes
        return self._agent.get_xfer_descs(rows, "DRAM")

    def close(self) -> None:
        return


def _nixl(name: str, memory: Bytes) -> Any:
    os.environ.setdefault("UCX_NET_DEVICES", "lo")
    package = "nixl_cu12" if importlib.util.find_spec("nixl_cu12") else "nixl"
    api = importlib.import_module(f"{package}._api")
    agent = api.nixl_agent(f"{name}-{os.getpid()}", api.nixl_agent_config(backends=["UCX"]))
    agent.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], "DRAM")
    return agent


class NixlDefault(System):
    """UCX chooses: copies across processes (CMA) here."""

    name, ceiling = "nixl-default", "memcpy"

    @classmethod
    def why_not(cls) -> str | None:
        return _missing("nixl_cu12", "nixl")

    @classmethod
    def owner(cls, nbytes: int) -> Owner:
        return _NixlOwner(nbytes)

    @classmethod
    def reader(cls, nbytes: int, hello: dict[str, Any]) -> Reader:
        return _NixlReader(nbytes, hello)


class NixlTcp(NixlDefault):
    name, ceiling = "nixl-tcp", "socket"

    @classmethod
    def owner(cls, nbytes: int) -> Owner:
        os.environ["UCX_TLS"] = "tcp"
        return _NixlOwner(nbytes)

    @classmethod
    def reader(cls, nbytes: int, hello: dict[str, Any]) -> Reader:
        os.environ["UCX_TLS"] = "tcp"
        return _NixlReader(nbytes, hello)
