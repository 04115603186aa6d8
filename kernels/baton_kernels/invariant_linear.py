"""y = x · weightᵀ + bias in which a row's bits do not depend on how many rows there are.

Outputs take the place that rows have in a usual product: they fill the height of a matrix instruction, which
is fixed, and rows its width, which may be anything. So one row and 8,192 run the same instructions over the
inputs in the same order; only how many rows share a tile differs, and a row does not feel its neighbours.
Libraries choose other code, and other sums, for other numbers of rows.

Where outputs are gate and up of a feed-forward in turns, silu(gate) · up can be all that is written: both
outputs of a unit are in one thread. The division by rms of x that a folded norm has left to do is done there
too, by sums over the same tiles of x that the products are of.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton_kernels.launch import INTERPRETED, dependent, let_downstream, machine, wait_upstream

_ROW_TILES = 8  # of rows that walk over the outputs together, so that what they share is still in the cache


@dataclass(frozen=True, slots=True)
class InvariantTile:
    """Outputs (64 fill an instruction), rows, inputs at a time, warps, pipeline stages."""

    outputs: int
    rows: int
    inputs: int
    warps: int
    stages: int


def invariant_tile(rows: int, capability: int, divide: bool = False) -> InvariantTile:
    """For so many rows. Tiles differ in how work is shared out, never in a row's sum.

    `divide`: by the rms of x, whose sum is over as many inputs at a time in all tiles of a machine.
    """
    if capability in (86, 89):  # shared memory is small
        return InvariantTile(64, min(64, max(16, triton.next_power_of_2(rows))), 64, 4, 3)
    if rows <= 64:
        return InvariantTile(64, max(16, triton.next_power_of_2(rows)), 128, 4, 4)
    if rows <= 512 or (divide and capability < 90):  # there too many registers would be needed
        return InvariantTile(64, 64, 128, 4, 4)
    return InvariantTile(128, 128, 128 if divide else 64, 8, 3)


@triton.jit
def _tile(rows, outputs, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, TOGETHER: tl.constexpr):
    """(first row, first output) of this program; TOGETHER tiles of rows take an output tile in turn."""
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    band = TOGETHER * tl.cdiv(outputs, BLOCK_OUT)
    first = tl.program_id(0) // band * TOGETHER
    height = tl.minimum(row_tiles - first, TOGETHER)
    within = tl.program_id(0) % band
    return (first + within % height) * BLOCK_ROWS, within // height * BLOCK_OUT


@triton.jit
def _gate_and_up(total, BLOCK_OUT: tl.constexpr, BLOCK_ROWS: tl.constexpr, TURNS: tl.constexpr):
    """Gates and ups, [BLOCK_OUT / 2, BLOCK_ROWS] each, of outputs in turns.

    With turns of 8 both of a unit are in one thread already, so nothing moves.
    """
    pairs = total.reshape(BLOCK_OUT // (2 * TURNS), 2, TURNS, BLOCK_ROWS)
    gate, up = tl.split(tl.permute(pairs, (0, 2, 3, 1)))
    return gate.reshape(BLOCK_OUT // 2, BLOCK_ROWS), up.reshape(BLOCK_OUT // 2, BLOCK_ROWS)


@triton.jit
def invariant_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    rows,
    outputs,
    x_stride,
    eps,
    INPUTS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    TOGETHER: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    TURNS: tl.constexpr,
    DIVIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program: BLOCK_OUT outputs of BLOCK_ROWS rows.

    TURNS: of gate and up in the outputs, 0 for other outputs; DIVIDE: both by the rms of x's rows.
    """
    first_row, first_output = _tile(rows, outputs, BLOCK_ROWS, BLOCK_OUT, TOGETHER)
    row = first_row + tl.arange(0, BLOCK_ROWS)
    output = first_output + tl.arange(0, BLOCK_OUT)
    column = tl.arange(0, BLOCK_IN)
    known, inside = row < rows, output < outputs
    weight_ptr += output.to(tl.int64)[:, None] * INPUTS + column[None, :]
    x_ptr += row.to(tl.int64)[None, :] * x_stride + column[:, None]
    total = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
    squares = tl.zeros([BLOCK_IN, BLOCK_ROWS], tl.float32)
    let_downstream(PDL)
    wait_upstream(PDL)
    for start in range(0, INPUTS, BLOCK_IN):
        if INPUTS % BLOCK_IN == 0:
            weight = tl.load(weight_ptr + start, mask=inside[:, None], other=0.0)
            x = tl.load(x_ptr + start, mask=known[None, :], other=0.0)
        else:
            left = column < INPUTS - start
            weight = tl.load(weight_ptr + start, mask=inside[:, None] & left[None, :], other=0.0)
            x = tl.load(x_ptr + start, mask=known[None, :] & left[:, None], other=0.0)
        if INTERPRETED:
            weight, x = weight.to(tl.float32), x.to(tl.float32)
        total = tl.dot(weight, x, total, input_precision="ieee")
        if DIVIDE:
            wide = x.to(tl.float32)
            squares += wide * wide
    if TURNS > 0:
        gate, up = _gate_and_up(total, BLOCK_OUT, BLOCK_ROWS, TURNS)
        if DIVIDE:
            unit = tl.rsqrt(tl.sum(squares, 0) / INPUTS + eps)[None, :]
            gate, up = gate * unit, up * unit
        total = gate / (1.0 + tl.exp(-gate)) * up
        outputs = outputs // 2
        output = first_output // 2 + tl.arange(0, BLOCK_OUT // 2)
        inside = output < outputs
    if BIAS:
        total += tl.load(bias_ptr + output, mask=inside, other=0.0).to(tl.float32)[:, None]
    place = row.to(tl.int64)[:, None] * outputs + output[None, :]
    mask = known[:, None] & inside[None, :]
    total = tl.trans(total)
    if ADD:
        total += tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=mask)


def invariant_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    turns: int = 0,
    eps: float | None = None,
    out: Tensor | None = None,
    tile: InvariantTile | None = None,
    pdl: bool = False,
) -> Tensor:
    """[rows, outputs] for x [rows, inputs], whose rows may be strided, and weight [outputs, inputs].

    `residual`, contiguous, of the result's shape, is added; it may be `out`. With `turns`, which divides half
    of the outputs, these are gate and up in turns, and the result is silu(gate) · up [rows, outputs / 2], in
    float32 and rounded once; with `eps` too, both are first divided by the rms of their row of x. Neither
    goes with `bias` or `residual`.
    """
    rows, (outputs, inputs) = x.shape[0], weight.shape
    assert weight.is_contiguous() and x.shape[1] == inputs and x.stride(1) == 1
    tile = tile or invariant_tile(rows, machine(x.device)[0], eps is not None)
    if turns:
        assert outputs % (2 * turns) == 0 and tile.outputs % (2 * turns) == 0
        assert bias is None and residual is None
    assert turns or eps is None
    columns = outputs // 2 if turns else outputs
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device) if out is None else out
    pdl = dependent(pdl, x.device)
    invariant_linear_kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.outputs),)](
        x,
        weight,
        weight if bias is None else bias,
        out if residual is None else residual,
        out,
        rows,
        outputs,
        x.stride(0),
        0.0 if eps is None else eps,
        INPUTS=inputs,
        BLOCK_OUT=tile.outputs,
        BLOCK_ROWS=tile.rows,
        BLOCK_IN=tile.inputs,
        TOGETHER=_ROW_TILES,
        BIAS=bias is not None,
        ADD=residual is not None,
        TURNS=turns,
        DIVIDE=eps is not None,
        PDL=pdl,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **({"launch_pdl": True} if pdl else {}),
    )
    return out
