"""y = x · weightᵀ + bias in which a row's bits do not depend on how many rows there are.

A sum goes over the inputs in one order, a matrix instruction's worth at a time, whatever the tile: tiles
differ in how many rows and outputs share one, and in which of the two are the height of an instruction, and a
row does not feel its neighbours. With few rows outputs are the height, which is fixed, and rows the width,
which may be anything. Libraries choose other code, and other sums, for other numbers of rows.

Where outputs are gate and up of a feed-forward in turns, silu(gate) · up can be all that is written: both
outputs of a unit are in one thread. The division by rms of x that a folded norm has left to do is done there
too, by sums over the same tiles of x that the products are of.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton_kernels.invariant_tile import InvariantTile, invariant_tile
from baton_kernels.launch import (
    INTERPRETED,
    ask_ahead,
    dependent,
    describable,
    describe,
    has_bulk,
    let_downstream,
    machine,
    wait_upstream,
)

_AHEAD = 256  # inputs of a program's weights that are asked for before x is there
_ROW_TILES = 8  # of rows that walk over the outputs together, so that what they share is still in the cache


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
def _load(
    ptr,
    line,
    known,
    stride,
    first,
    start,
    INPUTS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """Lines from `first` on of x or the weight, inputs from `start` on: zero beyond either's end."""
    if DESCRIBED:
        loaded = ptr.load([first, start])
    else:
        column = tl.arange(0, BLOCK_IN)
        ptr += line.to(tl.int64)[:, None] * stride + column[None, :] + start
        mask = known[:, None]
        if INPUTS % BLOCK_IN != 0:
            mask &= (column < INPUTS - start)[None, :]
        loaded = tl.load(ptr, mask=mask, other=0.0)
    return loaded.to(tl.float32) if INTERPRETED else loaded


@triton.jit
def _gate_and_up(total, BLOCK_OUT: tl.constexpr, BLOCK_ROWS: tl.constexpr, TURNS: tl.constexpr):
    """Gates and ups, [BLOCK_ROWS, BLOCK_OUT / 2] each, of outputs in turns.

    With turns of 8 both of a unit are in one thread already, so nothing moves.
    """
    pairs = total.reshape(BLOCK_ROWS, BLOCK_OUT // (2 * TURNS), 2, TURNS)
    gate, up = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
    return gate.reshape(BLOCK_ROWS, BLOCK_OUT // 2), up.reshape(BLOCK_ROWS, BLOCK_OUT // 2)


@triton.jit
def invariant_linear_kernel(
    x_ptr,
    weight_ptr,
    lines_ptr,
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
    ROWS_HIGH: tl.constexpr,
    DESCRIBED: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program: BLOCK_OUT outputs of BLOCK_ROWS rows.

    TURNS: of gate and up in the outputs, 0 for other outputs; DIVIDE: both by the rms of x's rows;
    DESCRIBED: x and weight come as descriptors, not pointers; AHEAD: inputs of the weight, whose lines then
    come as a pointer too, that are asked for before the wait.
    """
    first_row, first_output = _tile(rows, outputs, BLOCK_ROWS, BLOCK_OUT, TOGETHER)
    row = first_row + tl.arange(0, BLOCK_ROWS)
    output = first_output + tl.arange(0, BLOCK_OUT)
    known, inside = row < rows, output < outputs
    total = tl.zeros([BLOCK_ROWS, BLOCK_OUT] if ROWS_HIGH else [BLOCK_OUT, BLOCK_ROWS], tl.float32)
    squares = tl.zeros([BLOCK_ROWS, BLOCK_IN], tl.float32)
    let_downstream(PDL)
    if AHEAD > 0:
        tl.static_assert(BLOCK_OUT <= tl.extra.cuda.num_threads())
        here = lines_ptr + first_output.to(tl.int64) * INPUTS
        ask_ahead(here, INPUTS, tl.minimum(outputs - first_output, BLOCK_OUT), AHEAD)
    wait_upstream(PDL)
    for start in range(0, INPUTS, BLOCK_IN):
        weight = _load(
            *(weight_ptr, output, inside, INPUTS, first_output, start, INPUTS, BLOCK_IN, DESCRIBED)
        )
        x = _load(x_ptr, row, known, x_stride, first_row, start, INPUTS, BLOCK_IN, DESCRIBED)
        if ROWS_HIGH:
            total = tl.dot(x, weight.T, total, input_precision="ieee")
        else:
            total = tl.dot(weight, x.T, total, input_precision="ieee")
        if DIVIDE:
            wide = x.to(tl.float32)
            squares += wide * wide
    if not ROWS_HIGH:
        total = tl.trans(total)
    if TURNS > 0:
        gate, up = _gate_and_up(total, BLOCK_OUT, BLOCK_ROWS, TURNS)
        if DIVIDE:
            unit = tl.rsqrt(tl.sum(squares, 1) / INPUTS + eps)[:, None]
            gate, up = gate * unit, up * unit
        total = gate / (1.0 + tl.exp(-gate)) * up
        outputs = outputs // 2
        output = first_output // 2 + tl.arange(0, BLOCK_OUT // 2)
        inside = output < outputs
    if BIAS:
        total += tl.load(bias_ptr + output, mask=inside, other=0.0).to(tl.float32)[None, :]
    place = row.to(tl.int64)[:, None] * outputs + output[None, :]
    mask = known[:, None] & inside[None, :]
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

    `residual`, contiguous, of the result's shape, is added; it may be `out`. With `turns`, at most 8 and a
    divisor of half of the outputs, these are gate and up in turns, and the result is silu(gate) · up [rows,
    outputs / 2], in float32 and rounded once; with `eps` too, both are first divided by the rms of their row
    of x. Neither goes with `bias` or `residual`.
    """
    rows, (outputs, inputs) = x.shape[0], weight.shape
    assert rows and weight.is_contiguous() and x.shape[1] == inputs and x.stride(1) == 1
    divide, capability = eps is not None, machine(x.device)[0]
    bulk = has_bulk(capability) and x.itemsize == 2 and describable(x) and describable(weight)
    # without, a sum for the rms of odd rows is as tiles are high
    same_sum = bulk or (inputs % 16 == 0 and x.stride(0) % 16 == 0)
    height = rows if same_sum or not divide else min(rows, 16)
    tile = tile or invariant_tile(height, outputs, inputs, capability, bulk=bulk, divide=divide)
    if turns:
        assert outputs % (2 * turns) == 0 and tile.outputs % (2 * turns) == 0
        assert bias is None and residual is None
    assert turns or eps is None
    columns = outputs // 2 if turns else outputs
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device) if out is None else out
    pdl = dependent(pdl, x.device)
    invariant_linear_kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.outputs),)](
        describe(x, tile.rows, tile.inputs) if tile.described else x,
        describe(weight, tile.outputs, tile.inputs) if tile.described else weight,
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
        DIVIDE=divide,
        ROWS_HIGH=tile.rows_high,
        DESCRIBED=tile.described,
        AHEAD=min(_AHEAD, inputs) if pdl and tile.described else 0,
        PDL=pdl,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **({"launch_pdl": True} if pdl else {}),
    )
    return out
