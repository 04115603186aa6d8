"""Products whose rows keep their bits in any company: against float64, and against themselves."""

from dataclasses import replace

import pytest
import torch

from baton_kernels.invariant_linear import invariant_linear
from baton_kernels.invariant_tile import InvariantTile
from baton_kernels.reference import TURNS, in_turns
from baton_kernels.silu_mul import silu_mul
from tests.kernels.numbers import DTYPES, close, normal, poison

SMALL = InvariantTile(32, 16, 16, 4, 2)
WAYS = [
    replace(SMALL, rows_high=rows_high, described=described)
    for rows_high in (False, True)
    for described in (False, True)
]


def tile_for(way, dtype, full):
    """At full size tiles are what the machine would choose, but for float32, which has none of its own."""
    if not full or dtype == torch.float32:
        return way
    if way != WAYS[0]:
        pytest.skip("the same again")
    return None


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 17, 64, 65, 300, 1111])
def test_against_float64(rows, dtype, way, device, full):
    if not full and rows > 17:
        pytest.skip("programs are few where they are interpreted")
    if full and dtype == torch.float32 and rows > 300:
        pytest.skip("tiles are for two-byte numbers")
    for outputs, inputs in ((4096, 1024), (1024, 3072), (1000, 600)) if full else ((50, 72), (64, 32)):
        x = normal(rows, 2 * inputs, dtype=dtype, device=device)[:, inputs:]
        weight = normal(outputs, inputs, dtype=dtype, device=device)
        bias = normal(outputs, dtype=dtype, device=device) if rows % 2 else None
        residual = normal(rows, outputs, dtype=dtype, device=device) if rows % 3 else None
        out = poison(torch.empty(rows, outputs, dtype=dtype, device=device))
        tile = tile_for(way, dtype, full)
        invariant_linear(x, weight, bias, residual=residual, out=out, tile=tile)
        expected = x.double() @ weight.double().T
        for added in (bias, residual):
            expected += 0 if added is None else added.double()
        assert close(out, expected)


def activated(x, weight, eps):
    """silu(gate) · up in float64, for a plain weight [gate, up]."""
    x = x.double()
    if eps is not None:
        x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    gate, up = (x @ weight.double().T).chunk(2, -1)
    return gate * gate.sigmoid() * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 17, 64, 65, 300, 1111])
@pytest.mark.parametrize("eps", [None, 1e-6, 3.0])
@pytest.mark.parametrize("way", WAYS)
def test_activation(way, eps, rows, dtype, device, full):
    """Gate and up in turns, of strided rows far from rms 1; the last units fill no tile."""
    if not full and rows > 17:
        pytest.skip("programs are few where they are interpreted")
    if full and dtype == torch.float32 and rows > 64:
        pytest.skip("tiles are for two-byte numbers")
    for size, inputs in ((3072, 1024), (1000, 600)) if full else ((24, 72), (32, 32)):
        x = normal(rows, 2 * inputs, dtype=dtype, device=device)[:, inputs:] * 3
        weight = normal(2 * size, inputs, dtype=dtype, device=device) / (inputs**0.5 if eps is None else 4)
        out = poison(torch.empty(rows + 1, size, dtype=dtype, device=device))
        tile = tile_for(way, dtype, full)
        turned = in_turns(weight, TURNS)
        invariant_linear(x, turned, turns=TURNS, eps=eps, out=out[:rows], tile=tile)
        assert close(out[:rows], activated(x, weight, eps))
        assert out[rows:].isnan().all(), "wrote beyond its rows"


def test_activation_is_that_of_the_kernels_apart(device, full):
    """Within the rounding of what lies between them."""
    size, inputs = (3072, 1024) if full else (32, 64)
    x = normal(5, inputs, dtype=torch.bfloat16, device=device)
    weight = in_turns(normal(2 * size, inputs, dtype=torch.bfloat16, device=device), TURNS)
    apart = silu_mul(invariant_linear(x, weight), turns=TURNS, rms_of=(x, 1e-6))
    assert close(invariant_linear(x, weight, turns=TURNS, eps=1e-6), apart.double(), bound=2e-2)


@pytest.mark.parametrize(("turns", "eps"), [(0, None), (TURNS, None), (TURNS, 1e-6)])
def test_a_row_has_the_same_bits_alone_and_among_any_number(turns, eps, device, full):
    if not full:
        pytest.skip("a property of matrix instructions")
    given = {"turns": turns, "eps": eps}
    for outputs, inputs in ((1024, 3072), (6144, 1024), (1008, 600), (1008, 604)):  # the last by no bulk copy
        weight = normal(outputs, inputs, dtype=torch.bfloat16, device=device)
        x = normal(2000, inputs, dtype=torch.bfloat16, device=device)
        together = invariant_linear(x, weight, **given)
        for rows in (1, 2, 7, 16, 17, 32, 33, 40, 64, 65, 128, 129, 256, 257, 512, 513, 1500):
            first = int(torch.randint(0, 2000 - rows + 1, ()))
            part = invariant_linear(x[first : first + rows], weight, **given)
            assert torch.equal(part, together[first : first + rows]), (outputs, inputs, rows)
