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

from baton_kernels.launch import INTERPRETED, dependent, machine, wait_upstream
from baton_kernels.tiles import DecodeTile, tiles

CHUNK = 256  # positions; part of what a row's bits depend on
MAX_ROWS = 1 << 12
_ROW_BITS = 12
_LOG2_E = 1.4426950408889634
_NULL_SCORE = tl.constexpr(-1e30)  # of a row that sees nothing yet: finite, so that differences are numbers
_COMBINE = tl.constexpr(16)  # chunks combined at a time


@dataclass(frozen=True, slots=True)
class DecodeWork:
    """A step's work list and the scratch space of its layers; made once, for the most rows there can be.

    `seen`: int32 [rows], written by the caller before `plan`: positions that each row sees, its own among
    them; 0 for a row that is masked. Everything else belongs to this module.
    """

    seen: Tensor
    items: Tensor  # int32 [most items], chunk << _ROW_BITS | row
    first: Tensor  # int32 [rows], where the row's partial results start
    count: Tensor  # int32 [1]
    partial: Tensor  # float32 [most items, heads, head_dim]
    weight: Tensor  # float32 [most items, heads], log2 of the sum of exponentials
    arrived: Tensor  # int32 [rows, kv_heads], zero between launches
    chunk: int

    @staticmethod
    def make(
        rows: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        max_length: int,
        device: torch.device | str,
        chunk: int = CHUNK,
    ) -> "DecodeWork":
        """Space for `rows` sequences of up to `max_length` positions."""
        assert rows <= MAX_ROWS and max_length // chunk < 1 << (31 - _ROW_BITS)
        most = rows * -(-max_length // chunk)

        def numbers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return DecodeWork(
            seen=numbers(rows),
            items=numbers(most),
            first=numbers(rows),
            count=numbers(1),
            partial=torch.empty((most, heads, head_dim), dtype=torch.float32, device=device),
            weight=torch.empty((most, heads), dtype=torch.float32, device=device),
            arrived=numbers(rows, kv_heads),
            chunk=chunk,
        )


@triton.jit
def plan_kernel(
    seen_ptr,
    items_ptr,
    first_ptr,
    count_ptr,
    rows,
    CHUNK: tl.constexpr,
    ROW_BITS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program, one row: it sums what the rows before it need and lists its own chunks."""
    row = tl.program_id(0)
    other = tl.arange(0, PADDED)
    seen = tl.load(seen_ptr + other, mask=other < rows, other=0)
    full = seen // CHUNK
    tail = (seen % CHUNK > 0).to(tl.int32)
    full_before = tl.sum(tl.where(other < row, full, 0), 0)
    tail_before = tl.sum(tl.where(other < row, tail, 0), 0)
    own = tl.load(seen_ptr + row)
    tl.store(first_ptr + row, full_before + tail_before)
    for start in range(0, own // CHUNK, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        tl.store(items_ptr + full_before + chunk, (chunk << ROW_BITS) | row, mask=chunk < own // CHUNK)
    all_full = tl.sum(full, 0)
    if own % CHUNK > 0:
        tl.store(items_ptr + all_full + tail_before, ((own // CHUNK) << ROW_BITS) | row)
    if row == 0:
        tl.store(count_ptr, all_full + tl.sum(tail, 0))


@triton.jit
def _attend_chunk(
    q,
    k_ptr,
    v_ptr,
    table_ptr,
    low,
    high,
    scale_log2,
    block_stride,
    token_stride,
    GROUP_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Positions [low, high) of a key head: (weighted values, not normalised; their weight; the maximum)."""
    dim = tl.arange(0, HEAD_DIM)
    key = tl.arange(0, KEYS)
    maximum = tl.full([GROUP_PADDED], _NULL_SCORE, tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    out = tl.zeros([GROUP_PADDED, HEAD_DIM], tl.float32)
    for start in range(low, high, KEYS):
        position = start + key
        inside = position < high
        block = tl.load(table_ptr + position // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        source = block * block_stride + (position % BLOCK_SIZE) * token_stride
        k = tl.load(k_ptr + source[None, :] + dim[:, None], mask=inside[None, :], other=0.0)
        v = tl.load(v_ptr + source[:, None] + dim[None, :], mask=inside[:, None], other=0.0)
        if INTERPRETED:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.where(inside[None, :], tl.dot(q, k) * scale_log2, float("-inf"))
        highest = tl.maximum(maximum, tl.max(scores, 1))
        keep = tl.exp2(maximum - highest)
        weights = tl.exp2(scores - highest[:, None])
        total = total * keep + tl.sum(weights, 1)
        out = tl.dot(weights.to(v.dtype), v, out * keep[:, None])
        maximum = highest
    return out, total, maximum


@triton.jit
def _combine_head(partial_ptr, weight_ptr, chunks, stride, head_stride, HEAD_DIM: tl.constexpr):
    """One head's chunks, folded in order: [HEAD_DIM]. Reads past the first-level cache: others wrote it."""
    dim = tl.arange(0, HEAD_DIM)
    maximum = tl.full([1], _NULL_SCORE, tl.float32)
    total = tl.zeros([1], tl.float32)
    out = tl.zeros([HEAD_DIM], tl.float32)
    for start in range(0, chunks, _COMBINE):
        chunk = start + tl.arange(0, _COMBINE)
        inside = chunk < chunks
        weight = tl.load(weight_ptr + chunk * stride, mask=inside, other=float("-inf"), cache_modifier=".cg")
        source = partial_ptr + chunk[:, None].to(tl.int64) * head_stride * stride + dim[None, :]
        part = tl.load(source, mask=inside[:, None], other=0.0, cache_modifier=".cg")
        highest = tl.maximum(maximum, tl.max(weight, 0))
        keep = tl.exp2(maximum - highest)
        share = tl.exp2(weight - highest)
        total = total * keep + tl.sum(share, 0)
        out = out * keep + tl.sum(part * share[:, None], 0)
        maximum = highest
    return out / total


@triton.jit
def decode_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    table_ptr,
    seen_ptr,
    items_ptr,
    first_ptr,
    count_ptr,
    partial_ptr,
    weight_ptr,
    arrived_ptr,
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
    CHUNK: tl.constexpr,
    ROW_BITS: tl.constexpr,
    KEYS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs stride over (item, key head). q, out: [rows, KV_HEADS · GROUP, HEAD_DIM], contiguous."""
    HEADS: tl.constexpr = KV_HEADS * GROUP
    member = tl.arange(0, GROUP_PADDED)
    dim = tl.arange(0, HEAD_DIM)
    in_group = (member < GROUP)[:, None]
    wait_upstream(PDL)
    for work in range(tl.program_id(0), tl.load(count_ptr) * KV_HEADS, tl.num_programs(0)):
        item = tl.load(items_ptr + work // KV_HEADS)
        kv_head = work % KV_HEADS
        row, chunk = item & ((1 << ROW_BITS) - 1), item >> ROW_BITS
        seen = tl.load(seen_ptr + row)
        head = kv_head * GROUP
        place = (row * HEADS + head + member)[:, None] * HEAD_DIM + dim[None, :]
        q = tl.load(q_ptr + place, mask=in_group, other=0.0)
        if INTERPRETED:
            q = q.to(tl.float32)
        out, total, maximum = _attend_chunk(
            q,
            k_ptr + kv_head.to(tl.int64) * head_stride,
            v_ptr + kv_head.to(tl.int64) * head_stride,
            table_ptr + row.to(tl.int64) * table_stride,
            chunk * CHUNK,
            tl.minimum(chunk * CHUNK + CHUNK, seen),
            scale_log2,
            block_stride,
            token_stride,
            GROUP_PADDED,
            HEAD_DIM,
            BLOCK_SIZE,
            KEYS,
        )
        out = out / total[:, None]
        chunks = tl.cdiv(seen, CHUNK)
        if chunks == 1:
            tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=in_group)
        else:
            first = tl.load(first_ptr + row)
            part = ((first + chunk) * HEADS + head + member).to(tl.int64)
            tl.store(partial_ptr + part[:, None] * HEAD_DIM + dim[None, :], out, mask=in_group)
            tl.store(weight_ptr + part, maximum + tl.log2(total), mask=member < GROUP)
            tl.debug_barrier()  # the whole program's partial result is written before it counts as arrived
            counter = arrived_ptr + row * KV_HEADS + kv_head
            if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == chunks - 1:
                tl.debug_barrier()
                for one in range(GROUP):
                    base = (first * HEADS + head + one).to(tl.int64)
                    combined = _combine_head(
                        partial_ptr + base * HEAD_DIM, weight_ptr + base, chunks, HEADS, HEAD_DIM, HEAD_DIM
                    )
                    target = out_ptr + (row * HEADS + head + one) * HEAD_DIM + dim
                    tl.store(target, combined.to(out_ptr.dtype.element_ty))
                tl.store(counter, 0)


def plan(work: DecodeWork, rows: int) -> None:
    """Lists the step's work from `work.seen[:rows]`. Nothing waits for the device; fit for graph capture."""
    plan_kernel[(rows,)](
        work.seen,
        work.items,
        work.first,
        work.count,
        rows,
        CHUNK=work.chunk,
        ROW_BITS=_ROW_BITS,
        PADDED=triton.next_power_of_2(rows),
        BLOCK=64,
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
    """[rows, heads, head_dim] for q of that shape, row i being the new token of the sequence in slot i.

    keys, values: [blocks, kv_heads, block_size, head_dim], head_dim a power of two from 16 on;
    block_table: int32 [slots, blocks]; `work` planned for these rows. Rows that see nothing keep what `out`
    held.
    """
    rows, heads, head_dim = q.shape
    _, kv_heads, block_size, _ = keys.shape
    assert q.is_contiguous() and keys.stride() == values.stride() and keys.stride(3) == 1
    capability, processors = machine(q.device)
    tile = tile or tiles(capability).decode
    out = torch.empty_like(q) if out is None else out
    pdl = dependent(pdl, q.device)
    group = heads // kv_heads
    most = rows * kv_heads * -(-block_table.shape[1] * block_size // work.chunk)
    decode_attention_kernel[(min(processors * tile.programs, most),)](
        q,
        keys,
        values,
        out,
        block_table,
        work.seen,
        work.items,
        work.first,
        work.count,
        work.partial,
        work.weight,
        work.arrived,
        scale * _LOG2_E,
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        block_table.stride(0),
        KV_HEADS=kv_heads,
        GROUP=group,
        GROUP_PADDED=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        CHUNK=work.chunk,
        ROW_BITS=_ROW_BITS,
        KEYS=tile.keys,
        PDL=pdl,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **({"launch_pdl": True} if pdl else {}),
    )
    return out
