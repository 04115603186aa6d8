"""Attention of one new token per sequence over the paged cache, balanced whatever the lengths are.

A sequence is cut into chunks at multiples of a fixed number of positions. Once per step `plan` lists all
(row, chunk) pairs on the device, full chunks first; every layer walks that list with a grid that fills the
machine. A program takes one pair for one key head, with all query heads that share it packed into a tile.
Whoever finishes the last chunk of a (row, key head) combines them in the order of positions. So a row's bits
depend on its own length alone: not on the batch, the grid, or who came last.
Split after Flash-Decoding (Dao et al. 2023); online softmax after Milakov and Gimelshein (2018).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton_kernels.launch import INTERPRETED, dependent, describe, machine, wait_upstream
from baton_kernels.tiles import DecodeTile, tiles

# Positions of a chunk by the number of rows in a step: chunks are short where most of the machine would have
# nothing to do, long where there is work for all: each of several chunks costs a partial result.
CHUNKS = ((16, 128), (48, 256))  # (up to so many rows, positions)
CHUNK = 512  # with more rows
FEW_ROWS = CHUNKS[0][0]  # up to so many rows time is latency: larger tiles
MAX_ROWS = 1 << 12
_LOG2_E = 1.4426950408889634
_NULL_SCORE = tl.constexpr(-1e30)  # of a row that sees nothing yet: finite, so that differences are numbers
_FIELDS = tl.constexpr(5)
_COMBINE = 16  # chunks · heads combined at a time


@dataclass(frozen=True, slots=True)
class DecodeWork:
    """A step's work list and the scratch space of its layers; made once, for the most rows there can be.

    `seen` and `slots`: int32 [rows], written by the caller before `plan`: positions that each row sees, its
    own among them, 0 for a row that is masked; whose row it is. Everything else belongs to this module.
    """

    seen: Tensor
    slots: Tensor
    # int32 [most items, 5]: row, slot, chunk, what the row sees, where its partial results start
    items: Tensor
    count: Tensor  # int32 [1]
    partial: Tensor  # float32 [most items, heads, head_dim]
    weight: Tensor  # float32 [most items, heads], log2 of the sum of exponentials
    arrived: Tensor  # int32 [rows, kv_heads], zero between launches
    chunk: int | None  # the same for any number of rows, or None

    @staticmethod
    def make(
        rows: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        max_length: int,
        device: torch.device | str,
        chunk: int | None = None,
    ) -> "DecodeWork":
        """Space for `rows` sequences of up to `max_length` positions.

        `chunk` (say, CHUNK) makes a row's bits the same in a batch of any size.
        """
        assert rows <= MAX_ROWS
        classes = ((rows, chunk),) if chunk is not None else (*CHUNKS, (rows, CHUNK))
        most = max(min(rows, bound) * triton.cdiv(max_length, positions) for bound, positions in classes)

        def numbers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return DecodeWork(
            seen=numbers(rows),
            slots=numbers(rows),
            items=numbers(most, _FIELDS.value),
            count=numbers(1),
            partial=torch.empty((most, heads, head_dim), dtype=torch.float32, device=device),
            weight=torch.empty((most, heads), dtype=torch.float32, device=device),
            arrived=numbers(rows, kv_heads),
            chunk=chunk,
        )

    def chunk_for(self, rows: int) -> int:
        """Positions of a chunk in a step of so many rows."""
        return self.chunk or next((positions for bound, positions in CHUNKS if rows <= bound), CHUNK)


@triton.jit
def plan_kernel(
    seen_ptr,
    slots_ptr,
    items_ptr,
    count_ptr,
    rows,
    CHUNK: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program, one row: it sums what the rows before it need and lists its own chunks."""
    row = tl.program_id(0)
    other = tl.arange(0, PADDED)
    seen = tl.load(seen_ptr + other, mask=other < rows, other=0)
    own, slot = tl.load(seen_ptr + row), tl.load(slots_ptr + row)
    full = seen // CHUNK
    tail = (seen % CHUNK > 0).to(tl.int32)
    full_before = tl.sum(tl.where(other < row, full, 0), 0)
    tail_before = tl.sum(tl.where(other < row, tail, 0), 0)
    all_full = tl.sum(full, 0)
    first = full_before + tail_before
    for start in range(0, tl.cdiv(own, CHUNK), BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        place = tl.where(chunk < own // CHUNK, full_before + chunk, all_full + tail_before)
        mask = chunk < tl.cdiv(own, CHUNK)
        item_ptr = items_ptr + place * _FIELDS
        tl.store(item_ptr, tl.zeros_like(chunk) + row, mask=mask)
        tl.store(item_ptr + 1, tl.zeros_like(chunk) + slot, mask=mask)
        tl.store(item_ptr + 2, chunk, mask=mask)
        tl.store(item_ptr + 3, tl.zeros_like(chunk) + own, mask=mask)
        tl.store(item_ptr + 4, tl.zeros_like(chunk) + first, mask=mask)
    if row == 0:
        tl.store(count_ptr, all_full + tl.sum(tail, 0))


@triton.jit
def _fold_tile(
    q,
    out,
    total,
    maximum,
    k_ptr,
    v_ptr,
    table_ptr,
    start,
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
    """Positions [start, start + KEYS) into the running three; MASKED: only those below `high`."""
    dim = tl.arange(0, HEAD_DIM)
    position = start + tl.arange(0, KEYS)
    inside = position < high
    if DESCRIBED:  # the tile lies in one block
        block = tl.load(table_ptr + start // BLOCK_SIZE)
        line = (block * KV_HEADS + kv_head) * BLOCK_SIZE + start % BLOCK_SIZE
        k = k_ptr.load([line, 0]).T
        v = v_ptr.load([line, 0])
        if MASKED:  # what lies behind `high` may be anything, NaN too
            v = tl.where(inside[:, None], v, 0.0)
    else:
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
        scores = tl.where(inside[None, :], scores, float("-inf"))
    highest = tl.maximum(maximum, tl.max(scores, 1) * scale_log2)
    keep = tl.exp2(maximum - highest)
    weights = tl.exp2(scores * scale_log2 - highest[:, None])
    total = total * keep + tl.sum(weights, 1)
    out = tl.dot(weights.to(v.dtype), v, out * keep[:, None])
    return out, total, highest


@triton.jit
def _combine(
    out_ptr,
    partial_ptr,
    weight_ptr,
    first,
    chunks,
    head,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Folds a row's chunks in order, for the heads of a group. Reads past the near cache: others wrote."""
    dim = tl.arange(0, HEAD_DIM)
    member = tl.arange(0, TOGETHER)
    maximum = tl.full([TOGETHER], _NULL_SCORE, tl.float32)
    total = tl.zeros([TOGETHER], tl.float32)
    out = tl.zeros([TOGETHER, HEAD_DIM], tl.float32)
    for start in range(0, chunks, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        inside = (chunk < chunks)[:, None] & (member < GROUP)[None, :]
        part = ((first + chunk) * HEADS + head).to(tl.int64)[:, None] + member[None, :]
        weight = tl.load(weight_ptr + part, mask=inside, other=float("-inf"), cache_modifier=".cg")
        source = partial_ptr + part[:, :, None] * HEAD_DIM + dim[None, None, :]
        values = tl.load(source, mask=inside[:, :, None], other=0.0, cache_modifier=".cg")
        highest = tl.maximum(maximum, tl.max(weight, 0))
        keep = tl.exp2(maximum - highest)
        share = tl.exp2(weight - highest[None, :])
        total = total * keep + tl.sum(share, 0)
        out = out * keep[:, None] + tl.sum(values * share[:, :, None], 0)
        maximum = highest
    out = out / tl.where(total > 0, total, 1.0)[:, None]
    target = out_ptr + member[:, None] * HEAD_DIM + dim[None, :]
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=(member < GROUP)[:, None])


@triton.jit
def _item(items_ptr, index, most):
    """(row, slot, chunk, seen, first) of an item, zeros beyond the list's end."""
    item_ptr = items_ptr + index * _FIELDS
    mask = index < most
    row = tl.load(item_ptr, mask=mask, other=0)
    slot = tl.load(item_ptr + 1, mask=mask, other=0)
    chunk = tl.load(item_ptr + 2, mask=mask, other=0)
    seen = tl.load(item_ptr + 3, mask=mask, other=0)
    return row, slot, chunk, seen, tl.load(item_ptr + 4, mask=mask, other=0)


@triton.jit
def decode_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    table_ptr,
    items_ptr,
    count_ptr,
    partial_ptr,
    weight_ptr,
    arrived_ptr,
    scale_log2,
    most,
    block_stride,
    head_stride,
    token_stride,
    table_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK: tl.constexpr,
    DESCRIBED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs stride over (item, key head). q, out: [rows, KV_HEADS · GROUP, HEAD_DIM], contiguous.

    DESCRIBED: keys and values come as descriptors of [blocks · KV_HEADS · BLOCK_SIZE, HEAD_DIM], not
    pointers.
    """
    HEADS: tl.constexpr = KV_HEADS * GROUP
    member = tl.arange(0, GROUP_PADDED)
    dim = tl.arange(0, HEAD_DIM)
    in_group = (member < GROUP)[:, None]
    wait_upstream(PDL)
    work = tl.program_id(0)
    works = tl.load(count_ptr) * KV_HEADS
    row, slot, chunk, seen, first = _item(items_ptr, work // KV_HEADS, most)
    while work < works:
        later = work + tl.num_programs(0)
        later_row, later_slot, later_chunk, later_seen, later_first = _item(
            items_ptr, later // KV_HEADS, most
        )
        kv_head = work % KV_HEADS
        head = kv_head * GROUP
        place = (row * HEADS + head + member)[:, None] * HEAD_DIM + dim[None, :]
        q = tl.load(q_ptr + place, mask=in_group, other=0.0)
        if INTERPRETED:
            q = q.to(tl.float32)
        low = chunk * CHUNK
        high = tl.minimum(low + CHUNK, seen)
        # masking pointers costs nothing; what a descriptor brings is masked in a loop of its own
        plain = low + (high - low) // KEYS * KEYS if DESCRIBED else low
        row_table = table_ptr + slot.to(tl.int64) * table_stride
        maximum = tl.full([GROUP_PADDED], _NULL_SCORE, tl.float32)
        total = tl.zeros([GROUP_PADDED], tl.float32)
        out = tl.zeros([GROUP_PADDED, HEAD_DIM], tl.float32)
        if DESCRIBED:
            for start in range(low, plain, KEYS):
                out, total, maximum = _fold_tile(
                    *(q, out, total, maximum, k_ptr, v_ptr, row_table, start, high, scale_log2),
                    *(kv_head, block_stride, head_stride, token_stride),
                    *(KV_HEADS, HEAD_DIM, BLOCK_SIZE, KEYS, DESCRIBED, False),
                )
        for start in range(plain, high, KEYS):
            out, total, maximum = _fold_tile(
                *(q, out, total, maximum, k_ptr, v_ptr, row_table, start, high, scale_log2),
                *(kv_head, block_stride, head_stride, token_stride),
                *(KV_HEADS, HEAD_DIM, BLOCK_SIZE, KEYS, DESCRIBED, True),
            )
        out = out / total[:, None]
        chunks = tl.cdiv(seen, CHUNK)
        if chunks == 1:
            tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=in_group)
        else:
            part = ((first + chunk) * HEADS + head + member).to(tl.int64)
            tl.store(partial_ptr + part[:, None] * HEAD_DIM + dim[None, :], out, mask=in_group)
            tl.store(weight_ptr + part, maximum + tl.log2(total), mask=member < GROUP)
            tl.debug_barrier()  # the whole program's partial result is written before it counts as arrived
            counter = arrived_ptr + row * KV_HEADS + kv_head
            if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == chunks - 1:
                tl.debug_barrier()
                row_out = out_ptr + (row * HEADS + head) * HEAD_DIM
                _combine(
                    *(row_out, partial_ptr, weight_ptr, first, chunks, head),
                    *(GROUP, HEADS, HEAD_DIM, TOGETHER, BLOCK),
                )
                tl.store(counter, 0)
        work = later
        row, slot, chunk, seen, first = later_row, later_slot, later_chunk, later_seen, later_first


def plan(work: DecodeWork, rows: int) -> None:
    """Lists the step's work from `seen` and `slots` of these rows.

    Nothing waits for the device; fit for graph capture.
    """
    plan_kernel[(rows,)](
        work.seen,
        work.slots,
        work.items,
        work.count,
        rows,
        CHUNK=work.chunk_for(rows),
        PADDED=triton.next_power_of_2(rows),
        BLOCK=32,
        num_warps=4,
    )


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    work: DecodeWork,
    scale: float,
    *,
    out: Tensor | None = None,
    tile: DecodeTile | None = None,
    pdl: bool = False,
) -> Tensor:
    """[rows, heads, head_dim] for q of that shape, row i being slot `work.slots[i]`'s new token.

    keys, values: [blocks, kv_heads, block_size, head_dim], head_dim a power of two from 16 on;
    block_table: int32 [slots, blocks]; `work` planned for these rows. Rows that see nothing keep what `out`
    held.
    """
    rows, heads, head_dim = q.shape
    _, kv_heads, block_size, _ = keys.shape
    assert q.is_contiguous() and keys.stride() == values.stride() and keys.stride(3) == 1
    capability, processors = machine(q.device)
    chunk = work.chunk_for(rows)
    if tile is None:
        table = tiles(capability)
        if head_dim > 128 or work.chunk is not None or rows > FEW_ROWS:
            tile = table.decode_for(block_size, head_dim)
        else:
            tile = table.decode
    out = torch.empty_like(q) if out is None else out
    pdl = dependent(pdl, q.device)
    group = heads // kv_heads
    together = triton.next_power_of_2(group)
    described = tile.described and block_size % tile.keys == 0 and keys.is_contiguous()
    most = min(len(work.items), rows * triton.cdiv(block_table.shape[1] * block_size, chunk))
    decode_attention_kernel[(min(processors * tile.programs, most * kv_heads),)](
        q,
        describe(keys, tile.keys) if described else keys,
        describe(values, tile.keys) if described else values,
        out,
        block_table,
        work.items,
        work.count,
        work.partial,
        work.weight,
        work.arrived,
        scale * _LOG2_E,
        len(work.items),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        block_table.stride(0),
        KV_HEADS=kv_heads,
        GROUP=group,
        GROUP_PADDED=max(16, together),
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        CHUNK=chunk,
        KEYS=tile.keys,
        TOGETHER=together,
        BLOCK=max(1, _COMBINE // together),
        DESCRIBED=described,
        PDL=pdl,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **({"launch_pdl": True} if pdl else {}),
    )
    return out
