"""The slot table's part of a step, on the device, so that captured steps chain without the host.

`begin` turns the table into the rows of a decode step: slot, token fed back, position, place in the cache,
what attention sees; it counts the new position into the length. Row i is the i-th slot that moves: products
are not spent on slots between that have ended. `advance` takes in what was sampled: last tokens, ends,
occupancy, and packs the result with the state hash. Twins: `reference.end_reasons`, `reference.state_hash`,
which is the hash of `baton_wire.state`.
"""

from typing import Protocol

import triton
import triton.language as tl
from torch import Tensor

FREE, PREFILL, DECODE = 0, 1, 2  # as baton_wire.state.Occupancy
STOP, LENGTH, NUMERICAL = 1, 2, 3  # as baton_wire.result.End
NOT_SAMPLED = -2
HEADER = 4  # numbers before the columns of a packed result: hash low, hash high, steps low, steps high
MAX_SLOTS = 1 << 16

_FREE, _DECODE = tl.constexpr(FREE), tl.constexpr(DECODE)
_STOP, _LENGTH, _NUMERICAL = tl.constexpr(STOP), tl.constexpr(LENGTH), tl.constexpr(NUMERICAL)
_NOT_SAMPLED = tl.constexpr(NOT_SAMPLED)
_AUTO = tl.constexpr(0)
_HEADER = tl.constexpr(HEADER)

_SLOT_FACTOR = tl.constexpr(0x9E3779B97F4A7C15)
_ADMITTED_FACTOR = tl.constexpr(0xC2B2AE3D27D4EB4F)
_LENGTH_FACTOR = tl.constexpr(0x165667B19E3779F9)
_OCCUPANCY_FACTOR = tl.constexpr(0xD6E8FEB86659FD93)
_TOKEN_FACTOR = tl.constexpr(0xA0761D6478BD642F)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)

_BLOCK = 256  # slots at a time


class SlotColumns(Protocol):
    """Columns of the slot table that steps read and write, [slots] unless noted; integers of any width."""

    block_table: Tensor  # int32 [slots, blocks]
    length: Tensor
    occupancy: Tensor
    mode: Tensor
    admitted: Tensor
    last_token: Tensor
    max_length: Tensor
    stop_ids: Tensor  # [slots, stops], -1 where there is none


class StepRows(Protocol):
    """What `begin` writes for rows [0, bucket), int32; for a row without a slot -1, or 0 where noted."""

    tokens: Tensor  # 0
    positions: Tensor  # 0
    places: Tensor
    seen: Tensor  # 0
    slots: Tensor  # whose row it is
    sampled: Tensor  # [slots], NOT_SAMPLED for every slot


@triton.jit
def _moves(slot, occupancy_ptr, mode_ptr, named_ptr, slots):
    """Which of the slots decode in this step."""
    inside = slot < slots
    occupancy = tl.load(occupancy_ptr + slot, mask=inside, other=_FREE)
    mode = tl.load(mode_ptr + slot, mask=inside, other=_AUTO)
    named = tl.load(named_ptr + slot, mask=inside, other=0)
    return (occupancy == _DECODE) & ((mode == _AUTO) | (named != 0))


@triton.jit
def begin_kernel(
    table_ptr,
    length_ptr,
    occupancy_ptr,
    mode_ptr,
    last_ptr,
    named_ptr,
    tokens_ptr,
    positions_ptr,
    places_ptr,
    seen_ptr,
    slots_ptr,
    sampled_ptr,
    table_stride,
    bucket,
    slots,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Programs over blocks of slots; each counts what moves before its own, and in all."""
    first = tl.program_id(0) * BLOCK
    before, total = 0, 0
    for start in range(0, slots, BLOCK):
        others = _moves(start + tl.arange(0, BLOCK), occupancy_ptr, mode_ptr, named_ptr, slots)
        count = tl.sum(others.to(tl.int32), 0)
        before += tl.where(start < first, count, 0)
        total += count
    slot = first + tl.arange(0, BLOCK)
    tl.store(sampled_ptr + slot, _NOT_SAMPLED, mask=slot < slots)
    moves = _moves(slot, occupancy_ptr, mode_ptr, named_ptr, slots)
    row = before + tl.cumsum(moves.to(tl.int32), 0) - 1
    moves &= row < bucket  # a slot left behind takes no token, by which the core knows at once
    length = tl.load(length_ptr + slot, mask=moves, other=0)
    position = length.to(tl.int32)
    block = tl.load(
        table_ptr + slot.to(tl.int64) * table_stride + position // BLOCK_SIZE, mask=moves, other=0
    ).to(tl.int32)
    last = tl.load(last_ptr + slot, mask=moves, other=0).to(tl.int32)
    tl.store(tokens_ptr + row, last, mask=moves)
    tl.store(positions_ptr + row, position, mask=moves)
    tl.store(places_ptr + row, block * BLOCK_SIZE + position % BLOCK_SIZE, mask=moves)
    tl.store(seen_ptr + row, position + 1, mask=moves)
    tl.store(slots_ptr + row, slot, mask=moves)
    idle = first + tl.arange(0, BLOCK)
    left = (idle >= total) & (idle < bucket)
    nothing = tl.zeros([BLOCK], tl.int32)
    tl.store(tokens_ptr + idle, nothing, mask=left)
    tl.store(positions_ptr + idle, nothing, mask=left)
    tl.store(places_ptr + idle, nothing - 1, mask=left)
    tl.store(seen_ptr + idle, nothing, mask=left)
    tl.store(slots_ptr + idle, nothing - 1, mask=left)
    tl.store(length_ptr + slot, length + 1, mask=moves)


def begin(columns: SlotColumns, rows: StepRows, bucket: int, block_size: int, named: Tensor) -> None:
    """Lays out the decode rows of a step: rows [0, bucket) of `rows`; lengths grow by 1 where a slot moves.

    named: int8 [slots], which held slots take part. At most `bucket` slots may move, in the order of slots;
    those beyond stay behind.
    """
    slots = len(columns.length)
    begin_kernel[(triton.cdiv(slots, _BLOCK),)](
        columns.block_table,
        columns.length,
        columns.occupancy,
        columns.mode,
        columns.last_token,
        named,
        rows.tokens,
        rows.positions,
        rows.places,
        rows.seen,
        rows.slots,
        rows.sampled,
        columns.block_table.stride(0),
        bucket,
        slots,
        BLOCK_SIZE=block_size,
        BLOCK=_BLOCK,
        num_warps=4,
    )


@triton.jit
def locate_kernel(
    table_ptr,
    slots_ptr,
    positions_ptr,
    places_ptr,
    rows,
    stride,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Programs over blocks of rows."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    slot = tl.load(slots_ptr + row, mask=inside, other=-1).to(tl.int64)
    position = tl.load(positions_ptr + row, mask=inside, other=0).to(tl.int32)
    block = tl.load(table_ptr + slot * stride + position // BLOCK_SIZE, mask=slot >= 0, other=0).to(tl.int32)
    place = tl.where(slot >= 0, block * BLOCK_SIZE + position % BLOCK_SIZE, -1)
    tl.store(places_ptr + row, place, mask=inside)


def locate(block_table: Tensor, block_size: int, slots: Tensor, positions: Tensor, places: Tensor) -> None:
    """places[i]: where position positions[i] of slot slots[i] is in the cache; -1 for slot -1."""
    locate_kernel[(triton.cdiv(len(slots), _BLOCK),)](
        block_table,
        slots,
        positions,
        places,
        len(slots),
        block_table.stride(0),
        BLOCK_SIZE=block_size,
        BLOCK=_BLOCK,
        num_warps=4,
    )


@triton.jit
def _word(slot, admitted, length, occupancy, token):
    """The mixed word of a slot, uint64."""
    word = slot.to(tl.uint64) * _SLOT_FACTOR + admitted.to(tl.uint64) * _ADMITTED_FACTOR
    word += length.to(tl.uint64) * _LENGTH_FACTOR + occupancy.to(tl.uint64) * _OCCUPANCY_FACTOR
    word += (token.to(tl.int64) + 1).to(tl.uint64) * _TOKEN_FACTOR
    word = (word ^ (word >> 30)) * _MIX_1
    word = (word ^ (word >> 27)) * _MIX_2
    return word ^ (word >> 31)


@triton.jit
def advance_kernel(
    length_ptr,
    occupancy_ptr,
    admitted_ptr,
    last_ptr,
    max_length_ptr,
    stop_ptr,
    sampled_ptr,
    result_ptr,
    steps_ptr,
    slots,
    ring,
    STOPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program walks the table: the hash is one number."""
    steps = tl.load(steps_ptr)
    out_ptr = result_ptr + (steps % ring) * (_HEADER + 2 * slots)
    total = tl.zeros([BLOCK], tl.uint64)
    for start in range(0, slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        inside = slot < slots
        token = tl.load(sampled_ptr + slot, mask=inside, other=_NOT_SAMPLED)
        moved = token != _NOT_SAMPLED
        length = tl.load(length_ptr + slot, mask=inside, other=0).to(tl.int64)
        longest = tl.load(max_length_ptr + slot, mask=inside, other=0).to(tl.int64)
        stopped = tl.zeros([BLOCK], tl.int1)
        for i in tl.static_range(STOPS):
            stop = tl.load(stop_ptr + slot.to(tl.int64) * STOPS + i, mask=inside, other=-1).to(tl.int32)
            stopped |= (stop == token) & (stop >= 0)
        reason = tl.where(length + 1 >= longest, _LENGTH, 0)
        reason = tl.where(stopped, _STOP, reason)
        reason = tl.where(moved, tl.where(token < 0, _NUMERICAL, reason), 0)
        occupancy = tl.load(occupancy_ptr + slot, mask=inside, other=_FREE).to(tl.int64)
        occupancy = tl.where(moved, tl.where(reason == 0, _DECODE, _FREE), occupancy)
        last = tl.where(moved, token, tl.load(last_ptr + slot, mask=inside, other=-1).to(tl.int32))
        tl.store(occupancy_ptr + slot, occupancy.to(occupancy_ptr.dtype.element_ty), mask=moved)
        tl.store(last_ptr + slot, last.to(last_ptr.dtype.element_ty), mask=moved)
        tl.store(out_ptr + _HEADER + slot, tl.where(moved, token, -1), mask=inside)
        tl.store(out_ptr + _HEADER + slots + slot, reason, mask=inside)
        admitted = tl.load(admitted_ptr + slot, mask=inside, other=0)
        word = _word(slot, admitted, length, occupancy, last)
        total += tl.where(occupancy != _FREE, word, 0)
    word = tl.sum(total, 0).to(tl.int64, bitcast=True)
    tl.store(out_ptr, word.to(tl.int32))
    tl.store(out_ptr + 1, (word >> 32).to(tl.int32))
    tl.store(out_ptr + 2, (steps + 1).to(tl.int32))
    tl.store(out_ptr + 3, ((steps + 1) >> 32).to(tl.int32))
    tl.store(steps_ptr, steps + 1)


def advance(columns: SlotColumns, sampled: Tensor, results: Tensor, steps: Tensor) -> None:
    """Takes in `sampled` (int32 [slots]: a token, -1 for logits that are not finite, or NOT_SAMPLED).

    Lengths are those after the step already. Writes results[steps % ring], then adds 1 to `steps` (int64
    [1]). results: int32 [ring, HEADER + 2 · slots], contiguous; a result is the hash (low and high half), the
    number of results so far (likewise: a reader knows whose it is), tokens (-1 for none), reasons of ends (0
    for none).
    """
    slots = len(columns.length)
    assert results.is_contiguous() and results.shape[1] == HEADER + 2 * slots
    advance_kernel[(1,)](
        columns.length,
        columns.occupancy,
        columns.admitted,
        columns.last_token,
        columns.max_length,
        columns.stop_ids,
        sampled,
        results,
        steps,
        slots,
        results.shape[0],
        STOPS=columns.stop_ids.shape[1],
        BLOCK=_BLOCK,
        num_warps=8,
    )
