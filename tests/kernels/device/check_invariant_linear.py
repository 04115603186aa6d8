"""Products whose rows keep their bits in any company: against float64, and against themselves."""

import pytest
import torch

from baton_kernels.invariant_linear import InvariantTile, invariant_linear
from tests.kernels.numbers import DTYPES, close, normal, poison

SMALL = InvariantTile(32, 16, 16, 4, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 17, 64, 65, 300, 1111])
def test_against_float64(rows, dtype, device, full):
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
        tile = None if full and dtype != torch.float32 else SMALL
        invariant_linear(x, weight, bias, residual=residual, out=out, tile=tile)
        expected = x.double() @ weight.double().T
        for added in (bias, residual):
            expected += 0 if added is None else added.double()
        assert close(out, expected)


def test_a_row_has_the_same_bits_alone_and_among_any_number(device, full):
    if not full:
        pytest.skip("a property of matrix instructions")
    for outputs, inputs in ((1024, 3072), (6144, 1024), (1000, 600)):
        weight = normal(outputs, inputs, dtype=torch.bfloat16, device=device)
        x = normal(2000, inputs, dtype=torch.bfloat16, device=device)
        together = invariant_linear(x, weight)
        for rows in (1, 2, 7, 16, 17, 40, 64, 65, 128, 256, 257, 512, 513, 1500):
            first = int(torch.randint(0, 2000 - rows + 1, ()))
            part = invariant_linear(x[first : first + rows], weight)
            assert torch.equal(part, together[first : first + rows]), (outputs, inputs, rows)
