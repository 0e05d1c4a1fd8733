"""Layouts from real strides: copying by them must move exactly the tokens and heads that indexing says."""

import numpy as np
import pytest
import torch

from kvferry.connector.vllm import layouts
from kvferry.connector.vllm.layouts import Geometry, layout_of, storages
from kvferry.errors import CompatibilityError
from kvferry.layout import plan_copy

LAYERS, BLOCKS, HEADS, TOKENS, CONTENT = 3, 5, 4, 8, 12


@pytest.fixture
def on_gpu(monkeypatch):
    """CPU tensors laid out as a GPU backend has them: without the packing of the CPU kernels."""
    monkeypatch.setattr(layouts, "_is_packed", lambda tensor: False)


def one_storage(order, *, blocks=BLOCKS, heads=HEADS, layers=LAYERS, tokens=TOKENS):
    """KV tensors [B, H, N, C] of all layers in one storage, in memory in `order` (a permutation of 'LBHNC')."""
    sizes = {"L": layers, "B": blocks, "H": heads, "N": tokens, "C": CONTENT}
    whole = torch.arange(int(np.prod(list(sizes.values()))), dtype=torch.int32).reshape([sizes[c] for c in order])
    logical = whole.permute([order.index(c) for c in "LBHNC"])
    # Numbers are rounded up so that "layers.10" sorts after "layers.2".
    return {f"model.layers.{i * 5}.attn": logical[i] for i in range(layers)}


def separate(order, **sizes):
    """As `one_storage`, each layer with a storage of its own."""
    return {n: _compact(t) for n, t in one_storage("L" + order, **sizes).items()}


def _compact(view):
    copy = torch.empty(0, dtype=view.dtype).set_(
        torch.UntypedStorage(view.numel() * view.element_size()), 0, view.shape, view.stride()
    )
    return copy.copy_(view)


def lay_out(kv, rank=0, size=1, blocks=BLOCKS):
    regions = {s.address: 100 + i for i, s in enumerate(storages(kv))}
    buffers = {100 + i: s.buffer.numpy() for i, s in enumerate(storages(kv))}
    return layout_of(kv, Geometry(blocks, TOKENS, rank, size), regions), buffers


def copy_blocks(source, target, source_ids, target_ids, source_rank=(0, 1), target_rank=(0, 1)):
    s_layout, s_buffers = lay_out(source, *source_rank)
    t_layout, t_buffers = lay_out(target, *target_rank)
    for c in plan_copy(s_layout, t_layout, range(LAYERS), source_ids, target_ids):
        for s, t in zip(c.source_offsets, c.target_offsets, strict=True):
            t_buffers[c.target_region][t : t + c.nbytes] = s_buffers[c.source_region][s : s + c.nbytes]


@pytest.mark.parametrize("target_order", ["LBNHC", "LBHNC"])
@pytest.mark.parametrize("source_order", ["LBNHC", "LBHNC", "BLNHC"])
def test_blocks_arrive_whatever_the_order_in_memory(on_gpu, source_order, target_order):
    source, target = one_storage(source_order), one_storage(target_order)
    for tensor in target.values():
        tensor.zero_()
    copy_blocks(source, target, [4, 1], [0, 3])
    for name in source:
        assert torch.equal(target[name][0], source[name][4])
        assert torch.equal(target[name][3], source[name][1])
        assert not target[name][[1, 2, 4]].any()


@pytest.mark.parametrize("order", ["LBNHC", "LBHNC"])
def test_head_slices_both_ways(on_gpu, order):
    whole = one_storage(order)
    upper = one_storage(order, heads=HEADS // 2)
    for tensor in upper.values():
        tensor.zero_()
    copy_blocks(whole, upper, [2], [1], (0, 1), (1, 2))
    for name in whole:
        assert torch.equal(upper[name][1], whole[name][2][HEADS // 2 :])
    back = one_storage(order)
    expected = {n: t.clone() for n, t in back.items()}
    for tensor in upper.values():
        tensor.fill_(-7)
    copy_blocks(upper, back, [0], [4], (1, 2), (0, 1))
    for name in back:
        expected[name][4, HEADS // 2 :] = -7
        assert torch.equal(back[name], expected[name])


def test_layers_with_storages_of_their_own(on_gpu):
    source, target = separate("BNHC"), separate("BNHC")
    for tensor in target.values():
        tensor.zero_()
    assert len(storages(source)) == LAYERS
    copy_blocks(source, target, [0], [2])
    for name in source:
        assert torch.equal(target[name][2], source[name][0])


def test_whole_blocks_travel_in_one_run(on_gpu):
    layout, _ = lay_out(one_storage("LBNHC"))
    (copy,) = plan_copy(layout, layout, range(LAYERS), [0, 1], [2, 3])
    assert copy.nbytes == HEADS * TOKENS * CONTENT * 4
    assert len(copy.source_offsets) == LAYERS * 2


def test_cpu_packing_moves_whole_heads_only():
    whole, lower = one_storage("LBHNC"), one_storage("LBHNC", heads=HEADS // 2)
    w_layout, _ = lay_out(whole)
    l_layout, _ = lay_out(lower, 0, 2)
    (copy,) = plan_copy(w_layout, l_layout, range(LAYERS), [3], [0])
    assert w_layout.opaque.startswith("vllm-cpu")
    assert copy.nbytes % (TOKENS * CONTENT * 4) == 0
    copy_blocks(whole, lower, [3], [0], (0, 1), (0, 2))
    for name in whole:
        assert torch.equal(lower[name][0], whole[name][3][: HEADS // 2])


def test_kernel_blocks_make_up_one_block(on_gpu):
    source = one_storage("LBNHC", blocks=BLOCKS * 2, tokens=TOKENS // 2)
    target = one_storage("LBNHC", blocks=BLOCKS * 2, tokens=TOKENS // 2)
    for tensor in target.values():
        tensor.zero_()
    copy_blocks(source, target, [1], [3])
    for name in source:
        assert torch.equal(target[name][6:8], source[name][2:4])
        assert not target[name][:6].any()


def test_latent_cache_is_the_same_on_every_rank(on_gpu):
    kv = {f"layers.{i}": torch.arange(BLOCKS * TOKENS * 6).reshape(BLOCKS, TOKENS, 6) for i in range(LAYERS)}
    layout, _ = lay_out(kv, 1, 2)
    assert (layout.num_kv_heads, layout.tp_rank, layout.tp_size) == (1, 0, 1)
    assert layout.block_bytes == TOKENS * 6 * 8


def test_layers_come_in_the_order_of_their_numbers(on_gpu):
    kv = one_storage("LBNHC")
    shuffled = {name: kv[name] for name in sorted(kv)}  # as text, layers.10 comes before layers.5
    assert list(shuffled) != list(kv)
    assert lay_out(shuffled)[0].layers == lay_out(kv)[0].layers


def test_shared_layers_count_once(on_gpu):
    kv = one_storage("LBNHC")
    kv["model.layers.99.attn"] = kv["model.layers.0.attn"]
    assert len(lay_out(kv)[0].layers) == LAYERS


@pytest.mark.parametrize(
    "tensor, named",
    [
        (torch.zeros(2, BLOCKS, TOKENS, HEADS, 6), "expected (blocks, heads, tokens, content)"),
        (torch.zeros(BLOCKS + 1, HEADS, TOKENS, CONTENT), "expected (blocks, heads, tokens, content)"),
        (torch.zeros(BLOCKS, HEADS, TOKENS + 1, CONTENT), "tokens in dimension 2"),
        (torch.zeros(BLOCKS, HEADS, TOKENS, CONTENT + 1)[..., :CONTENT], "no gaps"),
    ],
)
def test_what_cannot_be_copied_by_block_is_refused_and_named(on_gpu, tensor, named):
    with pytest.raises(CompatibilityError, match="layer odd: shape") as caught:
        lay_out({"odd": tensor})
    assert named in str(caught.value)


def test_layers_of_several_kinds_are_refused(on_gpu):
    kv = {"a": torch.zeros(BLOCKS, 2, TOKENS, 6), "b": torch.zeros(BLOCKS, 4, TOKENS, 6)}
    with pytest.raises(CompatibilityError, match="of 2 kinds"):
        lay_out(kv)
