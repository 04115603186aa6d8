"""Products of one or two rows with a weight, where reading the weight is all the time: y = x · weightᵀ.

A program reads its rows of the weight whole, with every load in flight before anything else is asked for.
Fusions: RMSNorm of x before, silu(gate) · up of x before, addition of a residual after, all in float32 and
rounded once. Each program does the norm and the activation again for itself, while its weights are on the
way. The order of a row's sum depends on nothing but the shape of the weight. For more rows the library is
faster.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton_kernels.launch import dependent, wait_upstream

MAX_ROWS = 2  # beyond, multiplying and adding takes longer than reading
PLAIN, NORM, SILU = 0, 1, 2
_NORM, _SILU = tl.constexpr(NORM), tl.constexpr(SILU)


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
    x_ptr,
    norm_ptr,
    row,
    column,
    mask,
    x_stride,
    eps,
    INPUTS: tl.constexpr,
    BEFORE: tl.constexpr,
):
    """x of a row at `column` after what comes before the product, float32."""
    source = x_ptr + row * x_stride + column
    x = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    if BEFORE == _SILU:
        up = tl.load(source + INPUTS, mask=mask, other=0.0).to(tl.float32)
        x = x / (1.0 + tl.exp(-x)) * up
    if BEFORE == _NORM:
        weight = tl.load(norm_ptr + column, mask=column < INPUTS, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 0) / INPUTS + eps)
        x = x * scale * weight
    return x


@triton.jit
def linear_kernel(
    x_ptr,
    weight_ptr,
    norm_ptr,
    residual_ptr,
    out_ptr,
    x_stride,
    outputs,
    eps,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BEFORE: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program: BLOCK_OUT outputs of ROWS rows. INPUTS fit in BLOCK_IN where there is a norm."""
    output = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = output < outputs
    weight_ptr += output.to(tl.int64)[:, None] * INPUTS
    column = tl.arange(0, BLOCK_IN)
    full = inside[:, None] & (column < INPUTS)[None, :]
    first = tl.load(weight_ptr + column[None, :], mask=full, other=0.0).to(tl.float32)
    wait_upstream(PDL)
    for row in tl.static_range(ROWS):
        x = _inputs(x_ptr, norm_ptr, row, column, column < INPUTS, x_stride, eps, INPUTS, BEFORE)
        products = first * x[None, :]
        for start in tl.static_range(BLOCK_IN, INPUTS, BLOCK_IN):
            later = start + column
            full = inside[:, None] & (later < INPUTS)[None, :]
            weight = tl.load(weight_ptr + later[None, :], mask=full, other=0.0).to(tl.float32)
            x = _inputs(x_ptr, norm_ptr, row, later, later < INPUTS, x_stride, eps, INPUTS, BEFORE)
            products += weight * x[None, :]
        total = tl.sum(products, 1)
        if ADD:
            total += tl.load(residual_ptr + row * outputs + output, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * outputs + output, total.to(out_ptr.dtype.element_ty), mask=inside)


def linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm: tuple[Tensor, float] | None = None,
    silu: bool = False,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    tile: LinearTile | None = None,
    pdl: bool = False,
) -> Tensor:
    """[rows, outputs] = before(x) · weightᵀ (+ residual) for weight [outputs, inputs], both contiguous.

    x: [rows, inputs], or [rows, 2 · inputs] with `silu`, at most MAX_ROWS rows, which may be strided; `norm`:
    weight and eps of an RMSNorm of x; residual: [rows, outputs], contiguous, may be the same as `out`.
    """
    rows, (outputs, inputs) = x.shape[0], weight.shape
    assert rows <= MAX_ROWS and weight.is_contiguous() and x.shape[1] == inputs * (1 + silu)
    assert norm is None or not silu
    tile = tile or linear_tile(inputs)
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device) if out is None else out
    norm_weight, eps = norm or (weight, 0.0)
    pdl = dependent(pdl, x.device)
    linear_kernel[(triton.cdiv(outputs, tile.outputs),)](
        x,
        weight,
        norm_weight,
        out if residual is None else residual,
        out,
        x.stride(0),
        outputs,
        eps,
        ROWS=rows,
        INPUTS=inputs,
        BLOCK_OUT=tile.outputs,
        BLOCK_IN=triton.next_power_of_2(inputs) if norm is not None else tile.inputs,
        BEFORE=NORM if norm is not None else SILU if silu else PLAIN,
        ADD=residual is not None,
        PDL=pdl,
        num_warps=tile.warps,
        **({"launch_pdl": True} if pdl else {}),
    )
    return out
