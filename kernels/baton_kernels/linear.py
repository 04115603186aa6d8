"""Products of one or two rows with a weight, where reading the weight is all the time: y = x · weightᵀ.

A program reads its rows of the weight whole, with every load in flight before anything else is asked for.
Fusions: silu(gate) · up of x before, addition of a residual after, all in float32 and rounded once. Each
program does the activation again for itself, while its weights are on the way. The order of a row's sum
depends on nothing but the shape of the weight. With more rows multiplying takes longer than reading.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton_kernels.launch import dependent, let_downstream, wait_upstream
from baton_kernels.reference import RmsOf
from baton_kernels.rms_norm import inverse_rms
from baton_kernels.silu_mul import gate_column

MAX_ROWS = 2  # beyond, multiplying and adding takes longer than reading


@dataclass(frozen=True, slots=True)
class LinearTile:
    """Outputs of a program, inputs at a time (a power of two), warps."""

    outputs: int
    inputs: int
    warps: int


def linear_tile(inputs: int) -> LinearTile:
    """What a program takes on: enough loads in flight, and enough programs for narrow products."""
    at_a_time = min(triton.next_power_of_2(inputs), 4096)
    return LinearTile(max(1, 8192 // at_a_time), at_a_time, 4)


@triton.jit
def _inputs(
    row_ptr,
    unit,
    column,
    INPUTS: tl.constexpr,
    SILU: tl.constexpr,
    TURNS: tl.constexpr,
):
    """x of a row at `column` after what comes before the product, float32."""
    mask = column < INPUTS
    if not SILU:
        return tl.load(row_ptr + column, mask=mask, other=0.0).to(tl.float32)
    row_ptr += gate_column(column, TURNS)
    gate = tl.load(row_ptr, mask=mask, other=0.0).to(tl.float32) * unit
    up = tl.load(row_ptr + (TURNS if TURNS > 0 else INPUTS), mask=mask, other=0.0).to(tl.float32) * unit
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def linear_kernel(
    x_ptr,
    weight_ptr,
    rms_ptr,
    residual_ptr,
    out_ptr,
    x_stride,
    rms_stride,
    outputs,
    eps,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    SILU: tl.constexpr,
    TURNS: tl.constexpr,
    RMS_SIZE: tl.constexpr,
    RMS_PADDED: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program: BLOCK_OUT outputs of ROWS rows.

    RMS_SIZE: length of a row of what x is still to be divided by the rms of; 0 for nothing.
    """
    output = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = output < outputs
    weight_ptr += output.to(tl.int64)[:, None] * INPUTS
    column = tl.arange(0, BLOCK_IN)
    full = inside[:, None] & (column < INPUTS)[None, :]
    first = tl.load(weight_ptr + column[None, :], mask=full, other=0.0).to(tl.float32)
    let_downstream(PDL)
    wait_upstream(PDL)
    for row in tl.static_range(ROWS):
        row_ptr, unit = x_ptr + row * x_stride, 1.0
        if RMS_SIZE > 0:
            unit = inverse_rms(rms_ptr, row, rms_stride, eps, RMS_SIZE, RMS_PADDED)
        x = _inputs(row_ptr, unit, column, INPUTS, SILU, TURNS)
        products = first * x[None, :]
        for start in tl.static_range(BLOCK_IN, INPUTS, BLOCK_IN):
            later = start + column
            full = inside[:, None] & (later < INPUTS)[None, :]
            weight = tl.load(weight_ptr + later[None, :], mask=full, other=0.0).to(tl.float32)
            x = _inputs(row_ptr, unit, later, INPUTS, SILU, TURNS)
            products += weight * x[None, :]
        total = tl.sum(products, 1)
        if ADD:
            total += tl.load(residual_ptr + row * outputs + output, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * outputs + output, total.to(out_ptr.dtype.element_ty), mask=inside)


def linear(
    x: Tensor,
    weight: Tensor,
    *,
    silu: bool = False,
    turns: int = 0,
    rms_of: RmsOf | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    tile: LinearTile | None = None,
    pdl: bool = False,
) -> Tensor:
    """[rows, outputs] = before(x) · weightᵀ (+ residual) for weight [outputs, inputs], both contiguous.

    x: [rows, inputs], or [rows, 2 · inputs] with `silu`, at most MAX_ROWS rows, which may be strided;
    only with `silu`: `turns` of gate and up in x (0, or a divisor of inputs), and `rms_of`, by the rms of
    whose rows x is first divided; residual: [rows, outputs], contiguous, may be the same as `out` where it is
    not what `rms_of` names.
    """
    rows, (outputs, inputs) = x.shape[0], weight.shape
    assert rows <= MAX_ROWS and weight.is_contiguous() and x.shape[1] == inputs * (1 + silu)
    assert silu or (rms_of is None and not turns)
    assert not turns or inputs % turns == 0
    tile = tile or linear_tile(inputs)
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device) if out is None else out
    divisor, eps = rms_of or (x, 0.0)
    pdl = dependent(pdl, x.device)
    linear_kernel[(triton.cdiv(outputs, tile.outputs),)](
        x,
        weight,
        divisor,
        out if residual is None else residual,
        out,
        x.stride(0),
        divisor.stride(0),
        outputs,
        eps,
        ROWS=rows,
        INPUTS=inputs,
        BLOCK_OUT=tile.outputs,
        BLOCK_IN=tile.inputs,
        SILU=silu,
        TURNS=turns,
        RMS_SIZE=0 if rms_of is None else divisor.shape[1],
        RMS_PADDED=triton.next_power_of_2(divisor.shape[1]),
        ADD=residual is not None,
        PDL=pdl,
        num_warps=tile.warps,
        **({"launch_pdl": True} if pdl else {}),
    )
    return out
