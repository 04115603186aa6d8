"""silu(gate) · up of the merged projection's output. Twins: `reference.silu_mul`, `over_rms` before it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton_kernels.launch import dependent, let_downstream, wait_upstream
from baton_kernels.reference import RmsOf
from baton_kernels.rms_norm import inverse_rms

_BLOCK = 1024
_MANY_ROWS = 1024  # from here on a row is one program's, which finds its rms once


@triton.jit
def gate_column(column, TURNS: tl.constexpr):
    """Where the gate of a column of the result is; its up is TURNS beyond, or all gates where that is 0."""
    return column if TURNS == 0 else column + column // TURNS * TURNS


@triton.jit
def silu_mul_kernel(
    x_ptr,
    out_ptr,
    rms_ptr,
    size,
    rms_stride,
    eps,
    TURNS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    RMS_SIZE: tl.constexpr,
    RMS_PADDED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (row, BLOCKS blocks of columns). x: [rows, 2 · size], out: [rows, size], both contiguous.

    RMS_SIZE: length of a row of what x is still to be divided by the rms of; 0 for nothing.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * 2 * size
    let_downstream(PDL)
    wait_upstream(PDL)
    if RMS_SIZE > 0:
        unit = inverse_rms(rms_ptr, row, rms_stride, eps, RMS_SIZE, RMS_PADDED)
    for block in tl.static_range(BLOCKS):
        column = (tl.program_id(1) * BLOCKS + block) * BLOCK + tl.arange(0, BLOCK)
        inside = column < size
        gate_ptr = x_ptr + gate_column(column, TURNS)
        gate = tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_ptr + (TURNS if TURNS > 0 else size), mask=inside, other=0.0).to(tl.float32)
        if RMS_SIZE > 0:
            gate, up = gate * unit, up * unit
        out = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(out_ptr + row * size + column, out.to(out_ptr.dtype.element_ty), mask=inside)


def silu_mul(
    x: Tensor,
    *,
    turns: int = 0,
    rms_of: RmsOf | None = None,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """[rows, 2 · size] → [rows, size], computed in float32 and rounded once.

    `turns`: of gate and up in x, 0 or a divisor of size; `rms_of`: x is first divided by the rms of those
    rows.
    """
    rows, size = x.shape[0], x.shape[1] // 2
    assert x.is_contiguous() and (not turns or size % turns == 0)
    out = torch.empty((rows, size), dtype=x.dtype, device=x.device) if out is None else out
    pdl = dependent(pdl, x.device)
    blocks = triton.cdiv(size, _BLOCK)
    blocks_each = blocks if rows >= _MANY_ROWS else 1
    divisor, eps = rms_of or (x, 0.0)
    silu_mul_kernel[(rows, triton.cdiv(blocks, blocks_each))](
        x,
        out,
        divisor,
        size,
        divisor.stride(0),
        eps,
        TURNS=turns,
        BLOCK=_BLOCK,
        BLOCKS=blocks_each,
        RMS_SIZE=0 if rms_of is None else divisor.shape[1],
        RMS_PADDED=triton.next_power_of_2(divisor.shape[1]),
        PDL=pdl,
        num_warps=4,
        **({"launch_pdl": True} if pdl else {}),
    )
    return out
