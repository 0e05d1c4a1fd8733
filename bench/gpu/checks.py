"""Whether the cuda transport is right: every byte of every target compared, errors as promised, nothing left behind."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pair
import torch

from kvferry.errors import HandoffAborted, KVError, LeaseExpired, PeerGone, RegistrationError, TransferTimeout
from kvferry.transport.base import BlockList, Guard, RemoteRegion, StopToken

MIB = 1 << 20


def encoded(region: RemoteRegion) -> bytes:
    return msgspec.msgpack.encode(region)


def stopped() -> StopToken:
    token = StopToken()
    token.set()
    return token


def fails_with(kind: type[KVError], work: Callable[[], object]) -> bool:
    try:
        work()
    except kind:
        return True
    except KVError as error:
        print(f"wanted {kind.__name__}, saw {error!r}", flush=True)
    return False


def whole_target(bench: Any, blocks: BlockList, source: torch.Tensor, move: Callable[[], None]) -> bool:
    """Run `move`; compare all bytes of the reader's first 64 MiB with what they must be, the untouched ones too."""
    span = 64 * MIB
    target = bench.buffer.view(torch.uint8)[:span]
    target.random_(0, 256)
    before = target.cpu().numpy().copy()
    bytes_ = source.view(torch.uint8)[:span].cpu().numpy()
    for s, t in zip(blocks.source_offsets.tolist(), blocks.target_offsets.tolist(), strict=True):
        before[t : t + blocks.nbytes] = bytes_[s : s + blocks.nbytes]
    move()
    return bool(np.array_equal(target.cpu().numpy(), before))


def scattered(bench: Any, count: int, nbytes: int, stride: int, skew: tuple[int, int], seed: int) -> BlockList:
    random = np.random.default_rng(seed)
    slots = (64 * MIB - 64) // stride
    return BlockList(
        bench.owner.region,
        bench.region,
        random.permutation(slots)[:count] * stride + skew[0],
        random.permutation(slots)[:count] * stride + skew[1],
        nbytes,
    )


def run(bench: Any) -> None:
    """Sizes, strides, alignments; guard, tokens, stop, deadline; write."""
    cases = [
        (1, 16, 16, (0, 0)),
        (1, 1, 64, (3, 5)),
        (300, 8, 64, (0, 0)),
        (4000, 48, 64, (16, 0)),
        (999, 1000, 1024, (0, 0)),
        (77, 1000, 1024, (1, 0)),
        (500, 1152, 1280, (0, 128)),
        (1000, 4096, 8192, (0, 4096)),
        (333, 5003, 8192, (0, 0)),
        (200, 16384, 16384, (0, 0)),
        (100, 65536, 131072, (0, 65536)),
        (31, 65537, 131072, (7, 9)),
        (3, 5 * MIB + 20, 6 * MIB, (0, 0)),
    ]
    for index, (count, nbytes, stride, skew) in enumerate(cases):
        blocks = scattered(bench, count, nbytes, stride, skew, index)
        good = whole_target(bench, blocks, bench.truth, lambda blocks=blocks: bench.read([blocks]))
        name = f"{count} x {nbytes} B every {stride}, from +{skew[0]} to +{skew[1]}"
        bench.report.add(f"{bench.where} correct", name, verified=good)
    errors(bench)
    owner_sum = bench.owner.ask("checksum")
    bench.report.add(
        f"{bench.where} correct",
        "the source is untouched",
        verified=owner_sum == int(bench.truth.to(torch.int64).sum()),
    )
    written(bench)


def errors(bench: Any) -> None:
    blocks, link = bench.blocks(64, 8 * MIB), bench.link

    def read(
        guard: Guard | None = None, stop: StopToken | None = None, deadline_s: float = 5.0, of: Any = blocks
    ) -> None:
        link.read([of], guard=guard, stop=stop or StopToken(), deadline_s=deadline_s)

    bench.owner.ask("word", 0, 4242)
    right, wrong = Guard(1, bench.owner.nbytes, 4242), Guard(1, bench.owner.nbytes, 4243)
    lied = msgspec.structs.replace(bench.owner.region, token="0" * 32)
    results = {
        "guard matches": read(guard=right) is None,
        "load_word": link.load_word(bench.owner.region, bench.owner.nbytes, deadline_s=1.0) == 4242,
        "guard differs": fails_with(LeaseExpired, lambda: read(guard=wrong)),
        "wrong token": fails_with(RegistrationError, lambda: read(of=blocks._replace(source=lied))),
        "stop": fails_with(HandoffAborted, lambda: read(stop=stopped())),
        "deadline": fails_with(TransferTimeout, lambda: read(deadline_s=-1.0)),
        "reads after errors": read() is None,
    }
    for name, good in results.items():
        bench.report.add(f"{bench.where} errors", name, verified=good)


def written(bench: Any) -> None:
    """Write into the owner's region what it holds already, shifted by nothing: its checksum must stay."""
    bench.buffer.copy_(bench.truth)
    torch.cuda.synchronize()
    offsets = np.random.default_rng(8).permutation(1024) * 65536
    blocks = BlockList(bench.region, bench.owner.region, offsets, offsets, 65536)
    bench.link.write([blocks], stop=StopToken(), deadline_s=5.0)
    before = bench.owner.ask("checksum")
    bench.buffer[0] += 1
    torch.cuda.synchronize()
    bench.link.write([blocks], stop=StopToken(), deadline_s=5.0)
    after = bench.owner.ask("checksum")
    bench.buffer[0] -= 1
    torch.cuda.synchronize()
    bench.link.write([blocks], stop=StopToken(), deadline_s=5.0)
    changed = after != before
    bench.report.add(f"{bench.where} correct", "write", verified=changed and bench.owner.ask("checksum") == before)


class Relay:
    """A report in another process."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def add(self, section: str, case: str, **values: Any) -> None:
        self._pipe.send((section, case, values))


def _faults(pipe: Connection, source: int, device: int) -> None:
    faults(Relay(pipe), source, device)


def faults_apart(report: Any, source: int, device: int, seconds: float = 60) -> None:
    """`faults` in a process of its own: should a kernel fail when its peer dies, only that process is lost."""
    here, there = mp.get_context("spawn").Pipe(duplex=False)
    process = mp.get_context("spawn").Process(target=_faults, args=(there, source, device))
    process.start()
    there.close()
    until = time.monotonic() + seconds
    try:
        while here.poll(max(0.0, until - time.monotonic())):
            section, case, values = here.recv()
            report.add(section, case, **values)
    except EOFError:
        process.join(5)
    if process.is_alive():
        process.kill()
        report.add("faults", "ended", error=f"still running after {seconds:.0f} s")
    elif process.exitcode:
        report.add("faults", "ended", error=f"exit code {process.exitcode}; the output says why")


def faults(report: Any, source: int, device: int) -> None:
    """A peer killed while it is read, one that unregisters, thousands of connects; what is left afterwards."""
    torch.cuda.set_device(device)
    transport, _ = pair.new_transport()
    target = torch.zeros(64 * MIB, dtype=torch.int32, device=f"cuda:{device}")
    region = pair.region_of(target, 2)
    pair.exported(transport, region)
    free_before = torch.cuda.mem_get_info(source)[0]
    for trial in range(3):
        owner = pair.Owner(source, 256 * MIB, seed=trial)
        link = owner.connect(transport)
        blocks = pair.shuffled(owner.region, region, 256 * MIB, 65536, trial)
        killer = threading.Timer(0.3, os.kill, (owner.pid, signal.SIGKILL))
        killer.start()
        seen, moved, stop = "", 0, StopToken()
        until = time.perf_counter() + 3
        while time.perf_counter() < until:
            try:
                link.read([blocks], guard=None, stop=stop, deadline_s=5.0)
                moved += 1
            except PeerGone as error:
                seen = str(error)
                break
        bounded = time.perf_counter() < until - 1.5
        owner.process.join(5)
        link.close()
        after = fails_with(
            PeerGone, lambda link=link, blocks=blocks: link.read([blocks], guard=None, stop=StopToken(), deadline_s=1.0)
        )
        report.add(
            "faults", f"kill -9 of the owner, {trial}", reads_before=moved, seen=seen, verified=bounded and after
        )
    time.sleep(1.0)
    left = free_before - torch.cuda.mem_get_info(source)[0]
    report.add("faults", "memory of dead peers still held, MiB", MiB=left / MIB, verified=left < 64 * MIB)
    owner = pair.Owner(source, 64 * MIB)
    try:
        reconnects(report, transport, owner, region)
        link = owner.connect(transport)
        blocks = pair.shuffled(owner.region, region, 64 * MIB, 65536, 1)
        link.read([blocks], guard=None, stop=StopToken(), deadline_s=5.0)
        owner.ask("withdraw")
        refused = fails_with(
            RegistrationError, lambda: link.read([blocks], guard=None, stop=StopToken(), deadline_s=5.0)
        )
        report.add("faults", "an unregistered region is refused", verified=refused)
        link.close()
    finally:
        owner.stop()
        transport.close()
    if source != device:
        isolated(report, source, device)


def num_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def reconnects(report: Any, transport: Any, owner: pair.Owner, region: Any, times: int = 3000) -> None:
    """Connect, read one block, close; again and again."""
    blocks = pair.shuffled(owner.region, region, 4096, 4096, 1)

    def once() -> None:
        link = owner.connect(transport)
        link.read([blocks], guard=None, stop=StopToken(), deadline_s=5.0)
        link.close()

    once()
    fds, free = num_fds(), torch.cuda.mem_get_info()[0]
    started = time.perf_counter()
    done = 0
    while done < times and time.perf_counter() - started < 5:
        once()
        done += 1
    each = (time.perf_counter() - started) / done
    more_fds, less = num_fds() - fds, free - torch.cuda.mem_get_info()[0]
    report.add(
        "faults",
        f"{done} connects, reads and closes",
        each_us=each * 1e6,
        fds_left=more_fds,
        bytes_left=less,
        verified=more_fds <= 0 and less <= 2 * MIB,
    )


def _isolated_reader(pipe: Connection, offer: Any, incarnation: Any, encoded_region: bytes, nbytes: int) -> None:
    torch.cuda.set_device(0)  # the only one it sees
    transport, _ = pair.new_transport()
    target = torch.zeros(nbytes // 4, dtype=torch.int32, device="cuda:0")
    region = pair.region_of(target, 2)
    pair.exported(transport, region)
    try:
        link = transport.connect(offer, peer="owner", incarnation=incarnation, deadline_s=5.0)
        blocks = pair.shuffled(msgspec.msgpack.decode(encoded_region, type=RemoteRegion), region, nbytes, 65536, 1)
        link.read([blocks], guard=None, stop=StopToken(), deadline_s=5.0)
        seconds = pair.median_s(lambda: link.read([blocks], guard=None, stop=StopToken(), deadline_s=5.0), 5)
        pipe.send((int(target.to(torch.int64).sum()), nbytes / seconds / 1e9))
        link.close()
    except KVError as error:
        pipe.send(str(error))
    transport.close()


def isolated(report: Any, source: int, device: int) -> None:
    """A reader that sees only its own GPU (CUDA_VISIBLE_DEVICES), as serving instances are usually started."""
    owner = pair.Owner(source, 256 * MIB)
    here, there = mp.get_context("spawn").Pipe()
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = str(device)
    try:
        process = mp.get_context("spawn").Process(
            target=_isolated_reader,
            args=(there, owner.offer, owner.incarnation, encoded(owner.region), 256 * MIB),
            daemon=True,
        )
        process.start()
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
    answer = here.recv() if here.poll(60) else "silent for 60 s"
    if isinstance(answer, str):
        report.add("faults", "a reader that sees only its own GPU", error=answer, verified=False)
    else:
        report.add(
            "faults",
            "a reader that sees only its own GPU",
            GBps=answer[1],
            verified=answer[0] == owner.ask("checksum"),
        )
    process.join(10)
    owner.stop()
