"""Kernels that work on one row at a time, against float64."""

import pytest
import torch

from baton_kernels import qk_rope_kv as rope_module
from baton_kernels import reference
from baton_kernels import silu_mul as silu_module
from baton_kernels.linear import LinearTile, linear
from baton_kernels.qk_rope_kv import qk_rope_kv
from baton_kernels.rms_norm import add_rms_norm, rms_norm
from baton_kernels.silu_mul import silu_mul
from tests.kernels.numbers import DTYPES, close, normal, poison

EPS = 1e-6


def normed(x, weight):
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()


def over_rms(x, rms_of):
    """x, or x / rms of other rows."""
    if rms_of is None:
        return x.double()
    rows, eps = rms_of
    return x.double() * (rows.double().square().mean(-1, keepdim=True) + eps).rsqrt()


def rows_and_eps(rows, size, dtype, device):
    """Strided rows, far from rms 1."""
    return normal(rows, 2 * size, dtype=dtype, device=device)[:, size:] * 5, EPS


def silu(x, turns=0):
    gate, up = x.double().chunk(2, -1) if not turns else x.double().unflatten(-1, (-1, 2, turns)).unbind(-2)
    out = gate * gate.sigmoid() * up
    return out if not turns else out.flatten(-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 100), (5, 1024)])
def test_rms_norm(rows, size, dtype, device, full):
    rows *= 1000 if full else 1
    wide = normal(rows, 2 * size, dtype=dtype, device=device) * 3
    x, weight = wide[:, size:], normal(size, dtype=dtype, device=device)
    out = poison(torch.empty(rows, size, dtype=dtype, device=device))
    assert rms_norm(x, weight, EPS, out=out) is out
    assert close(out, normed(x, weight))
    residual = normal(rows, size, dtype=dtype, device=device)
    total = x + residual
    out, written = add_rms_norm(x, residual, weight, EPS)
    assert written is residual
    assert close(written, total.double(), bound=1e-2 if dtype == torch.bfloat16 else 0)
    assert close(out, normed(written, weight))
    if dtype == torch.float32:
        assert close(out, reference.rms_norm(total, weight, EPS).double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "size", "turns"), [(1, 1, 0), (7, 1500, 0), (8, 1500, 0), (3, 8, 8), (7, 1528, 8), (8, 1528, 8)]
)
@pytest.mark.parametrize("divided", [False, True])
def test_silu_mul(divided, rows, size, turns, dtype, device, full, monkeypatch):
    if not full:
        monkeypatch.setattr(silu_module, "_MANY_ROWS", 8)
    x = normal(rows * (1000 if full else 1), 2 * size, dtype=dtype, device=device) * 4
    rms_of = rows_and_eps(len(x), 72, dtype, device) if divided else None
    out = poison(torch.empty(len(x), size, dtype=dtype, device=device))
    silu_mul(x, turns=turns, rms_of=rms_of, out=out)
    assert close(out, silu(over_rms(x, rms_of), turns))
    if dtype == torch.float32:
        given = x if rms_of is None else reference.over_rms(x, rms_of)
        assert close(out, reference.silu_mul(given, turns).double())


def rotated(x, rotary):
    low, high = x.chunk(2, -1)
    cosines, sines = rotary[:, None, 0].double(), rotary[:, None, 1].double()
    return x * cosines + torch.cat((high, low), -1) * sines


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "head_dim", "block_size"),
    [(4, 3, 1, 20, 5), (5, 3, 1, 20, 5), (4, 8, 4, 32, 1), (5, 16, 8, 128, 16)],
)
@pytest.mark.parametrize("divided", [False, True])
def test_qk_rope_kv(divided, rows, heads, kv_heads, head_dim, block_size, dtype, device, full, monkeypatch):
    if not full:
        monkeypatch.setattr(rope_module, "_MANY_ROWS", 5)
    rows *= 1000 if full else 1
    longest, blocks = 100, 20 * rows
    rms_of = rows_and_eps(rows, 40, dtype, device) if divided else None
    every = heads + 2 * kv_heads
    qkv = normal(rows, every * head_dim, dtype=dtype, device=device) * 2
    q_weight, k_weight = (normal(head_dim, dtype=dtype, device=device) for _ in range(2))
    rotary = reference.rotary_table(longest, head_dim, 1e4).to(device)
    positions = torch.randint(0, longest, (rows,), device=device)
    places = torch.randperm(blocks * block_size, device=device)[:rows].to(torch.int32)
    places[1] = -1
    size = (blocks, kv_heads, block_size, head_dim)
    keys, values = (poison(torch.empty(size, dtype=dtype, device=device)) for _ in range(2))
    out = poison(torch.empty(rows, heads, head_dim, dtype=dtype, device=device))
    where = rotary, positions, places, keys, values
    qk_rope_kv(qkv, q_weight, k_weight, EPS, *where, rms_of=rms_of, out=out)
    q, k, v = over_rms(qkv, rms_of).view(rows, every, head_dim).split([heads, kv_heads, kv_heads], 1)
    turn = rotary[positions]
    assert close(out, rotated(normed(q, q_weight), turn))
    there = places >= 0
    block, offset = places[there].long() // block_size, places[there].long() % block_size
    assert close(keys[block, :, offset], rotated(normed(k, k_weight), turn)[there])
    assert (
        close(values[block, :, offset], v[there])
        if divided
        else torch.equal(values[block, :, offset], v[there].to(dtype))
    )
    for cache in (keys, values):
        assert cache.isnan().sum() == cache.numel() - there.sum() * kv_heads * head_dim


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divided", [False, True])
def test_values_in_the_cache_are_finite_and_broken_ones_show_in_their_keys(divided, dtype, device):
    """Attention reads beyond a sequence's end what others left there."""
    rows, heads, kv_heads, head_dim = 3, 4, 2, 32
    largest, inf, nan = torch.finfo(dtype).max, torch.inf, torch.nan
    qkv = normal(rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype, device=device)
    qkv[1, -head_dim : -head_dim + 4] = torch.tensor([inf, -inf, nan, 1.5], dtype=dtype)
    qkv[2] = nan
    rms_of = (torch.ones(rows, 40, dtype=dtype, device=device), 0.0) if divided else None
    weight = normal(head_dim, dtype=dtype, device=device)
    numbers = torch.arange(rows, device=device, dtype=torch.int32)
    keys, values = (poison(torch.empty(4, kv_heads, 1, head_dim, dtype=dtype, device=device)) for _ in "kv")
    rotary = reference.rotary_table(8, head_dim, 1e4).to(device)
    qk_rope_kv(qkv, weight, weight, EPS, rotary, numbers, numbers, keys, values, rms_of=rms_of)
    assert values[1, 1, 0, :4].tolist() == [largest, -largest, 0, 1.5]
    assert keys[1, 1].isnan().all() and keys[1, 0].isfinite().all()  # that head's alone
    assert values[2].eq(0).all() and keys[2].isnan().all()
    assert keys[0].isfinite().all() and values[:3].isfinite().all() and values[3].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("before", ["nothing", "silu", "division and silu"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("turns", [0, 8])
def test_linear(turns, rows, before, dtype, device, full):
    if turns and before == "nothing":
        pytest.skip("nothing that takes turns")
    for outputs, inputs in ((4096, 1024), (1024, 3072), (1000, 600)) if full else ((50, 72),):
        gated = before != "nothing"
        x = normal(rows, inputs * (1 + gated), dtype=dtype, device=device)
        weight = normal(outputs, inputs, dtype=dtype, device=device)
        rms_of = rows_and_eps(rows, 72, dtype, device) if before == "division and silu" else None
        residual = normal(rows, outputs, dtype=dtype, device=device) if rows % 2 else None
        out = poison(torch.empty(rows, outputs, dtype=dtype, device=device))
        linear(
            x,
            weight,
            silu=gated,
            turns=turns,
            rms_of=rms_of,
            residual=residual,
            out=out,
            tile=None if full else LinearTile(16, 32, 4),
        )
        wide = silu(over_rms(x, rms_of), turns) if gated else x.double()
        expected = wide @ weight.double().T
        assert close(out, expected if residual is None else expected + residual.double())
