"""Products with weights of few outputs, which are read before x is there: against float64."""

import pytest
import torch

from baton_kernels import narrow_linear as module
from baton_kernels.narrow_linear import NarrowTile, narrow_linear, narrow_tile
from tests.kernels.numbers import DTYPES, close, normal, poison

# (outputs, inputs): those of production; outputs that no tile divides, several steps, few warps and many
FULL = [(1024, 2048), (1024, 3072), (2048, 2048), (1000, 1920), (1090, 1280)]
SMALL = [(24, 256), (21, 384), (1027, 256)]


def product(rows, outputs, inputs, dtype, device, **given):
    """(what the kernel writes into poisoned rows, float64) for x with strided rows."""
    x = normal(rows, 2 * inputs, dtype=dtype, device=device)[:, inputs:]
    weight = normal(outputs, inputs, dtype=dtype, device=device)
    residual = normal(rows, outputs, dtype=dtype, device=device) if rows % 2 else None
    out = poison(torch.empty(rows + 1, outputs, dtype=dtype, device=device))
    narrow_linear(x, weight, residual=residual, out=out[:rows], **given)
    assert out[rows:].isnan().all(), "wrote beyond its rows"
    expected = x.double() @ weight.double().T
    return out[:rows], expected if residual is None else expected + residual.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 4, 8, 11, 16])
def test_against_float64(rows, dtype, device, full):
    if full and dtype == torch.float32:
        pytest.skip("tiles are for two-byte numbers")
    for outputs, inputs in FULL if full else SMALL[rows % 3 :][:1]:
        assert close(*product(rows, outputs, inputs, dtype, device))


@pytest.mark.parametrize("tile", [NarrowTile(16, 4, 32), NarrowTile(8, 8, 16)])
def test_other_tiles(tile, device):
    assert close(*product(5, 40, 384, torch.bfloat16, device, tile=tile))


def test_the_residual_may_be_what_is_written(device, full):
    outputs, inputs = FULL[0] if full else SMALL[0]
    x, weight = (normal(n, inputs, dtype=torch.bfloat16, device=device) for n in (7, outputs))
    residual = normal(7, outputs, dtype=torch.bfloat16, device=device)
    expected = x.double() @ weight.double().T + residual.double()
    assert narrow_linear(x, weight, residual=residual, out=residual) is residual
    assert close(residual, expected)


def test_a_row_has_the_same_bits_in_any_number(device, full):
    outputs, inputs = FULL[1] if full else SMALL[0]
    x, weight = (normal(n, inputs, dtype=torch.bfloat16, device=device) for n in (16, outputs))
    together = narrow_linear(x, weight)
    for rows in (1, 3, 8, 15):
        assert torch.equal(narrow_linear(x[-rows:], weight), together[-rows:])


@pytest.mark.parametrize(
    ("outputs", "inputs", "served"),
    [
        (1024, 2048, True),
        (1024, 3072, True),
        (2048, 2048, True),
        (1024, 4096, False),  # does not fit into shared memory beside x
        (2048, 6144, False),
        (4096, 1024, False),  # too many outputs
        (1024, 2000, False),  # no whole number of steps
        (1024, 100, False),
    ],
)
def test_which_weights_are_served(outputs, inputs, served, monkeypatch):
    weight = torch.empty(outputs, inputs, dtype=torch.bfloat16)
    assert (narrow_tile(outputs, inputs) is not None) == served
    assert module.serves(weight) == served
    monkeypatch.setattr(module, "machine", lambda _: (80, 108))
    assert not module.serves(weight)


def test_what_is_not_served_is_refused(device):
    x, weight = (normal(n, 100, device=device) for n in (3, 20))
    with pytest.raises(AssertionError, match="serves"):
        narrow_linear(x, weight)
