"""Self-test at start: does a row of a matrix product have the same bits however many rows there are?

Batch invariance rests on it. Libraries pick other code for other numbers of rows; which numbers are safe is a
fact of this machine, its library and its thread count, so it is measured with the model's own layers.
"""

import torch
from torch import Tensor, nn

from gpu_worker.layers.linear import Head, Linear

MULTIPLES = (8, 16, 32, 64)
_ROWS = (1, 2, 3, 4, 5, 7, 8, 13, 16, 32)  # times the multiple


@torch.inference_mode()
def row_multiple(model: nn.Module, max_rows: int, max_samples: int) -> int | None:
    """The least of MULTIPLES for which the layers are exact, None where there is none.

    `max_rows`, `max_samples`: rows that a step can have before, and in, the head.
    """
    layers = {
        (layer.shape, layer.bias is None): layer for layer in model.modules() if isinstance(layer, Linear)
    }
    for multiple in MULTIPLES:
        if all(_exact(layer, multiple, _limit(layer, max_rows, max_samples)) for layer in layers.values()):
            return multiple
    return None


def _limit(layer: Linear, max_rows: int, max_samples: int) -> int:
    return max_samples if isinstance(layer, Head) else max_rows


def _exact(layer: Linear, multiple: int, limit: int) -> bool:
    """Whether rows keep their bits in all tried batches up to `limit`, at the front and at the back."""
    random = torch.Generator().manual_seed(1)
    sizes = [n * multiple for n in _ROWS if n == 1 or n * multiple <= max(limit, multiple)]
    x = torch.randn(sizes[-1], layer.shape[1], generator=random).to(layer.dtype)
    few: Tensor = layer(x[:multiple])
    for size in sizes[1:]:
        many = layer(x[:size])
        moved = layer(x[:size].roll(size - multiple, dims=0))
        if not torch.equal(many[:multiple], few) or not torch.equal(moved[size - multiple :], few):
            return False
    return True
