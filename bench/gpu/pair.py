"""An owner process with CUDA memory that the measuring process reads through kvferry's cuda transport."""

from __future__ import annotations

import multiprocessing as mp
import os
import secrets
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import numpy as np
import torch

from kvferry.transport.base import BlockList, Link, Region, RemoteRegion, StopToken
from kvferry.transport.cuda import CudaSettings, CudaTransport
from kvferry.transport.registry import TransportContext, TransportSettings
from kvferry.types import Incarnation, new_incarnation

GIB = 1 << 30
WORD_BYTES = 4096
"""Each owner's region ends with a page for lease words, behind the data."""


def random_words(nbytes: int, seed: int, device: int) -> torch.Tensor:
    """int32 [nbytes / 4]: the same values on every device for one seed, so that a reader knows what it must get."""
    generator = torch.Generator(f"cuda:{device}").manual_seed(seed)
    return torch.randint(
        -(2**31), 2**31 - 1, (nbytes // 4,), dtype=torch.int32, device=f"cuda:{device}", generator=generator
    )


def new_transport(settings: CudaSettings | None = None) -> tuple[CudaTransport, Incarnation]:
    incarnation = new_incarnation()
    context = TransportContext(incarnation, None, TransportSettings(), lambda _: None)
    return CudaTransport(context, settings), incarnation


def region_of(tensor: torch.Tensor, region_id: int, *, writable: bool = False) -> Region:
    on_gpu = tensor.device.type == "cuda"
    return Region(
        region_id=region_id,
        address=tensor.data_ptr(),
        nbytes=tensor.nbytes,
        token=secrets.token_hex(16),
        kind="cuda" if on_gpu else "host",
        device=tensor.device.index if on_gpu else 0,
        writable=writable,
        buffer=tensor,
    )


def exported(transport: CudaTransport, region: Region) -> RemoteRegion:
    """The region as the peer learns it."""
    handle = transport.export(region)
    assert handle is not None
    return RemoteRegion(
        region_id=region.region_id,
        nbytes=region.nbytes,
        token=region.token,
        kind=region.kind,
        device=region.device,
        writable=region.writable,
        handles={"cuda": handle},
    )


def median_s(work: Callable[[], object], rounds: int = 7, warm: int = 2) -> float:
    """Wall time of `work` and all it leaves to the GPU."""
    for _ in range(warm):
        work()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def products(device: int) -> Callable[[], None]:
    """Ten 8192³ bf16 matrix products: a model at work."""
    left = torch.randn(8192, 8192, device=f"cuda:{device}", dtype=torch.bfloat16)
    right = torch.randn_like(left)

    def multiply() -> None:
        for _ in range(10):
            torch.mm(left, right)

    return multiply


def owner_main(pipe: Connection, device: int, nbytes: int, seed: int) -> None:
    """Serve one region of random words; obey commands until told to stop."""
    torch.cuda.set_device(device)
    transport, incarnation = new_transport()
    data = random_words(nbytes + WORD_BYTES, seed, device)
    region = region_of(data, 1, writable=True)
    words = data[nbytes // 4 :].view(torch.int64)
    words.zero_()
    torch.cuda.synchronize()
    pipe.send((transport.offer(), incarnation, msgspec.msgpack.encode(exported(transport, region)), os.getpid()))
    multiply: Callable[[], None] | None = None
    links: list[Link] = []
    while True:
        command, *args = pipe.recv()
        if command == "stop":
            break
        if command == "word":
            words[args[0]] = args[1]
            torch.cuda.synchronize()
            pipe.send("done")
        elif command == "withdraw":
            transport.withdraw(region)
            pipe.send("done")
        elif command == "checksum":
            pipe.send(int(data[: nbytes // 4].to(torch.int64).sum()))
        elif command == "products":
            multiply = multiply or products(device)
            pipe.send(median_s(multiply, args[0]))
        elif command == "pull":  # from the other side, while it pulls from here
            offer, theirs, encoded, block_bytes, seconds = args
            link = transport.connect(offer, peer="main", incarnation=theirs, deadline_s=5.0)
            links.append(link)
            target = region_of(torch.empty(nbytes // 4, dtype=torch.int32, device=f"cuda:{device}"), 2)
            blocks = shuffled(msgspec.msgpack.decode(encoded, type=RemoteRegion), target, nbytes, block_bytes, 5)
            pipe.send("ready")
            pipe.send(rate(link, blocks, seconds))
    for link in links:
        link.close()
    transport.close()
    pipe.send("stopped")


def shuffled(source: Any, target: Any, nbytes: int, block_bytes: int, seed: int) -> BlockList:
    """All blocks of `nbytes`, in one random order at the source and another at the target."""
    random = np.random.default_rng(seed)
    count = nbytes // block_bytes
    return BlockList(
        source, target, random.permutation(count) * block_bytes, random.permutation(count) * block_bytes, block_bytes
    )


def rate(link: Link, blocks: BlockList, seconds: float) -> float:
    """Bytes a second of repeated reads."""
    stop, moved, started = StopToken(), 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        link.read([blocks], guard=None, stop=stop, deadline_s=10.0)
        moved += blocks.total_bytes
    return moved / (time.perf_counter() - started)


class Owner:
    """The other process, from this side."""

    def __init__(self, device: int, nbytes: int, seed: int = 11) -> None:
        self.nbytes, self.seed, self.device = nbytes, seed, device
        here, there = mp.get_context("spawn").Pipe()
        self.pipe = here
        self.process = mp.get_context("spawn").Process(
            target=owner_main, args=(there, device, nbytes, seed), daemon=True
        )
        self.process.start()
        there.close()
        self.offer, self.incarnation, encoded, self.pid = self._receive(120)
        self.region = msgspec.msgpack.decode(encoded, type=RemoteRegion)

    def _receive(self, seconds: float) -> Any:
        if not self.pipe.poll(seconds):
            raise TimeoutError(f"the owner process was silent for {seconds:.0f} s")
        return self.pipe.recv()

    def ask(self, *command: Any, seconds: float = 60) -> Any:
        self.pipe.send(command)
        return self._receive(seconds)

    def connect(self, transport: CudaTransport) -> Link:
        return transport.connect(self.offer, peer="owner", incarnation=self.incarnation, deadline_s=5.0)

    def data(self, device: int) -> torch.Tensor:
        """What its region holds (without the words), int32, made anew on `device`."""
        return random_words(self.nbytes + WORD_BYTES, self.seed, device)[: self.nbytes // 4]

    def stop(self) -> None:
        if self.process.is_alive():
            self.pipe.send(("stop",))
            self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
