"""The torch twins against float64 on random inputs, and their rows' bits in any company."""

import numpy as np
import pytest
import torch

from baton_kernels import reference
from baton_wire import state
from baton_wire.result import End

COMPANIES = (1, 2, 3, 5, 8, 13, 37, 64, 199, 200)  # numbers of rows


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[1, 2])
def threads(request):
    usual = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(usual)


@pytest.mark.parametrize("size", [1, 7, 16, 100, 128, 1000, 1024, 5000])
@pytest.mark.usefixtures("threads")
def test_rms_norm(size):
    x, residual, weight = normal(200, size) * 3, normal(200, size, seed=1), normal(size, seed=2)
    wide = (x + residual).double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    normed, total = reference.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    assert torch.allclose(normed.double(), expected, rtol=1e-5, atol=1e-6)
    for rows in COMPANIES:
        assert torch.equal(reference.rms_norm(total[:rows].clone(), weight, 1e-6), normed[:rows])


@pytest.mark.parametrize("size", [1, 31, 384, 3001, 3072])
@pytest.mark.usefixtures("threads")
def test_silu_mul(size):
    x = normal(200, 2 * size) * 5
    x[0, :size] = -1000.0  # where exp overflows
    gate, up = x.double().chunk(2, -1)
    out = reference.silu_mul(x)
    assert torch.allclose(out.double(), gate * torch.sigmoid(gate) * up, rtol=1e-5, atol=1e-6)
    for rows in COMPANIES:
        assert torch.equal(reference.silu_mul(x[:rows].clone()), out[:rows])
        assert torch.equal(reference.silu_mul(x[-rows:].clone()), out[-rows:])


@pytest.mark.parametrize(("size", "turns"), [(8, 8), (64, 8), (64, 32), (21, 7)])
def test_gate_and_up_in_turns(size, turns):
    """What a weight in turns makes has the same activation as what the plain one makes, bit for bit."""
    x, weight = normal(5, 2 * size), torch.arange(2 * size)[:, None]
    order = reference.in_turns(weight, turns)[:, 0]
    assert order[: 2 * turns].tolist() == [*range(turns), *range(size, size + turns)]
    assert sorted(order.tolist()) == list(range(2 * size))
    assert torch.equal(reference.silu_mul(x[:, order], turns), reference.silu_mul(x))


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (3, 1, 128), (8, 8, 24)])
def test_qk_norm_rope(heads, kv_heads, head_dim):
    qkv = normal(50, heads + 2 * kv_heads, head_dim)
    weight = normal(heads + kv_heads, head_dim, seed=1)
    table = reference.rotary_table(300, head_dim, 1e4)
    positions = torch.arange(50) * 5
    out = qkv.clone()
    reference.qk_norm_rope(out, weight, 1e-6, table[positions])
    assert torch.equal(out[:, heads + kv_heads :], qkv[:, heads + kv_heads :])
    x = qkv[:, : heads + kv_heads].double()
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    half = head_dim // 2
    rate = 1e4 ** -(torch.arange(half).double() / half)
    turn = torch.polar(torch.ones(50, half).double(), positions[:, None] * rate)[:, None]
    turned = torch.complex(x[..., :half], x[..., half:]) * turn
    expected = torch.cat((turned.real, turned.imag), -1)
    assert torch.allclose(out[:, : heads + kv_heads].double(), expected, rtol=1e-4, atol=1e-4)
    for rows in COMPANIES[:5]:
        few = qkv[:rows].clone()
        reference.qk_norm_rope(few, weight, 1e-6, table[positions[:rows]])
        assert torch.equal(few, out[:rows])


def test_write_kv_leaves_padding_and_everything_else_alone():
    cache = torch.full((6, 2, 3, 4, 5), 9.0)  # blocks, k and v, heads, block size, head_dim
    kv = normal(8, 6, 5)
    targets = [(2, 1), (2, 2), (5, 0)]
    places = [(block * 6 + head) * 4 + offset for block, offset in targets for head in range(6)]
    reference.write_kv(kv, cache, torch.tensor(places))
    for row, (block, offset) in enumerate(targets):
        assert torch.equal(cache[block, :, :, offset].reshape(6, 5), kv[row])
        cache[block, :, :, offset] = 9.0
    assert torch.equal(cache, torch.full_like(cache, 9.0))


@pytest.mark.parametrize("lengths", [(5, 5), (128, 128, 30), (128, 128, 128, 1)])
def test_folded_chunks_are_attention(lengths):
    """Chunks one after the other, the last of them hidden in part, against softmax over all of it."""
    tiles, heads, m, size = 2, 3, 8, 16
    q = normal(tiles * heads, m, size)
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    hidden: list[torch.Tensor] = []
    running: reference.Partial | None = None
    for i, visible in enumerate(lengths):
        k, v = normal(tiles * heads, 128, size, seed=i), normal(tiles * heads, 128, size, seed=50 + i)
        mask = (torch.arange(128) >= visible).expand(tiles, 1, m, 128)
        partial = reference.attend(q, k, v, mask if visible < 128 else None)
        if running is None:
            running = partial
        else:
            reference.fold(running, partial)
        keys.append(k)
        values.append(v)
        hidden.append(torch.arange(128) >= visible)
    assert running is not None
    scores = torch.bmm(q.double(), torch.cat(keys, 1).double().transpose(1, 2))
    weights = scores.masked_fill(torch.cat(hidden), -torch.inf).softmax(-1)
    expected = torch.bmm(weights, torch.cat(values, 1).double())
    assert torch.allclose((running[0] / running[1]).double(), expected, rtol=1e-4, atol=1e-5)


def test_a_chunk_of_which_nothing_is_seen_changes_no_bit():
    q, k, v = normal(2, 8, 16), normal(2, 128, 16, seed=1), normal(2, 128, 16, seed=2)
    running = reference.attend(q, k, v, None)
    before = [x.clone() for x in running]
    everything = torch.ones(1, 1, 8, 128, dtype=torch.bool)
    reference.fold(running, reference.attend(q, k, v, everything))
    assert all(torch.equal(a, b) for a, b in zip(running, before, strict=True))


def test_end_reasons():
    reasons = reference.end_reasons(
        tokens=torch.tensor([7, 7, 8, 7, 9]),
        finite=torch.tensor([True, True, True, False, True]),
        length=torch.tensor([3, 9, 9, 9, 8]),
        max_length=torch.full((5,), 10),
        stop_ids=torch.tensor([[7, -1], [7, 1], [7, -1], [7, -1], [-1, -1]]),
    )
    assert reasons.tolist() == [End.STOP, End.STOP, End.LENGTH, End.NUMERICAL, 0]


@pytest.mark.parametrize("seed", range(5))
def test_state_hash_is_that_of_the_wire(seed):
    random = np.random.default_rng(seed)
    admitted = random.integers(0, 2**50, 64)
    length = random.integers(0, 2**31, 64)
    occupancy = random.integers(0, 3, 64)
    token = random.integers(-1, 2**31, 64)
    slots = occupancy.nonzero()[0]
    expected = state.state_hash(slots, admitted[slots], length[slots], occupancy[slots], token[slots])
    columns = (torch.from_numpy(column) for column in (admitted, length, occupancy, token))
    assert int(reference.state_hash(*columns)) % 2**64 == expected
