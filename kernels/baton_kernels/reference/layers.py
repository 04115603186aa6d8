"""Row-wise pieces of a decoder layer: norms, rotary embedding, write into the cache, gated activation."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight over the last dimension, in float32; the result has the dtype of `x`."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm of the sum, the sum): `residual` + `x` is what the next layer adds to."""
    total = residual + x
    return rms_norm(total, weight, eps), total


def rotary_table(positions: int, head_dim: int, theta: float) -> Tensor:
    """float32 [positions, 2, head_dim]: cosines and sines (Su et al. 2021, halves rotated, not pairs)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), 1.0 / theta**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return torch.stack((angles.cos(), angles.sin()), dim=1)


def qk_norm_rope(x: Tensor, weight: Tensor, eps: float, rotary: Tensor) -> Tensor:
    """Norm per head, then rotation. x: [rows, heads, head_dim]; rotary: [rows, 2, head_dim]."""
    x = rms_norm(x, weight, eps)
    cosines, sines = rotary[:, :1], rotary[:, 1:]
    low, high = x.chunk(2, dim=-1)
    rotated = torch.cat((-high, low), dim=-1)
    return (x * cosines + rotated * sines).to(x.dtype)


def write_kv(x: Tensor, cache: Tensor, blocks: Tensor, offsets: Tensor) -> None:
    """Puts keys or values of the first len(blocks) rows of `x` where they belong; later rows are padding.

    x: [rows, kv_heads, head_dim]; cache: [blocks, kv_heads, block_size, head_dim].
    """
    cache[blocks, :, offsets] = x[: len(blocks)]


def silu_mul(x: Tensor) -> Tensor:
    """silu(gate) · up for [rows, 2·n] → [rows, n]. torch's own has bits that depend on the place."""
    gate, up = x.chunk(2, dim=-1)
    return gate / (1.0 + torch.exp(-gate.contiguous())) * up
