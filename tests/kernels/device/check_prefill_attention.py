"""Prompt chunks against float64: after a prefix or not, split or not, several prompts at once."""

import pytest
import torch

from baton_kernels import prefill_attention as prefill
from baton_kernels.prefill_attention import PromptChunk, plan_prefill, prefill_attention
from baton_kernels.tiles import PrefillTile
from tests.kernels.numbers import DTYPES, close, normal, poison
from tests.kernels.paged import paged

SMALL = PrefillTile(32, 16, 4, 2, True)
# heads, key heads, head size, block size
SHAPES = [(6, 2, 32, 3), (4, 4, 16, 32), (2, 1, 32, 16)]
FULL_SHAPES = [(16, 8, 128, 16), (32, 8, 128, 64), (16, 2, 64, 1), (28, 4, 128, 256), (8, 8, 256, 48)]


def layout(full, few):
    """(start, rows) of chunks; slot i has the i-th."""
    if few:
        return [(3000, 20), (5000, 1)] if full else [(60, 5), (33, 1)]
    if full:
        return [(0, 1000), (0, 129), (1024, 300), (777, 1), (0, 2500), (4001, 333)]
    return [(60, 5), (0, 17), (16, 1)]


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", range(5))
def test_against_float64(which, dtype, few, device, full, monkeypatch):
    shapes = FULL_SHAPES if full else SHAPES
    if which >= len(shapes):
        pytest.skip("fewer shapes")
    if full and dtype == torch.float32:
        pytest.skip("tiles are for two-byte numbers")
    heads, kv_heads, head_dim, block_size = shapes[which]
    if not full:
        monkeypatch.setattr(prefill, "SPAN", 32)
        monkeypatch.setattr(prefill, "machine", lambda _: (90, 1000 if few else 1))
    parts = layout(full, few)
    cache = paged([start + rows for start, rows in parts], kv_heads, head_dim, block_size, dtype, device)
    chunks, first = [], 0
    for slot, (start, rows) in enumerate(parts):
        chunks.append(PromptChunk(slot, first, rows, start))
        first += rows
    q = normal(first + 1, heads, head_dim, dtype=dtype, device=device)
    tile = None if full else SMALL
    work = plan_prefill(chunks, heads, kv_heads, head_dim, device, block_size=block_size, tile=tile)
    assert bool(len(work.splits)) == few
    poison(work.partial), poison(work.weight)
    out = poison(torch.empty_like(q))
    prefill_attention(q, cache.keys, cache.values, cache.block_table, work, head_dim**-0.5, out)
    assert out[first].isnan().all(), "a row of no chunk"
    for chunk in chunks:
        step = max(1, chunk.rows // 40) if full else 1
        rows = sorted({*range(0, chunk.rows, step), chunk.rows - 1})
        expected = [cache.attend(q[chunk.first + i], chunk.slot, chunk.start + i + 1) for i in rows]
        assert close(out[[chunk.first + i for i in rows]], torch.stack(expected)), chunk
        assert not out[chunk.first : chunk.first + chunk.rows].isnan().any()
