"""The cuda transport on a real GPU, between two processes. bench/gpu/transfer.py checks more, and measures.

Where pytest is there without its plugins and without this project's other needs:

    PYTHONPATH=src python3 -m pytest -c /dev/null --rootdir . --noconftest -p no:cacheprovider -v -rs \\
        tests/integration/transport/test_cuda_gpu.py
"""

from __future__ import annotations

import multiprocessing as mp
import os
import secrets
import signal
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest

from kvferry.errors import LeaseExpired, PeerGone
from kvferry.transport.base import BlockList, Guard, Region, RemoteRegion, StopToken
from kvferry.transport.registry import TransportContext, TransportSettings
from kvferry.types import new_incarnation

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    # CUDA keeps its context's file descriptors and threads until the process ends.
    pytest.mark.leaks_allowed,
]

NBYTES = 64 << 20


def transport_with(tensor: Any) -> tuple[Any, Region, int]:
    from kvferry.transport.cuda import CudaTransport

    incarnation = new_incarnation()
    transport = CudaTransport(TransportContext(incarnation, None, TransportSettings(), lambda _: None))
    region = Region(
        1, tensor.data_ptr(), tensor.nbytes, secrets.token_hex(16), "cuda", tensor.device.index, buffer=tensor
    )
    return transport, region, incarnation


def owner(pipe: Connection, device: int) -> None:
    torch.cuda.set_device(device)
    tensor = torch.arange(NBYTES // 8, dtype=torch.int64, device=f"cuda:{device}") * 7
    torch.cuda.synchronize()
    transport, region, incarnation = transport_with(tensor)
    handle = transport.export(region)
    pipe.send((transport.offer(), incarnation, region.token, handle))
    pipe.recv()
    transport.close()


@pytest.mark.parametrize("devices", [(0, 0), pytest.param((0, 1), marks=pytest.mark.multi_gpu)])
def test_blocks_cross_and_a_killed_owner_is_an_error(devices: tuple[int, int]) -> None:
    if max(devices) >= torch.cuda.device_count():
        pytest.skip("needs two GPUs")
    here, there = mp.get_context("spawn").Pipe()
    process = mp.get_context("spawn").Process(target=owner, args=(there, devices[0]), daemon=True)
    process.start()
    torch.cuda.set_device(devices[1])
    target = torch.zeros(NBYTES // 8, dtype=torch.int64, device=f"cuda:{devices[1]}")
    transport, region, _ = transport_with(target)
    assert here.poll(60), "the owner is silent"
    offer, incarnation, token, handle = here.recv()
    source = RemoteRegion(1, NBYTES, token, "cuda", devices[0], handles={"cuda": handle})
    link = transport.connect(offer, peer="owner", incarnation=incarnation, deadline_s=5.0)
    link.regions = {1: source}
    try:
        offsets = np.random.default_rng(0).permutation(NBYTES // 65536) * 65536
        blocks = BlockList(source, region, offsets, offsets[::-1].copy(), 65536)
        link.read([blocks], guard=Guard(1, 80, 70), stop=StopToken(), deadline_s=10.0)
        rows = torch.from_numpy(offsets // 65536).to(target.device)
        wanted = (torch.arange(NBYTES // 8, device=target.device) * 7).view(-1, 8192)[rows]
        assert torch.equal(target.view(-1, 8192)[rows.flip(0)], wanted)
        with pytest.raises(LeaseExpired):
            link.read([blocks], guard=Guard(1, 80, 71), stop=StopToken(), deadline_s=10.0)
        os.kill(process.pid or 0, signal.SIGKILL)
        until = time.monotonic() + 2.0
        with pytest.raises(PeerGone):
            while time.monotonic() < until:
                link.read([blocks], guard=None, stop=StopToken(), deadline_s=10.0)
    finally:
        process.kill()
        process.join(10)
        link.close()
        transport.close()
