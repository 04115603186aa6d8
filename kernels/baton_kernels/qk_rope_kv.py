"""Norm of query and key heads, rotary embedding and the write into the paged cache, in one kernel.

Twins: `reference.qk_norm_rope`, `write_kv`, and `over_rms` before them. The cache of a layer is two tensors
[blocks, kv_heads, block_size, head_dim]: a head's positions in a block are contiguous.
A place is block · block_size + offset in the block, int32; -1 stands for "nowhere" and skips the write.
Values are written as finite numbers, whatever they are: attention reads tiles beyond a sequence's end, with
weight 0, and nothing there may turn that into NaN. What has gone wrong still shows: where a head's value is
not finite its key is written as NaN.
"""

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton_kernels.launch import dependent, let_downstream, wait_upstream
from baton_kernels.reference import RmsOf
from baton_kernels.rms_norm import inverse_rms

_HEADS_TOGETHER = 8
_MANY_ROWS = 1024  # from here on a row is one program's, which finds its rms once


@triton.jit
def _halves(line_ptr, half, inside, APART: tl.constexpr):
    """Both halves of a line [1, HALF], APART from each other, float32."""
    low = tl.load(line_ptr + half, mask=inside, other=0.0).to(tl.float32)
    return low, tl.load(line_ptr + APART + half, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _norm_rope(low, high, low_weight, high_weight, cosine, sine, eps, HALF: tl.constexpr):
    """Both halves of heads [heads, HALF] after norm and rotation, float32."""
    squares = tl.sum(low * low, 1) + tl.sum(high * high, 1)
    scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
    low, high = low * scale * low_weight, high * scale * high_weight
    return low * cosine - high * sine, high * cosine + low * sine


@triton.jit
def _finite(x, largest):
    """x within what the cache can hold; 0 for what is no number."""
    return tl.where(x == x, tl.minimum(tl.maximum(x, -largest), largest), 0.0)


@triton.jit
def _is_sound(low, high, largest):
    """Whether both halves of heads [heads, HALF] are what the cache can hold, [heads, 1]."""
    sound = (tl.abs(low) <= largest) & (tl.abs(high) <= largest)  # not so for what is no number
    return tl.min(sound.to(tl.int32), 1, keep_dims=True) > 0


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
    rms_ptr,
    qkv_stride,
    block_stride,
    head_stride,
    token_stride,
    rms_stride,
    eps,
    rms_eps,
    largest,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STEP: tl.constexpr,
    STEPS: tl.constexpr,
    RMS_SIZE: tl.constexpr,
    RMS_PADDED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (row, STEPS times STEP heads of one kind): queries go to `q`, keys and values to the cache.

    RMS_SIZE: length of a row of what `qkv` is still to be divided by the rms of; 0 for nothing.
    """
    HEAD_DIM: tl.constexpr = 2 * HALF
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, STEP)[:, None]
    half = tl.arange(0, HALF_PADDED)[None, :]
    inside = (half < HALF) & (head < STEP)
    let_downstream(PDL)
    # these are older than any chain of early launches, so they need not be waited for
    place = tl.load(place_ptr + row)
    angle_ptr = rotary_ptr + tl.load(position_ptr + row).to(tl.int64) * (2 * HEAD_DIM)
    cosine, sine = _halves(angle_ptr, half, half < HALF, 3 * HALF)
    q_weights = _halves(q_weight_ptr, half, half < HALF, HALF)
    k_weights = _halves(k_weight_ptr, half, half < HALF, HALF)
    wait_upstream(PDL)
    block, offset = (place // BLOCK_SIZE).to(tl.int64), place % BLOCK_SIZE
    cached = block * block_stride + offset * token_stride + half
    written = inside & (half < tl.where(place >= 0, HALF, 0))
    if RMS_SIZE > 0:
        unit = inverse_rms(rms_ptr, row, rms_stride, rms_eps, RMS_SIZE, RMS_PADDED)
    for step in tl.static_range(STEPS):
        first = (tl.program_id(1) * STEPS + step) * STEP
        source = qkv_ptr + row * qkv_stride + (first + head) * HEAD_DIM + half
        low = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
        if RMS_SIZE > 0:
            low, high = low * unit, high * unit
        if first < HEADS:
            q_low, q_high = _norm_rope(low, high, *q_weights, cosine, sine, eps, HALF)
            target = q_ptr + (row * HEADS + first + head) * HEAD_DIM + half
            _store_halves(target, q_low, q_high, inside, HALF)
        elif first < HEADS + KV_HEADS:
            k_low, k_high = _norm_rope(low, high, *k_weights, cosine, sine, eps, HALF)
            value = source + KV_HEADS * HEAD_DIM
            low = tl.load(value, mask=inside, other=0.0).to(tl.float32)
            high = tl.load(value + HALF, mask=inside, other=0.0).to(tl.float32)
            if RMS_SIZE > 0:
                low, high = low * unit, high * unit
            sound = _is_sound(low, high, largest)
            k_low, k_high = tl.where(sound, k_low, float("nan")), tl.where(sound, k_high, float("nan"))
            target = k_ptr + cached + (first - HEADS + head) * head_stride
            _store_halves(target, k_low, k_high, written, HALF)
        else:
            target = v_ptr + cached + (first - HEADS - KV_HEADS + head) * head_stride
            _store_halves(target, _finite(low, largest), _finite(high, largest), written, HALF)


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
    rms_of: RmsOf | None = None,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """Queries [rows, heads, head_dim], normed and rotated; keys and values are in the cache afterwards.

    qkv: [rows, (heads + 2 · kv_heads) · head_dim], the merged projection's output, rows may be strided;
    `rms_of`: it is first divided by the rms of those rows; rotary: float32 [max positions, 2, head_dim], as
    `reference.rotary_table`; positions, places: integers [rows]; keys, values: [blocks, kv_heads, block_size,
    head_dim].
    With `pdl`, an ordinary launch lies between what wrote positions, places, rotary or weights and this one.
    """
    rows = qkv.shape[0]
    _, kv_heads, block_size, head_dim = keys.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    assert keys.stride() == values.stride() and keys.stride(3) == 1
    out = torch.empty((rows, heads, head_dim), dtype=qkv.dtype, device=qkv.device) if out is None else out
    step = gcd(heads, kv_heads, _HEADS_TOGETHER)
    steps = (heads + 2 * kv_heads) // step
    steps_each = steps if rows >= _MANY_ROWS else 1
    divisor, rms_eps = rms_of or (qkv, 0.0)
    pdl = dependent(pdl, qkv.device)
    qk_rope_kv_kernel[(rows, steps // steps_each)](
        qkv,
        out,
        keys,
        values,
        q_weight,
        k_weight,
        rotary,
        positions,
        places,
        divisor,
        qkv.stride(0),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        divisor.stride(0),
        eps,
        rms_eps,
        torch.finfo(values.dtype).max,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=head_dim // 2,
        HALF_PADDED=triton.next_power_of_2(head_dim // 2),
        BLOCK_SIZE=block_size,
        STEP=step,
        STEPS=steps_each,
        RMS_SIZE=0 if rms_of is None else divisor.shape[1],
        RMS_PADDED=triton.next_power_of_2(divisor.shape[1]),
        PDL=pdl,
        num_warps=4 if step >= 4 else 1,
        **({"launch_pdl": True} if pdl else {}),
    )
    return out
