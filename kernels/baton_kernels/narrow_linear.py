"""Products of 3 to 16 rows with weights of few outputs, where waiting is all the time: y = x · weightᵀ.

With few outputs there are few programs, and each has a long way over its inputs. So a program asks for all
of its weights at once, before it waits for what comes before it: they are on the multiprocessor when x is
there. Then it only multiplies, its inputs shared out over its warps, whose sums it adds up in a fixed order,
which depends on nothing but the shape of the weight. With many outputs x, which every program reads whole,
costs more than this saves.
"""

from dataclasses import dataclass
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton_kernels.launch import INTERPRETED, dependent, let_downstream, machine, wait_upstream

MAX_ROWS = 16  # the height of a matrix instruction
MAX_OUTPUTS = 2048
CAPABILITY = 90  # of the only machine where this was measured, and whose shared memory is as large
SHARED_BYTES = 227 << 10  # of a program there
_MIN_SLICE = 32  # inputs; with fewer at a time there are too many steps to write out


@dataclass(frozen=True, slots=True)
class NarrowTile:
    """Outputs of a program; warps, each with a slice of the inputs at a time; inputs in a slice."""

    outputs: int
    warps: int
    slice: int


def narrow_tile(outputs: int, inputs: int, itemsize: int = 2) -> NarrowTile | None:
    """For a weight [outputs, inputs] of numbers of `itemsize` bytes; None where it is none of this kernel's.

    Of that kind are weights of at most MAX_OUTPUTS whose inputs are a multiple of a step's, and few enough
    that what a program needs of x and of the weight has room in shared memory at once, though one compiler
    keeps the weight in registers.
    """
    if outputs <= 1024 and inputs <= 2048:
        tile = NarrowTile(8, 4, gcd(256, inputs // 4))
    else:  # fewer programs, which read x less often
        tile = NarrowTile(16, 8, gcd(128, inputs // 8))
    divides = inputs % tile.warps == 0 and tile.slice >= _MIN_SLICE
    held = itemsize * (MAX_ROWS + tile.outputs) * inputs
    return tile if divides and outputs <= MAX_OUTPUTS and held <= SHARED_BYTES else None


def serves(weight: Tensor) -> bool:
    """Whether products with `weight` [outputs, inputs] can be this kernel's, on the device where it is."""
    outputs, inputs = weight.shape
    tile = narrow_tile(outputs, inputs, weight.itemsize)
    return tile is not None and machine(weight.device)[0] == CAPABILITY


@triton.jit
def _steps(ptr, mask, STEP: tl.constexpr, STEPS: tl.constexpr):
    """What all steps need, as a tuple: every load is in flight before the first has come."""
    loaded: tl.tuple = ()
    for step in tl.static_range(STEPS):
        loaded += (tl.load(ptr + step * STEP, mask=mask, other=0.0),)
    return loaded


@triton.jit
def narrow_linear_kernel(
    x_ptr,
    weight_ptr,
    residual_ptr,
    out_ptr,
    rows,
    outputs,
    x_stride,
    INPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    SLICES: tl.constexpr,
    SLICE: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program: BLOCK_OUT outputs of all rows. INPUTS is a multiple of a step: SLICES · SLICE."""
    STEP: tl.constexpr = SLICES * SLICE
    STEPS: tl.constexpr = INPUTS // STEP
    let_downstream(PDL)
    output = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = output < outputs
    slice_start = tl.arange(0, SLICES)[:, None, None] * SLICE
    within = tl.arange(0, SLICE)
    weight_ptr += output.to(tl.int64)[None, None, :] * INPUTS + (slice_start + within[None, :, None])
    weights = _steps(weight_ptr, inside[None, None, :], STEP, STEPS)
    wait_upstream(PDL)
    row = tl.arange(0, BLOCK_ROWS)
    known = row < rows
    x_ptr += row[None, :, None] * x_stride + (slice_start + within[None, None, :])
    xs = _steps(x_ptr, known[None, :, None], STEP, STEPS)
    totals = tl.zeros([SLICES, BLOCK_ROWS, BLOCK_OUT], tl.float32)
    for step in tl.static_range(STEPS):
        x = xs[step]
        weight = weights[step]
        if INTERPRETED:
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        totals = tl.dot(x, weight, totals, input_precision="ieee")
    total = tl.sum(totals, 0)
    place = row[:, None] * outputs + output[None, :]
    mask = known[:, None] & inside[None, :]
    if ADD:
        total += tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=mask)


def narrow_linear(
    x: Tensor,
    weight: Tensor,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    tile: NarrowTile | None = None,
    pdl: bool = False,
) -> Tensor:
    """[rows, outputs] = x · weightᵀ (+ residual) for a weight [outputs, inputs] that this kernel `serves`.

    x: [rows, inputs], at most MAX_ROWS rows, which may be strided; residual: [rows, outputs], contiguous, may
    be the same as `out`. All in float32 and rounded once.
    """
    rows, (outputs, inputs) = x.shape[0], weight.shape
    assert rows <= MAX_ROWS and weight.is_contiguous() and x.shape[1] == inputs and x.stride(1) == 1
    tile = tile or narrow_tile(outputs, inputs, weight.itemsize)
    assert tile is not None and inputs % (tile.warps * tile.slice) == 0, "ask `serves` first"
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device) if out is None else out
    pdl = dependent(pdl, x.device)
    narrow_linear_kernel[(triton.cdiv(outputs, tile.outputs),)](
        x,
        weight,
        out if residual is None else residual,
        out,
        rows,
        outputs,
        x.stride(0),
        INPUTS=inputs,
        BLOCK_ROWS=MAX_ROWS,
        BLOCK_OUT=tile.outputs,
        SLICES=tile.warps,
        SLICE=tile.slice,
        ADD=residual is not None,
        PDL=pdl,
        num_warps=tile.warps,
        **({"launch_pdl": True} if pdl else {}),
    )
    return out
