"""How a product of `invariant_linear` is shared out: tiles by the number of rows and the weight's shape."""

from dataclasses import dataclass

import triton

_FEW_ROWS = 32  # up to so many, outputs are the height of an instruction, of which nothing is then idle
_ENOUGH = 96  # programs that keep a machine of 132 multiprocessors busy
_SHARED_BYTES = 226 << 10  # of a program with its multiprocessor to itself, but for what is not tiles
_SHORT = 2048  # inputs; a program over so few is best run beside another, which works while this one begins


@dataclass(frozen=True, slots=True)
class InvariantTile:
    """Outputs, rows, inputs at a time, warps, pipeline stages.

    `rows_high`: rows are the height of an instruction, which is 64, and outputs its width; else the other way
    round. `described`: both come by the bulk copy engine.
    """

    outputs: int
    rows: int
    inputs: int
    warps: int
    stages: int
    rows_high: bool = False
    described: bool = False


def invariant_tile(
    rows: int, outputs: int, inputs: int, capability: int, *, bulk: bool, divide: bool = False
) -> InvariantTile:
    """For so many rows. Tiles differ in how work is shared out, never in a row's sum.

    `bulk`: whether the bulk copy engine can be used; `divide`: by the rms of x, whose sum is
    over as many inputs at a time in all tiles of a machine.
    """
    if bulk:
        return _few(divide) if rows <= _FEW_ROWS else _many(rows, outputs, inputs, divide)
    if capability in (86, 89) or capability >= 120:  # shared memory is small
        return InvariantTile(64, min(64, max(16, triton.next_power_of_2(rows))), 64, 4, 3)
    if rows <= 64:
        return InvariantTile(64, max(16, triton.next_power_of_2(rows)), 128, 4, 4)
    if rows <= 512 or (divide and capability < 90):  # there too many registers would be needed
        return InvariantTile(64, 64, 128, 4, 4)
    return InvariantTile(128, 128, 128 if divide else 64, 8, 3)


def _few(divide: bool) -> InvariantTile:
    return InvariantTile(64, 16, 128 if divide else 256, 4, 5, described=True)


def _many(rows: int, outputs: int, inputs: int, divide: bool) -> InvariantTile:
    """The largest tile of which there are enough, square ones first: that reads least of x and weights."""
    for height, width in ((128, 128), (128, 64), (64, 128), (64, 64), (64, 32), (64, 16)):
        programs = triton.cdiv(rows, height) * triton.cdiv(outputs, width)
        # sums for the rms take registers of which a tile of 128 rows leaves none
        if programs >= _ENOUGH and (height == 64 or (rows > 128 and not divide)):
            break
    at_a_time = 128 if divide else 256 if height + width <= 96 else 128 if height + width <= 192 else 64
    step = 2 * (height + width) * at_a_time
    room = _SHARED_BYTES // (2 if programs > 132 and inputs <= _SHORT and at_a_time == 64 else 1)
    stages = min(8, room // step)
    warps = 8 if height * width >= 1 << 14 else 4
    return InvariantTile(width, height, at_a_time, warps, stages, rows_high=True, described=True)
