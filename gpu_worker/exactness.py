"""Self-test at start: does a row of a matrix product have the same bits however many rows there are?

Batch invariance rests on it. Libraries pick other code for other numbers of rows; which numbers are safe is a
fact of this machine, its library and its thread count, so it is measured with the model's own layers.
"""

import torch
from torch import Tensor

from gpu_worker.layers.linear import Head, Linear
from gpu_worker.layers.parts import Layer, walk

MULTIPLES = (4, 8, 16, 32, 64)
_FEW = 16  # numbers of rows tried one by one, in multiples; then these:
_MANY = (19, 25, 32, 50, 64, 128)
_MOST_ROWS = 512  # what larger numbers would show is not worth the time to start
_LEAST_ROWS = 64  # tried whatever a step can have: workers of other limits are to find the same multiple


def fix_rows(model: Layer) -> None:
    """Makes layers that have a choice compute a row in the same way whatever the number of rows."""
    for _, layer in walk(model):
        layer.fix_rows()


@torch.inference_mode()
def row_multiple(model: Layer, max_rows: int, max_samples: int) -> int | None:
    """The least of MULTIPLES for which the model's linear layers are exact, None where there is none.

    `max_rows`, `max_samples`: rows that a step can have before, and in, the head.
    """
    layers = {(x.shape, x.bias is None): x for _, x in walk(model) if isinstance(x, Linear)}
    limits = [(x, max_samples if isinstance(x, Head) else max_rows) for x in layers.values()]
    return next((m for m in MULTIPLES if all(_is_exact(x, m, limit) for x, limit in limits)), None)


@torch.inference_mode()
def batched_is_exact(heads: int, head_dim: int, chunk: int, multiple: int) -> bool:
    """Whether attention's batched products are exact, whatever the number of tiles and their height.

    `heads`: products of one tile; `chunk`: keys of one; `multiple`: of rows.
    """
    random = torch.Generator().manual_seed(1)
    for inner, outer in ((head_dim, chunk), (chunk, head_dim)):
        a = torch.randn(6 * heads, 8 * multiple, inner, generator=random)
        b = torch.randn(6 * heads, outer, inner, generator=random).transpose(1, 2)
        few = torch.bmm(a[:1, :multiple], b[:1])
        for rows in range(multiple, a.shape[1] + 1, multiple):
            for batch in {1, heads, 3 * heads, 6 * heads}:
                if not torch.equal(torch.bmm(a[:batch, :rows].contiguous(), b[:batch])[:1, :multiple], few):
                    return False
    return True


def _is_exact(layer: Linear, multiple: int, limit: int) -> bool:
    """Whether rows keep their bits in all tried batches, at the front and at the back."""
    random = torch.Generator().manual_seed(1)
    most = max(_LEAST_ROWS, min(limit, _MOST_ROWS))
    sizes = [n * multiple for n in (*range(1, _FEW + 1), *_MANY) if n * multiple <= most]
    x = torch.randn(sizes[-1], layer.shape[1], generator=random).to(layer.dtype)
    few: Tensor = layer(x[:multiple])
    for size in sizes[1:]:
        front = layer(x[:size])[:multiple]
        back = layer(x[:size].roll(size - multiple, dims=0))[size - multiple :]
        if not torch.equal(front, few) or not torch.equal(back, few):
            return False
    return True
