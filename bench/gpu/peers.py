"""Other systems on the same blocks: NIXL (UCX), Mooncake (nvlink_intra) and NCCL send/recv. Each skips if not there."""

from __future__ import annotations

import importlib.util
import multiprocessing as mp
import os
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

SIZE = 1 << 30
# Block size in KiB, bytes moved in one round (fewer where the peer is slow: its rate does not depend on the count).
CASES = ((16, 1 << 27), (64, 1 << 28), (256, 1 << 29), (2048, 1 << 30))


NAMES = {"nccl": "nccl", "nixl": "nixl-ucx", "mooncake": "mooncake-nvlink_intra"}


def is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def offsets(block_bytes: int, moved: int) -> tuple[np.ndarray, np.ndarray]:
    random, total, count = np.random.default_rng(1), SIZE // block_bytes, moved // block_bytes
    return random.permutation(total)[:count] * block_bytes, random.permutation(total)[:count] * block_bytes


def figure(kib: int, moved: int, times: list[float], good: bool) -> dict[str, Any]:
    return {
        "case": f"{kib} KiB",
        "GBps": moved / statistics.median(times) / 1e9,
        "bytes": moved,
        "verified": good,
    }


def verified(target: torch.Tensor, head: Any, source: np.ndarray, landed: np.ndarray, block_bytes: int) -> bool:
    """Whether the blocks whose source lies in the first MiB arrived."""
    known = torch.from_numpy(head).to(target.device)
    inside = np.flatnonzero(source + block_bytes <= len(head))
    return all(
        torch.equal(target[landed[i] : landed[i] + block_bytes], known[source[i] : source[i] + block_bytes])
        for i in inside
    )


def _nixl_agent(name: str) -> Any:
    from nixl._api import nixl_agent, nixl_agent_config

    return nixl_agent(name, nixl_agent_config(backends=["UCX"]))


def _buffer(device: int, fill: bool) -> torch.Tensor:
    torch.cuda.set_device(device)
    buffer = torch.zeros(SIZE, dtype=torch.uint8, device=f"cuda:{device}")
    if fill:
        buffer.random_(0, 256)
    torch.cuda.synchronize()
    return buffer


def _nixl_target(pipe: Connection, device: int) -> None:
    buffer = _buffer(device, True)
    agent = _nixl_agent("target")
    agent.register_memory([(buffer.data_ptr(), SIZE, device, "")], "VRAM")
    pipe.send((buffer.data_ptr(), agent.get_agent_metadata(), buffer[: 1 << 22].cpu().numpy()))
    agent.add_remote_agent(pipe.recv())
    pipe.send("ready")
    pipe.recv()


def nixl(pipe: Connection, source: int, device: int) -> None:
    here, there = mp.Pipe()
    target = mp.get_context("spawn").Process(target=_nixl_target, args=(there, source), daemon=True)
    target.start()
    buffer = _buffer(device, False)
    agent = _nixl_agent("reader")
    agent.register_memory([(buffer.data_ptr(), SIZE, device, "")], "VRAM")
    address, metadata, head = here.recv()
    peer = agent.add_remote_agent(metadata)
    here.send(agent.get_agent_metadata())
    here.recv()
    for kib, moved in CASES:
        size = kib << 10
        from_, to = offsets(size, moved)

        def descriptors(at: np.ndarray, base: int, owner: int, size: int = size) -> np.ndarray:
            rows = np.zeros((len(at), 3), dtype=np.uint64)
            rows[:, 0], rows[:, 1], rows[:, 2] = (at + base).astype(np.uint64), size, owner
            return rows

        local = agent.get_xfer_descs(descriptors(to, buffer.data_ptr(), device), "VRAM")
        remote = agent.get_xfer_descs(descriptors(from_, address, source), "VRAM")
        ours = agent.prep_xfer_dlist("NIXL_INIT_AGENT", local)
        theirs = agent.prep_xfer_dlist(peer, remote)
        index, times, state = np.arange(len(to), dtype=np.int32), [], ""
        for _ in range(5):
            started = time.perf_counter()
            handle = agent.make_prepped_xfer("READ", ours, index, theirs, index, b"")
            state = agent.transfer(handle)
            while state == "PROC":
                state = agent.check_xfer_state(handle)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
            agent.release_xfer_handle(handle)
        good = state == "DONE" and verified(buffer, head, from_, to, size)
        pipe.send(figure(kib, moved, times[1:], good))
    here.send("stop")


def _mooncake_engine(buffer: torch.Tensor) -> Any:
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "nvlink_intra", ""):
        raise RuntimeError("mooncake did not initialize")
    engine.register_memory(buffer.data_ptr(), SIZE)
    return engine


def _mooncake_target(pipe: Connection, device: int) -> None:
    buffer = _buffer(device, True)
    engine = _mooncake_engine(buffer)
    pipe.send((buffer.data_ptr(), engine.get_rpc_port(), buffer[: 1 << 22].cpu().numpy()))
    pipe.recv()


def mooncake(pipe: Connection, source: int, device: int) -> None:
    os.environ |= {"MC_INTRANODE_NVLINK": "true", "MC_LOG_LEVEL": "WARNING"}
    here, there = mp.Pipe()
    target = mp.get_context("spawn").Process(target=_mooncake_target, args=(there, source), daemon=True)
    target.start()
    buffer = _buffer(device, False)
    engine = _mooncake_engine(buffer)
    address, port, head = here.recv()
    for kib, moved in CASES:
        size = kib << 10
        from_, to = offsets(size, moved)
        remote, local = (from_ + address).tolist(), (to + buffer.data_ptr()).tolist()
        times, failed = [], 0
        for _ in range(5):
            started = time.perf_counter()
            for i in range(0, len(to), 1024):
                sizes = [size] * len(local[i : i + 1024])
                failed |= engine.batch_transfer_sync_read(
                    f"127.0.0.1:{port}", local[i : i + 1024], remote[i : i + 1024], sizes
                )
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        good = not failed and verified(buffer, head, from_, to, size)
        pipe.send(figure(kib, moved, times[1:], good))
    here.send("stop")


def _nccl_rank(rank: int, port: int, pipe: Connection) -> None:
    import torch.distributed as dist

    # Multicast over NVLink takes part in no send; where it is forbidden its setup alone would fail.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NCCL_NVLS_ENABLE": "0"}
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=2, device_id=torch.device("cuda", rank))
    for mib in (1, 64, 1024):
        tensor, times = torch.full((mib << 18,), 7 * (1 - rank), dtype=torch.int32, device="cuda"), []
        for _ in range(10):
            dist.barrier()
            torch.cuda.synchronize()
            started = time.perf_counter()
            if rank == 0:
                dist.send(tensor, 1)
            else:
                dist.recv(tensor, 0)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        if rank == 1:
            good = bool((tensor == 7).all())
            pipe.send(figure(mib << 10, mib << 20, times[3:], good) | {"case": f"contiguous, {mib} MiB"})
    dist.destroy_process_group()


def nccl(pipe: Connection, source: int, device: int) -> None:
    torch.multiprocessing.spawn(_nccl_rank, args=(29531, pipe), nprocs=2)


def _guarded(name: str, pipe: Connection, source: int, device: int) -> None:
    {"nixl": nixl, "mooncake": mooncake, "nccl": nccl}[name](pipe, source, device)


def measure(name: str, source: int, device: int, seconds: float) -> list[dict[str, Any]]:
    """One peer's figures, or one row that says why there are none. In processes of its own, for `seconds` at most."""
    if name in ("nixl", "mooncake") and not is_there(name):
        return [{"skipped": f"{name} is not installed"}]
    if name == "nccl" and source == device:
        return [{"skipped": "NCCL needs two GPUs"}]
    here, there = mp.get_context("spawn").Pipe(duplex=False)
    # Not a daemon: it starts a process of its own.
    process = mp.get_context("spawn").Process(target=_guarded, args=(name, there, source, device))
    process.start()
    there.close()
    rows, until = [], time.monotonic() + seconds
    try:
        while here.poll(max(0.0, until - time.monotonic())):
            rows.append(here.recv())
    except EOFError:
        process.join(5)
    else:
        rows.append({"skipped": f"{name} did not end within {seconds:.0f} s"})
    if process.is_alive():
        process.kill()
    if process.exitcode and not rows:
        rows.append({"skipped": f"{name} ended with code {process.exitcode}; its output says why"})
    return rows
