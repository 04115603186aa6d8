"""Decode attention against float64, and a row's bits in any company."""

import pytest
import torch

from baton_kernels.decode_attention import DecodeWork, decode_attention, plan
from tests.kernels.numbers import DTYPES, close, normal, poison
from tests.kernels.paged import paged

# heads, key heads, head size, block size
SHAPES = [(6, 2, 32, 3), (4, 4, 16, 1), (4, 1, 64, 16), (2, 1, 32, 64)]
FULL_SHAPES = [(16, 8, 128, 16), (32, 8, 128, 64), (16, 2, 64, 1), (28, 4, 128, 256), (8, 8, 256, 48)]


def work_for(lengths, shape, device, chunk):
    heads, kv_heads, head_dim, _ = shape
    work = DecodeWork.make(len(lengths), heads, kv_heads, head_dim, max(lengths), device, chunk=chunk)
    for scratch in (work.partial, work.weight):
        poison(scratch)
    work.items.fill_(-1)
    work.seen.copy_(torch.tensor(lengths))
    work.slots.copy_(torch.arange(len(lengths)))
    return work


def run(q, cache, work, out):
    plan(work, len(q))
    scale = q.shape[-1] ** -0.5
    decode_attention(q, cache.keys, cache.values, cache.block_table, work, scale, out=out)
    assert not work.arrived.any(), "counters are ready for the next layer"
    return out


def lengths_for(full, chunk):
    if not full:
        return [0, 1, 2 * chunk + 6, 4 * chunk + 1, chunk, 0]
    edges = [0, 1, chunk - 1, chunk, chunk + 1, 16 * chunk, 17 * chunk, 20 * chunk + 3, 0]
    return edges + torch.randint(0, 3000, (40,)).tolist()


def shapes(full):
    return FULL_SHAPES if full else SHAPES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", range(5))
def test_against_float64(which, dtype, device, full):
    if which >= len(shapes(full)):
        pytest.skip("fewer shapes")
    if full and dtype == torch.float32:
        pytest.skip("tiles are for two-byte numbers")
    shape, chunk = shapes(full)[which], (256 if full else 32)
    heads, kv_heads, head_dim, block_size = shape
    lengths = lengths_for(full, chunk)
    cache = paged(lengths, kv_heads, head_dim, block_size, dtype, device)
    q = normal(len(lengths), heads, head_dim, dtype=dtype, device=device)
    work = work_for(lengths, shape, device, chunk if which else None)
    mixed = torch.randperm(len(lengths), device=device)  # whose row is whose
    work.slots.copy_(mixed)
    cache.block_table[mixed] = cache.block_table.clone()
    for _ in range(2):  # as the second layer of a step
        out = run(q, cache, work, poison(torch.empty_like(q)))
    for row, length in enumerate(lengths):
        if length:
            expected = cache.attend(q[row], int(mixed[row]), length)
            assert close(out[row], expected), (row, length)
        else:
            assert out[row].isnan().all()


def test_a_row_has_the_same_bits_alone_and_in_any_batch(device, full):
    shape, chunk = shapes(full)[0], (256 if full else 32)
    heads, kv_heads, head_dim, block_size = shape
    lengths = lengths_for(full, chunk)
    cache = paged(lengths, kv_heads, head_dim, block_size, torch.bfloat16, device)
    q = normal(len(lengths), heads, head_dim, dtype=torch.bfloat16, device=device)
    together = run(q, cache, work_for(lengths, shape, device, chunk), poison(torch.empty_like(q)))
    for row in [row for row in range(9) if row < len(lengths) and lengths[row]][: 9 if full else 2]:
        only = [length if i == row else 0 for i, length in enumerate(lengths)]
        alone = run(q, cache, work_for(only, shape, device, chunk), poison(torch.empty_like(q)))
        assert torch.equal(alone[row], together[row]), lengths[row]


def test_a_captured_graph_follows_lengths(device, full):
    if not full:
        pytest.skip("graphs need a GPU")
    shape = heads, kv_heads, head_dim, block_size = FULL_SHAPES[0]
    lengths = [500, 100, 700, 1]
    cache = paged([800] * 4, kv_heads, head_dim, block_size, torch.bfloat16, device)
    q = normal(4, heads, head_dim, dtype=torch.bfloat16, device=device)
    work, out = work_for([800] * 4, shape, device, 256), torch.empty_like(q)
    run(q, cache, work, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan(work, 4)
        decode_attention(q, cache.keys, cache.values, cache.block_table, work, head_dim**-0.5, out=out)
    for _ in range(20):
        work.seen.copy_(torch.tensor(lengths))
        poison(out)
        graph.replay()
        for row, length in enumerate(lengths):
            assert close(out[row], cache.attend(q[row], row, length))
        lengths = torch.randint(1, 800, (4,)).tolist()
