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
from kvferry.transport.checksum import sums_of_blocks
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
        for part in (blocks, BlockList(source, region, offsets + 8, offsets + 3, 1003)):
            (sums,) = link.read_summed([part], guard=Guard(1, 80, 70), stop=StopToken(), deadline_s=60.0) or [None]
            expected = sums_of_blocks(target.cpu().numpy().view(np.uint8), part.target_offsets, part.nbytes)
            assert sums is not None and sums.tolist() == expected.tolist()
            own = transport.sums(region, part.target_offsets, part.nbytes, deadline_s=60.0)
            assert own.tolist() == expected.tolist()
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


def node_with(tensor: Any, name: str) -> Any:
    from kvferry.handoff.node import HandoffNode
    from kvferry.layout import Fingerprint, KVLayout, LayerLayout

    layers, block_bytes = 4, 4096
    fingerprint = Fingerprint("m", "uint8", 16, layers, 2, 64)
    node = HandoffNode(instance_id=name, fingerprint=fingerprint, digest="sum", transports=("cuda",))
    node.register(tensor)
    per_layer = tensor.numel() // layers
    places = tuple(LayerLayout(0, i * per_layer, block_bytes) for i in range(layers))
    node.start(KVLayout(per_layer // block_bytes, 16, block_bytes, 2, places))
    return node


@pytest.mark.parametrize("is_corrupt", [False, True])
def test_a_handoff_in_gpu_memory_is_checked_by_the_sums_of_its_kernel(is_corrupt: bool) -> None:
    from kvferry.types import HandoffTicket, InstanceRef, new_handoff_id

    memory = [torch.randint(0, 255, (4 * 32 * 4096,), dtype=torch.uint8, device="cuda:0") for _ in range(2)]
    torch.cuda.synchronize()
    source, target = (node_with(m, name) for m, name in zip(memory, ("source", "target"), strict=True))
    refs = [InstanceRef(n.instance_id, n.incarnation, (n.address,)) for n in (source, target)]
    ticket = HandoffTicket(new_handoff_id(), "target", *refs, 60.0)
    source.offer(ticket, b"prompt", 3)
    for layer in range(4):
        source.publish(ticket.handoff, range(layer, layer + 1), 0, [5, 9, 30])
    source.seal(ticket.handoff)
    if is_corrupt:
        memory[0][(2 * 32 + 9) * 4096 + 77] ^= 1
        torch.cuda.synchronize()
    target.drop_select(ticket, b"prompt", 0, [1, 2, 3])
    until = time.monotonic() + 60.0
    while not (outcomes := target.outcomes()) and time.monotonic() < until:
        time.sleep(0.01)
    (outcome,) = outcomes
    assert (str(outcome.state), outcome.cause) == (
        ("recomputed", "integrity_error") if is_corrupt else ("delivered", None)
    ), outcome
    if is_corrupt:
        assert "block 1 of the prompt, layers 2 to 2" in outcome.detail
    else:
        blocks = [m.view(4, 32, 4096) for m in memory]
        assert torch.equal(blocks[1][:, [1, 2, 3]], blocks[0][:, [5, 9, 30]])
    source.close()
    target.close()
