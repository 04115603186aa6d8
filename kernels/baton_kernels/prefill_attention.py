"""Attention of prompt chunks over the paged cache: causal, after any prefix, several prompts at once.

All query heads that share a key head lie in one tile: row i of a tile is query row i // group, head i %
group. The host lists the tiles (it knows the chunks from the plan), those that see most first. Where tiles
are few, as after a prefix hit, they may be split at multiples of a fixed span, so that the machine is filled;
a second kernel combines the parts in the order of positions.
Online softmax after Milakov and Gimelshein (2018), tiling after FlashAttention-2 (Dao 2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton_kernels.launch import INTERPRETED, describe, machine
from baton_kernels.tiles import PrefillTile, tiles

SPAN = 1024  # positions of a part, where a tile is split
_LOG2_E = 1.4426950408889634
_NULL_SCORE = tl.constexpr(-1e30)
_FIELDS = tl.constexpr(8)
_SPLIT_FIELDS = tl.constexpr(4)


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """`rows` consecutive rows of the batch from `first` on: positions `start` … of the sequence in `slot`."""

    slot: int
    first: int
    rows: int
    start: int


@dataclass(frozen=True, slots=True)
class PrefillWork:
    """A step's tiles, shared by its layers."""

    items: Tensor  # int32 [items, 8]: first row, rows, slot, first position, low, high, part or -1, unused
    splits: Tensor  # int32 [split tiles, 4]: first row, rows, first part, parts
    partial: Tensor  # float32 [parts, rows of a tile, heads, head_dim]
    weight: Tensor  # float32 [parts, rows of a tile, heads], log2 of the sum of exponentials
    tile: PrefillTile
    group_padded: int


def plan_prefill(
    chunks: Sequence[PromptChunk],
    heads: int,
    kv_heads: int,
    head_dim: int,
    device: torch.device,
    *,
    block_size: int,
    split: bool = True,
    tile: PrefillTile | None = None,
) -> PrefillWork:
    """Tiles of the chunks, on the device, for a cache of blocks of `block_size` positions.

    `split`: whether tiles may be split where they are few.
    """
    capability, processors = machine(device)
    tile = tile or tiles(capability).prefill_for(block_size, head_dim)
    padded = triton.next_power_of_2(heads // kv_heads)
    height = max(1, tile.rows // padded)
    plain = [
        (c.first + done, min(height, c.rows - done), c.slot, c.start + done)
        for c in chunks
        for done in range(0, c.rows, height)
    ]
    plain.sort(key=lambda item: -(item[3] + item[1]))
    split = split and len(plain) * kv_heads * 2 <= processors
    items, splits, parts = [], [], 0
    for first, rows, slot, start in plain:
        seen = start + rows
        if split and seen > SPAN:
            lows = range(0, seen, SPAN)
            items += [
                (first, rows, slot, start, low, min(low + SPAN, seen), parts + i, 0)
                for i, low in enumerate(lows)
            ]
            splits.append((first, rows, parts, len(lows)))
            parts += len(lows)
        else:
            items.append((first, rows, slot, start, 0, seen, -1, 0))
    size = (parts, height, heads)
    return PrefillWork(
        items=_to_device(items, _FIELDS.value, device),
        splits=_to_device(splits, _SPLIT_FIELDS.value, device),
        partial=torch.empty((*size, head_dim), dtype=torch.float32, device=device),
        weight=torch.empty(size, dtype=torch.float32, device=device),
        tile=tile,
        group_padded=padded,
    )


def _to_device(rows: Sequence[tuple[int, ...]], width: int, device: torch.device) -> Tensor:
    host = torch.tensor(rows, dtype=torch.int32).view(-1, width)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


@triton.jit
def _fold_keys(
    q,
    out,
    total,
    maximum,
    k_ptr,
    v_ptr,
    table_ptr,
    position_of_row,
    low,
    high,
    scale_log2,
    kv_head,
    block_stride,
    head_stride,
    token_stride,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    DESCRIBED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Positions [low, high) into the running three. MASKED: some rows do not see some of them.

    Without, `high - low` is a multiple of KEYS.
    """
    dim = tl.arange(0, HEAD_DIM)
    key = tl.arange(0, KEYS)
    for start in range(low, high, KEYS):
        inside = start + key < high
        if DESCRIBED:  # a tile of keys lies in one block: `low` is a multiple of KEYS, and so is the block
            block = tl.load(table_ptr + start // BLOCK_SIZE)
            line = (block * KV_HEADS + kv_head) * BLOCK_SIZE + start % BLOCK_SIZE
            k = k_ptr.load([line, 0]).T
            v = v_ptr.load([line, 0])
            if MASKED:  # what lies behind `high` may be anything, NaN too
                v = tl.where(inside[:, None], v, 0.0)
        else:
            position = start + key
            block = tl.load(table_ptr + position // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
            source = block * block_stride + kv_head.to(tl.int64) * head_stride
            source += (position % BLOCK_SIZE) * token_stride
            if MASKED:
                k = tl.load(k_ptr + source[None, :] + dim[:, None], mask=inside[None, :], other=0.0)
                v = tl.load(v_ptr + source[:, None] + dim[None, :], mask=inside[:, None], other=0.0)
            else:
                k = tl.load(k_ptr + source[None, :] + dim[:, None])
                v = tl.load(v_ptr + source[:, None] + dim[None, :])
        if INTERPRETED:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(q, k)
        if MASKED:
            scores = tl.where((start + key)[None, :] <= position_of_row[:, None], scores, float("-inf"))
        highest = tl.maximum(maximum, tl.max(scores, 1) * scale_log2)
        keep = tl.exp2(maximum - highest)
        weights = tl.exp2(scores * scale_log2 - highest[:, None])
        total = total * keep + tl.sum(weights, 1)
        out = tl.dot(weights.to(v.dtype), v, out * keep[:, None])
        maximum = highest
    return out, total, maximum


@triton.jit
def prefill_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    table_ptr,
    items_ptr,
    partial_ptr,
    weight_ptr,
    scale_log2,
    block_stride,
    head_stride,
    token_stride,
    table_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """Program (key head, item). q, out: [rows, KV_HEADS · GROUP, HEAD_DIM], contiguous.

    DESCRIBED: keys and values come as descriptors of [blocks · KV_HEADS · BLOCK_SIZE, HEAD_DIM], not
    pointers.
    """
    HEADS: tl.constexpr = KV_HEADS * GROUP
    HEIGHT: tl.constexpr = ROWS // GROUP_PADDED
    kv_head = tl.program_id(0)
    item_ptr = items_ptr + tl.program_id(1) * _FIELDS
    first, rows, slot = tl.load(item_ptr), tl.load(item_ptr + 1), tl.load(item_ptr + 2)
    start, low, high = tl.load(item_ptr + 3), tl.load(item_ptr + 4), tl.load(item_ptr + 5)
    part = tl.load(item_ptr + 6)
    line = tl.arange(0, ROWS)
    dim = tl.arange(0, HEAD_DIM)
    row, member = line // GROUP_PADDED, line % GROUP_PADDED
    valid = ((row < rows) & (member < GROUP))[:, None]
    head = kv_head * GROUP + member
    place = ((first + row).to(tl.int64) * HEADS + head)[:, None] * HEAD_DIM + dim[None, :]
    q = tl.load(q_ptr + place, mask=valid, other=0.0)
    if INTERPRETED:
        q = q.to(tl.float32)
    maximum = tl.full([ROWS], _NULL_SCORE, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    table_ptr += slot.to(tl.int64) * table_stride
    # every row of the tile sees [low, plain)
    plain = tl.maximum(low, tl.minimum(high, (start + 1) // KEYS * KEYS))
    out, total, maximum = _fold_keys(
        *(q, out, total, maximum, k_ptr, v_ptr, table_ptr, start + row, low, plain, scale_log2),
        *(kv_head, block_stride, head_stride, token_stride),
        *(KV_HEADS, HEAD_DIM, BLOCK_SIZE, KEYS, DESCRIBED, False),
    )
    out, total, maximum = _fold_keys(
        *(q, out, total, maximum, k_ptr, v_ptr, table_ptr, start + row, plain, high, scale_log2),
        *(kv_head, block_stride, head_stride, token_stride),
        *(KV_HEADS, HEAD_DIM, BLOCK_SIZE, KEYS, DESCRIBED, True),
    )
    total_or_one = tl.where(total > 0, total, 1.0)
    out = out / total_or_one[:, None]
    if part < 0:
        tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=valid)
    else:
        slab = (part * HEIGHT + row).to(tl.int64) * HEADS + head
        tl.store(partial_ptr + slab[:, None] * HEAD_DIM + dim[None, :], out, mask=valid)
        weight = tl.where(total > 0, maximum + tl.log2(total_or_one), _NULL_SCORE)
        tl.store(weight_ptr + slab, weight, mask=(row < rows) & (member < GROUP))


@triton.jit
def combine_parts_kernel(
    out_ptr,
    splits_ptr,
    partial_ptr,
    weight_ptr,
    HEADS: tl.constexpr,
    HEIGHT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (head, row of a tile, split tile): folds the tile's parts, BLOCK at a time, in order."""
    head, row = tl.program_id(0), tl.program_id(1)
    split_ptr = splits_ptr + tl.program_id(2) * _SPLIT_FIELDS
    rows, first_part, parts = tl.load(split_ptr + 1), tl.load(split_ptr + 2), tl.load(split_ptr + 3)
    if row >= rows:
        return
    dim = tl.arange(0, HEAD_DIM)
    maximum = tl.full([1], _NULL_SCORE, tl.float32)
    total = tl.zeros([1], tl.float32)
    out = tl.zeros([HEAD_DIM], tl.float32)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        slab = ((first_part + part) * HEIGHT + row).to(tl.int64) * HEADS + head
        weight = tl.load(weight_ptr + slab, mask=part < parts, other=float("-inf"))
        values = tl.load(
            partial_ptr + slab[:, None] * HEAD_DIM + dim[None, :], mask=(part < parts)[:, None], other=0.0
        )
        highest = tl.maximum(maximum, tl.max(weight, 0))
        keep = tl.exp2(maximum - highest)
        share = tl.exp2(weight - highest)
        total = total * keep + tl.sum(share, 0)
        out = out * keep + tl.sum(values * share[:, None], 0)
        maximum = highest
    target = out_ptr + ((tl.load(split_ptr) + row).to(tl.int64) * HEADS + head) * HEAD_DIM + dim
    tl.store(target, (out / total).to(out_ptr.dtype.element_ty))


def prefill_attention(
    q: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, work: PrefillWork, scale: float, out: Tensor
) -> Tensor:
    """Fills in the rows of `out` that the planned chunks cover; q, out: [rows, heads, head_dim], contiguous.

    keys, values: [blocks, kv_heads, block_size, head_dim], head_dim a power of two from 16 on, in which the
    chunks' own positions are written already; block_table: int32 [slots, blocks].
    """
    _, heads, head_dim = q.shape
    _, kv_heads, block_size, _ = keys.shape
    assert q.is_contiguous() and out.is_contiguous()
    assert keys.stride() == values.stride() and keys.stride(3) == 1
    tile = work.tile
    described = tile.described and block_size % tile.keys == 0 and keys.is_contiguous()
    prefill_attention_kernel[(kv_heads, len(work.items))](
        q,
        describe(keys, tile.keys) if described else keys,
        describe(values, tile.keys) if described else values,
        out,
        block_table,
        work.items,
        work.partial,
        work.weight,
        scale * _LOG2_E,
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        block_table.stride(0),
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        GROUP_PADDED=work.group_padded,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        ROWS=tile.rows,
        KEYS=tile.keys,
        DESCRIBED=described,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if len(work.splits):
        height = work.partial.shape[1]
        combine_parts_kernel[(heads, height, len(work.splits))](
            out,
            work.splits,
            work.partial,
            work.weight,
            HEADS=heads,
            HEIGHT=height,
            HEAD_DIM=head_dim,
            BLOCK=16,
            num_warps=4,
        )
    return out
