"""Norm of query and key heads, rotary embedding and the write into the paged cache, in one kernel.

Twins: `reference.qk_norm_rope`, `reference.write_kv`. The cache of a layer is two tensors
[blocks, kv_heads, block_size, head_dim], the reference's layout: a head's positions in a block are contiguous.
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
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * STEP
    head = tl.arange(0, STEP)[:, None]
    half = tl.arange(0, HALF_PADDED)[None, :]
    inside = (half < HALF) & (head < STEP)
    wait_upstream(PDL)
    place = tl.load(place_ptr + row)
    source = qkv_ptr + row * qkv_stride + (first + head) * (2 * HALF) + half
    low = tl.load(source, mask=inside, other=0.0)
    high = tl.load(source + HALF, mask=inside, other=0.0)
    dtype = q_ptr.dtype.element_ty
    block, offset = (place // BLOCK_SIZE).to(tl.int64), place % BLOCK_SIZE
    to_cache = block * block_stride + offset * token_stride + half
    written = inside & (place >= 0)
    if first >= HEADS + KV_HEADS:
        target = v_ptr + to_cache + (first - HEADS - KV_HEADS + head) * head_stride
        tl.store(target, low.to(v_ptr.dtype.element_ty), mask=written)
        tl.store(target + HALF, high.to(v_ptr.dtype.element_ty), mask=written)
    else:
        is_query = first < HEADS
        weight_ptr = q_weight_ptr if is_query else k_weight_ptr
        low, high = low.to(tl.float32), high.to(tl.float32)
        squares = tl.sum(low * low, 1) + tl.sum(high * high, 1)
        scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
        low_weight = tl.load(weight_ptr + half, mask=half < HALF, other=0.0).to(tl.float32)
        high_weight = tl.load(weight_ptr + HALF + half, mask=half < HALF, other=0.0).to(tl.float32)
        low = ((low * scale).to(dtype).to(tl.float32) * low_weight).to(dtype).to(tl.float32)
        high = ((high * scale).to(dtype).to(tl.float32) * high_weight).to(dtype).to(tl.float32)
        angle = rotary_ptr + tl.load(position_ptr + row).to(tl.int64) * (4 * HALF) + half
        cosine = tl.load(angle, mask=half < HALF, other=0.0)
        sine = tl.load(angle + 2 * HALF, mask=half < HALF, other=0.0)
        new_low, new_high = low * cosine - high * sine, high * cosine + low * sine
        if is_query:
            target = q_ptr + row * (HEADS * 2 * HALF) + (first + head) * (2 * HALF) + half
            tl.store(target, new_low.to(dtype), mask=inside)
            tl.store(target + HALF, new_high.to(dtype), mask=inside)
        else:
            target = k_ptr + to_cache + (first - HEADS + head) * head_stride
            tl.store(target, new_low.to(k_ptr.dtype.element_ty), mask=written)
            tl.store(target + HALF, new_high.to(k_ptr.dtype.element_ty), mask=written)


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
    rotary: float32 [max positions, 2, head_dim]; positions, places: integers [rows];
    keys, values: [blocks, kv_heads, block_size, head_dim].
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
