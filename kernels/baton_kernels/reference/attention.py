"""Attention of one tile of query rows over one chunk of keys at a time, folded in the order of positions.

A chunk is CHUNK positions, at multiples of CHUNK in the sequence; a row folds chunks 0, 1, 2 … up to its own
position. Neither the tile a row is in, nor how its keys came into the cache, nor the batch changes that
order, hence not the row's bits. Online softmax after Milakov and Gimelshein (2018).
"""

import torch
from torch import Tensor

CHUNK = 128
_NOTHING = -1e30  # maximum of a row that sees nothing of a chunk: finite, so that differences are numbers

Partial = tuple[Tensor, Tensor, Tensor]


def attend(queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None) -> Partial:
    """One chunk for every tile: (weighted values, sum of weights, maximum), not yet normalised.

    queries: [tiles · kv_heads, m, head_dim], scaled; keys, values: [tiles · kv_heads, c, head_dim], values
    finite; hidden: bool [tiles, 1, m or 1, c], true where a row may not look, None for nowhere. Returns
    [tiles · kv_heads, m, head_dim], [tiles · kv_heads, m, 1] twice.
    """
    scores = torch.bmm(queries, keys.transpose(1, 2))
    if hidden is not None:
        scores.view(hidden.shape[0], -1, *scores.shape[1:]).masked_fill_(hidden, -torch.inf)
    maximum = scores.amax(-1, keepdim=True).clamp_min_(_NOTHING)
    weights = scores.sub_(maximum).exp_()
    return torch.bmm(weights, values), weights.sum(-1, keepdim=True), maximum


def fold(running: Partial, chunk: Partial) -> None:
    """Takes the next chunk, as `attend` returned it, into the running three, in place; consumes the chunk."""
    out, total, maximum = running
    chunk_out, chunk_total, chunk_maximum = chunk
    highest = torch.maximum(maximum, chunk_maximum)
    keep = maximum.sub_(highest).exp_()
    take = chunk_maximum.sub_(highest).exp_()
    out.mul_(keep).add_(chunk_out.mul_(take))
    total.mul_(keep).add_(chunk_total.mul_(take))
    maximum.copy_(highest)
