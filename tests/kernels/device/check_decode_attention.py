"""Decode attention against float64, and a row's bits in any company."""

import numpy
import pytest
import torch

from baton_kernels.decode_attention import decode_attention
from baton_kernels.decode_plan import DecodeWork, plan
from tests.kernels.numbers import DTYPES, close, normal, poison
from tests.kernels.paged import paged

# heads, key heads, head size, block size
SHAPES = [(6, 2, 32, 3), (4, 4, 16, 1), (4, 1, 64, 16), (2, 1, 32, 64)]
FULL_SHAPES = [(16, 8, 128, 16), (32, 8, 128, 64), (16, 2, 64, 1), (28, 4, 128, 256), (8, 8, 256, 48)]


def work_for(lengths, shape, device, chunk):
    heads, kv_heads, head_dim, block_size = shape
    rows, longest = len(lengths), max(lengths)
    work = DecodeWork.make(rows, heads, kv_heads, head_dim, block_size, longest, device, chunk)
    for scratch in (work.partial, work.weight):
        poison(scratch)
    work.listed.fill_(-1)
    work.ranges.fill_(-1)
    work.seen.copy_(torch.tensor(lengths))
    work.slots.copy_(torch.arange(len(lengths)))
    return work


def run(q, cache, work, out):
    plan(work, len(q), cache.block_table)
    scale = q.shape[-1] ** -0.5
    decode_attention(q, cache.keys, cache.values, cache.block_table, work, scale, out=out)
    assert not work.arrived.any(), "counters are ready for the next layer"
    return out


def lengths_for(full, chunk):
    if not full:
        return [0, 1, 2 * chunk + 6, 4 * chunk + 1, chunk, 0, chunk - 1]
    edges = [0, 1, chunk - 1, chunk, chunk + 1, 16 * chunk, 17 * chunk, 20 * chunk + 3, 0]
    return edges + torch.randint(0, 3000, (40,)).tolist()


def shapes(full):
    return FULL_SHAPES if full else SHAPES


def cache_for(lengths, shape, dtype, device):
    """What lies behind a sequence's end is no number where it is masked, and finite where tiles cover it."""
    _, kv_heads, head_dim, block_size = shape
    described = work_for(lengths, shape, device, None).described(len(lengths))
    behind = torch.finfo(dtype).max if described else torch.nan
    return paged(lengths, kv_heads, head_dim, block_size, dtype, device, behind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("which", range(5))
def test_against_float64(which, chunked, dtype, device, full):
    if which >= len(shapes(full)):
        pytest.skip("fewer shapes")
    if full and dtype == torch.float32:
        pytest.skip("tiles are for two-byte numbers")
    shape, chunk = shapes(full)[which], (256 if full else 64)
    lengths = lengths_for(full, chunk)
    cache = cache_for(lengths, shape, dtype, device)
    q = normal(len(lengths), shape[0], shape[2], dtype=dtype, device=device)
    work = work_for(lengths, shape, device, chunk if chunked else None)
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


@pytest.mark.parametrize("others", [9, 60])
@pytest.mark.parametrize("chunk", [None, 64])
def test_the_plan_lists_every_tile_once(chunk, others, device, full):
    """Beside a plan made row by row; many rows can have another tile than few."""
    shape = (16, 8, 128, 64)
    lengths = [0, 1, 700, 0, 64, 65, 2000, 33, 0, *torch.randint(0, 900, (others,)).tolist()]
    table = torch.randperm(32 * len(lengths), device=device).to(torch.int32).view(len(lengths), 32)
    work = work_for(lengths, shape, device, chunk)
    plan(work, len(lengths), table)
    rows = len(lengths)
    keys, lines = work.tile(rows).keys, shape[1] * shape[3]
    total = sum(-(-length // keys) for length in lengths)
    size = -(-total // work.lanes(rows)) if chunk is None else chunk // keys
    size = size if chunk else max(size, -(-64 // keys))
    listed: list[list[int]] = []
    begins: list[int] = []
    segments = 0
    for row, length in enumerate(lengths):
        tiles = [(tile * keys, min(keys, length - tile * keys)) for tile in range(-(-length // keys))]
        own: list[int] = []
        for tile, (position, valid) in enumerate(tiles):
            counted = tile if chunk else len(listed)
            if counted % size == 0:
                begins.append(len(listed))
            if counted % size == 0 or tile == 0:
                own.append(segments + len(own) if chunk else row + len(listed) // size)
            ends = tile == len(tiles) - 1 or (counted + 1) % size == 0
            block, offset = int(table[row, position // shape[3]]), position % shape[3]
            place = block * lines + offset if work.described(rows) else position
            listed.append([place, valid + 256 * ends, row, own[-1], row])
        if len(own) == 1:
            for record in listed[-len(tiles) :]:
                record[3] = -1
        assert int(work.parts[row]) == len(own)
        if own:
            assert own == list(range(int(work.first[row]), int(work.first[row]) + len(own)))
        segments += len(own)
    bounds = begins
    if chunk is None:  # the rest of a row that goes on in other shares, then what follows
        tops = [listed[begin][2:4] for begin in begins]
        same = [sum(record[2:4] == top for record in listed) for top in tops]
        rests = [0 if top[1] == -1 else count for top, count in zip(tops, same, strict=True)]
        bounds = [bound for begin, rest in zip(begins, rests, strict=True) for bound in (begin, begin + rest)]
    assert int(work.count[0]) == len(bounds)
    assert work.ranges[: len(bounds) + 1].tolist() == [*bounds, total]
    assert work.listed[:total].tolist() == listed
    if chunk is None:
        assert len(begins) <= work.lanes(rows) and max(numpy.diff([*begins, total])) <= size


def test_a_row_has_the_same_bits_alone_and_in_any_batch(device, full):
    shape, chunk = shapes(full)[0], (256 if full else 64)
    lengths = lengths_for(full, chunk)
    cache = cache_for(lengths, shape, torch.bfloat16, device)
    q = normal(len(lengths), shape[0], shape[2], dtype=torch.bfloat16, device=device)
    together = run(q, cache, work_for(lengths, shape, device, chunk), poison(torch.empty_like(q)))
    for row in [row for row in range(9) if row < len(lengths) and lengths[row]][: 9 if full else 2]:
        only = [length if i == row else 0 for i, length in enumerate(lengths)]
        alone = run(q, cache, work_for(only, shape, device, chunk), poison(torch.empty_like(q)))
        assert torch.equal(alone[row], together[row]), lengths[row]


def test_a_captured_graph_follows_lengths(device, full):
    if not full:
        pytest.skip("graphs need a GPU")
    shape = heads, _, head_dim, _ = FULL_SHAPES[1]
    lengths = [500, 100, 700, 1]
    cache = cache_for([800] * 4, shape, torch.bfloat16, device)
    q = normal(4, heads, head_dim, dtype=torch.bfloat16, device=device)
    work, out = work_for([800] * 4, shape, device, 256), torch.empty_like(q)
    run(q, cache, work, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan(work, 4, cache.block_table)
        decode_attention(q, cache.keys, cache.values, cache.block_table, work, head_dim**-0.5, out=out)
    for _ in range(20):
        work.seen.copy_(torch.tensor(lengths))
        poison(out)
        graph.replay()
        for row, length in enumerate(lengths):
            assert close(out[row], cache.attend(q[row], row, length))
        lengths = torch.randint(1, 800, (4,)).tolist()
