"""Norm of query and key heads, rotary embedding and the write into the paged cache, in one kernel.

Twins: `reference.qk_norm_rope`, `reference.write_kv`. The cache of a layer is two tensors
[blocks, kv_heads, block_size, head_dim]: a head's positions in a block are contiguous.
A place is block · block_size + offset in the block, int32; -1 stands for "nowhere" and skips the write.
"""

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton_kernels.launch import dependent, wait_upstream

_HEADS_PER_PROGRAM = 8


@triton.jit
def _norm_rope(low, high, weight_ptr, angle_ptr, eps, half, HALF: tl.constexpr):
    """Both halves of heads [heads, HALF] after norm and rotation, float32."""
    inside = half < HALF
    low, high = low.to(tl.float32), high.to(tl.float32)
    squares = tl.sum(low * low, 1) + tl.sum(high * high, 1)
    scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
    low_weight = tl.load(weight_ptr + half, mask=inside, other=0.0).to(tl.float32)
    high_weight = tl.load(weight_ptr + HALF + half, mask=inside, other=0.0).to(tl.float32)
    low, high = low * scale * low_weight, high * scale * high_weight
    cosine = tl.load(angle_ptr + half, mask=inside, other=0.0)
    sine = tl.load(angle_ptr + 3 * HALF + half, mask=inside, other=0.0)
    return low * cosine - high * sine, high * cosine + low * sine


@triton.jit
def _store_halves(target, low, high, mask, HALF: tl.constexpr):
    tl.store(target, low.to(target.dtype.element_ty), mask=mask)
    tl.store(target + HALF, high.to(target.dtype.element_ty), mask=mask)


@triton.jit
def qk_rope_kv_kernel(
    qkv_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    q_weight_ptr,
    k_weight_ptr,
    rotary_ptr,
    position_ptr,
    place_ptr,
    qkv_stride,
    block_stride,
    head_stride,
    token_stride,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STEP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (row, STEP heads of one kind): queries go to `q`, keys and values to the cache."""
    HEAD_DIM: tl.constexpr = 2 * HALF
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * STEP
    head = tl.arange(0, STEP)[:, None]
    half = tl.arange(0, HALF_PADDED)[None, :]
    inside = (half < HALF) & (head < STEP)
    wait_upstream(PDL)
    place = tl.load(place_ptr + row)
    angle_ptr = rotary_ptr + tl.load(position_ptr + row).to(tl.int64) * (2 * HEAD_DIM)
    source = qkv_ptr + row * qkv_stride + (first + head) * HEAD_DIM + half
    low = tl.load(source, mask=inside, other=0.0)
    high = tl.load(source + HALF, mask=inside, other=0.0)
    block, offset = (place // BLOCK_SIZE).to(tl.int64), place % BLOCK_SIZE
    cached = block * block_stride + offset * token_stride + half
    written = inside & (half < tl.where(place >= 0, HALF, 0))
    if first < HEADS:
        q_low, q_high = _norm_rope(low, high, q_weight_ptr, angle_ptr, eps, half, HALF)
        _store_halves(q_ptr + (row * HEADS + first + head) * HEAD_DIM + half, q_low, q_high, inside, HALF)
    elif first < HEADS + KV_HEADS:
        k_low, k_high = _norm_rope(low, high, k_weight_ptr, angle_ptr, eps, half, HALF)
        _store_halves(k_ptr + cached + (first - HEADS + head) * head_stride, k_low, k_high, written, HALF)
    else:
        v_head = first - HEADS - KV_HEADS + head
        _store_halves(v_ptr + cached + v_head * head_stride, low, high, written, HALF)


def qk_rope_kv(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    rotary: Tensor,
    positions: Tensor,
    places: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """Queries [rows, heads, head_dim], normed and rotated; keys and values are in the cache afterwards.

    qkv: [rows, (heads + 2 · kv_heads) · head_dim], the merged projection's output, rows may be strided;
    rotary: float32 [max positions, 2, head_dim], as `reference.rotary_table`; positions, places: integers
    [rows]; keys, values: [blocks, kv_heads, block_size, head_dim].
    """
    rows = qkv.shape[0]
    _, kv_heads, block_size, head_dim = keys.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    assert keys.stride() == values.stride() and keys.stride(3) == 1
    out = torch.empty((rows, heads, head_dim), dtype=qkv.dtype, device=qkv.device) if out is None else out
    step = gcd(heads, kv_heads, _HEADS_PER_PROGRAM)
    pdl = dependent(pdl, qkv.device)
    qk_rope_kv_kernel[(rows, (heads + 2 * kv_heads) // step)](
        qkv,
        out,
        keys,
        values,
        q_weight,
        k_weight,
        rotary,
        positions,
        places,
        qkv.stride(0),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=head_dim // 2,
        HALF_PADDED=triton.next_power_of_2(head_dim // 2),
        BLOCK_SIZE=block_size,
        STEP=step,
        PDL=pdl,
        num_warps=4 if step >= 4 else 1,
        **({"launch_pdl": True} if pdl else {}),
    )
    return out
