"""Row-wise pieces of a decoder layer: norms, rotary embedding, write into the cache, gated activation."""

import torch
from torch import Tensor

# Rows x, and eps. Where a product's weight has taken in that of a norm before it, what comes of x itself is
# still to be divided by rms(x).
RmsOf = tuple[Tensor, float]

# Gate and up of a feed-forward come all of gate, then all of up, or in turns of so many. In a product by
# matrix instructions with outputs for rows, a thread has outputs 8 apart: with these turns, a unit's two.
TURNS = 8


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight over the last dimension, computed in float32."""
    return torch.rms_norm(x, x.shape[-1:], weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm of the sum, the sum): `residual` + `x` is what the next layer adds to."""
    total = residual + x
    return rms_norm(total, weight, eps), total


def over_rms(x: Tensor, rms_of: RmsOf) -> Tensor:
    """x [rows, n] divided by the rms of the rows of `rms_of`, in float32 and rounded once."""
    rows, eps = rms_of
    return (x.float() * rows.float().square().mean(-1, keepdim=True).add(eps).rsqrt()).to(x.dtype)


def rotary_table(positions: int, head_dim: int, theta: float) -> Tensor:
    """float32 [positions, 2, head_dim]: cosines; sines, those of the lower half negated.

    So that the rotation of x is x · cosines + (x with its halves exchanged) · sines (Su et al. 2021).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), 1.0 / theta**exponents)
    cosines, sines = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cosines, cosines), -1), torch.cat((-sines, sines), -1)), dim=1)


def qk_norm_rope(qkv: Tensor, weight: Tensor, eps: float, rotary: Tensor) -> None:
    """Norm per head and rotation of the first len(weight) heads of `qkv`, in place; the others are values.

    qkv: [rows, heads, head_dim]; weight, rotary: float32 [heads normed, head_dim], [rows, 2, head_dim].
    """
    x = qkv[:, : weight.shape[0]]
    normed = torch.rms_norm(x.float(), x.shape[-1:], None, eps).mul_(weight)
    exchanged = normed.roll(normed.shape[-1] // 2, -1)
    x.copy_(normed.mul_(rotary[:, :1]).add_(exchanged.mul_(rotary[:, 1:])))


def write_kv(kv: Tensor, cache: Tensor, places: Tensor) -> None:
    """Puts keys and values of the first rows of `kv` where they belong; later rows are padding.

    kv: [rows, 2 · kv_heads, head_dim], keys first; cache: [blocks, 2, kv_heads, block_size, head_dim];
    places: int64 [rows without padding · 2 · kv_heads], where in the cache, flattened to vectors.
    """
    size = kv.shape[-1]
    rows = places.shape[0] // kv.shape[1]
    cache.view(-1, size).index_copy_(0, places, kv[:rows].reshape(-1, size))


def in_turns(weight: Tensor, turns: int) -> Tensor:
    """Rows of gate, then of up, [2 · n, inputs] → the same in turns of `turns`, which divides n."""
    units = weight.shape[0] // 2 // turns
    return weight.view(2, units, turns, -1).transpose(0, 1).reshape(weight.shape)


def silu_mul(x: Tensor, turns: int = 0) -> Tensor:
    """silu(gate) · up for [rows, 2·n] → [rows, n]. torch's own has bits that depend on the place.

    `turns`: of gate and up in x; 0 for all of gate, then all of up.
    """
    if turns:
        x = x.view(len(x), -1, 2, turns).transpose(1, 2).reshape(x.shape)
    gate, up = x.chunk(2, dim=-1)
    return torch.div(gate, gate.neg().exp_().add_(1.0)).mul_(up)
