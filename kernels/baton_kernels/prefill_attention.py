"""Attention of prompt chunks over the paged cache: causal, after any prefix, several prompts at once.

All query heads that share a key head lie in one tile: row i of a tile is query row i // group, head i %
group. The host lists the tiles (it knows the chunks from the plan), those that see most first. Where tiles
are few, as after a prefix hit, they may be split at multiples of a span, so that the machine is filled; a
second kernel combines the parts in the order of positions. A list may be longer than what is in it: tiles and
splits without rows are passed over, so that a captured pass serves any chunks that fit.
Online softmax after Milakov and Gimelshein (2018), tiling after FlashAttention-2 (Dao 2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from baton_kernels.launch import INTERPRETED, describe, machine
from baton_kernels.tiles import PrefillTile, tiles

SPAN = 256  # positions of a part, where a tile is split; doubled until all parts run at a time …
PARTS = 64  # … and are at most so many: each leaves a partial result behind
ITEM_FIELDS, SPLIT_FIELDS = 8, 4
_COMBINE = 64  # parts · heads combined at a time
_PROGRAMS = 2  # that a multiprocessor runs at a time
_LOG2_E = 1.4426950408889634
_NULL_SCORE = tl.constexpr(-1e30)
_FIELDS = tl.constexpr(ITEM_FIELDS)
_SPLIT_FIELDS = tl.constexpr(SPLIT_FIELDS)

Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """`rows` consecutive rows of the batch from `first` on: positions `start` … of the sequence in `slot`."""

    slot: int
    first: int
    rows: int
    start: int


@dataclass(frozen=True, slots=True)
class Tiling:
    """How chunks are cut into tiles, by shape and machine."""

    tile: PrefillTile
    group_padded: int
    height: int  # query rows of a tile
    most_split: int  # tiles: where there are more, none is split
    most_parts: int

    @staticmethod
    def make(
        heads: int,
        kv_heads: int,
        head_dim: int,
        block_size: int,
        device: torch.device,
        tile: PrefillTile | None = None,
    ) -> "Tiling":
        """For a cache of blocks of `block_size` positions."""
        capability, processors = machine(device)
        tile = tile or tiles(capability).prefill_for(block_size, head_dim)
        padded = triton.next_power_of_2(heads // kv_heads)
        height = max(1, tile.rows // padded)
        at_a_time = _PROGRAMS * processors // kv_heads
        return Tiling(tile, padded, height, processors // (2 * kv_heads), min(PARTS, at_a_time))

    def cut(
        self, slot: Numbers, first: Numbers, rows: Numbers, start: Numbers, *, split: bool = True
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """(items [n, 8], splits [m, 4]) of chunks as `PromptChunk`; see `PrefillWork`.

        `split`: whether tiles may be split where they are few.
        """
        height = self.height
        counts = -(-rows // height)
        chunk = np.arange(len(rows)).repeat(counts)
        done = (np.arange(len(chunk)) - (counts.cumsum() - counts)[chunk]) * height
        seen = np.minimum(start[chunk] + done + height, (start + rows)[chunk])
        order = np.argsort(-seen, kind="stable")
        chunk, done, seen = chunk[order], done[order], seen[order]
        parts, span = np.zeros_like(seen), SPAN
        if split and len(seen) <= self.most_split:
            while (parts := np.where(seen > span, -(-seen // span), 0)).sum() > self.most_parts:
                span *= 2
        pieces = np.maximum(parts, 1)
        tile = np.arange(len(seen)).repeat(pieces)
        piece = np.arange(len(tile)) - (pieces.cumsum() - pieces)[tile]
        before = parts.cumsum() - parts  # parts of the tiles before
        items = np.zeros((len(tile), ITEM_FIELDS), np.int32)
        items[:, 0] = (first[chunk] + done)[tile]
        items[:, 1] = np.minimum(rows[chunk] - done, height)[tile]
        items[:, 2] = slot[chunk][tile]
        items[:, 3] = (start[chunk] + done)[tile]
        items[:, 4] = piece * span
        items[:, 5] = np.where(parts[tile] > 0, np.minimum((piece + 1) * span, seen[tile]), seen[tile])
        items[:, 6] = np.where(parts[tile] > 0, before[tile] + piece, -1)
        of_split = parts.nonzero()[0]
        splits = np.zeros((len(of_split), SPLIT_FIELDS), np.int32)
        splits[:, 0] = (first[chunk] + done)[of_split]
        splits[:, 1] = np.minimum(rows[chunk] - done, height)[of_split]
        splits[:, 2], splits[:, 3] = before[of_split], parts[of_split]
        return items, splits

    def work(
        self, items: Tensor, splits: Tensor, heads: int, head_dim: int, parts: int = PARTS
    ) -> "PrefillWork":
        """The lists, on the device, with space for so many parts."""
        size = (parts, self.height, heads)
        return PrefillWork(
            items=items,
            splits=splits,
            partial=torch.empty((*size, head_dim), dtype=torch.float32, device=items.device),
            weight=torch.empty(size, dtype=torch.float32, device=items.device),
            tile=self.tile,
            group_padded=self.group_padded,
        )


@dataclass(frozen=True, slots=True)
class PrefillWork:
    """A step's tiles, shared by its layers."""

    # int32 [items, 8]: first row, rows (0: passed over), slot, first position, low, high, part or -1, unused
    items: Tensor
    splits: Tensor  # int32 [split tiles, 4]: first row, rows (0: passed over), first part, parts
    partial: Tensor  # float32 [parts, rows of a tile, heads, head_dim]
    weight: Tensor  # float32 [parts, rows of a tile, heads], log2 of the sum of exponentials
    tile: PrefillTile
    group_padded: int

    def over(self, items: Tensor, splits: Tensor) -> "PrefillWork":
        """Other lists, the same space."""
        return replace(self, items=items, splits=splits)


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
    """Tiles of the chunks, on the device, for a cache of blocks of `block_size` positions."""
    tiling = Tiling.make(heads, kv_heads, head_dim, block_size, device, tile)
    columns = np.array([(c.slot, c.first, c.rows, c.start) for c in chunks], np.int64).T
    items, splits = (torch.from_numpy(x).to(device) for x in tiling.cut(*columns, split=split))
    return tiling.work(items, splits, heads, head_dim)


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
    if rows == 0:
        return
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
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    HEIGHT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row of a tile, split tile, key head): folds parts of its heads in order, BLOCK at a time."""
    row = tl.program_id(0)
    heads = tl.num_programs(2) * GROUP
    split_ptr = splits_ptr + tl.program_id(1) * _SPLIT_FIELDS
    rows, first_part, parts = tl.load(split_ptr + 1), tl.load(split_ptr + 2), tl.load(split_ptr + 3)
    if row >= rows:
        return
    member = tl.arange(0, GROUP_PADDED)
    head = tl.program_id(2) * GROUP + member
    dim = tl.arange(0, HEAD_DIM)
    maximum = tl.full([GROUP_PADDED], _NULL_SCORE, tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    out = tl.zeros([GROUP_PADDED, HEAD_DIM], tl.float32)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        inside = (part < parts)[:, None] & (member < GROUP)[None, :]
        slab = ((first_part + part) * HEIGHT + row).to(tl.int64)[:, None] * heads + head[None, :]
        weight = tl.load(weight_ptr + slab, mask=inside, other=_NULL_SCORE)
        source = partial_ptr + slab[:, :, None] * HEAD_DIM + dim[None, None, :]
        values = tl.load(source, mask=inside[:, :, None], other=0.0)
        highest = tl.maximum(maximum, tl.max(weight, 0))
        keep, share = tl.exp2(maximum - highest), tl.exp2(weight - highest[None, :])
        total = total * keep + tl.sum(share, 0)
        out = out * keep[:, None] + tl.sum(values * share[:, :, None], 0)
        maximum = highest
    place = (tl.load(split_ptr) + row).to(tl.int64) * heads + head
    target = out_ptr + place[:, None] * HEAD_DIM + dim[None, :]
    tl.store(target, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=(member < GROUP)[:, None])


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
        describe(keys.view(-1, head_dim), tile.keys, head_dim) if described else keys,
        describe(values.view(-1, head_dim), tile.keys, head_dim) if described else values,
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
        **({} if tile.registers is None else {"maxnreg": tile.registers}),
    )
    if len(work.splits):
        height = work.partial.shape[1]
        combine_parts_kernel[(min(height, len(q)), len(work.splits), kv_heads)](
            out,
            work.splits,
            work.partial,
            work.weight,
            GROUP=heads // kv_heads,
            GROUP_PADDED=work.group_padded,
            HEIGHT=height,
            HEAD_DIM=head_dim,
            BLOCK=max(1, _COMBINE // work.group_padded),
            num_warps=4,
        )
    return out
