"""Attention of one new token per sequence over the paged cache, balanced whatever the lengths are.

`decode_plan` lists what there is to read, once per step, as ranges of tiles of keys. A program walks some for
one key head, with all query heads that share it packed into a tile; it asks for the next tiles while it
works, across the rows' ends too. Whoever finishes the last segment of a (row, key head) combines them in the
order of positions.
Split after Flash-Decoding (Dao et al. 2023); online softmax after Milakov and Gimelshein (2018); equal ranges
after Stream-K (Osama et al. 2023).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton_kernels.decode_plan import FIELDS, LAST, WHOLE, DecodeWork
from baton_kernels.launch import INTERPRETED, ask_ahead, dependent, describe, let_downstream, wait_upstream

_LOG2_E = 1.4426950408889634
_NULL_SCORE = tl.constexpr(-1e30)  # of a row that sees nothing yet: finite, so that differences are numbers
_COMBINE = 16  # segments · heads combined at a time


@triton.jit
def _query(q_ptr, row, head, member, dim, GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """A row's query heads of one key head, [GROUP_PADDED, HEAD_DIM]."""
    place = (row * HEADS + head + member)[:, None] * HEAD_DIM + dim[None, :]
    q = tl.load(q_ptr + place, mask=(member < GROUP)[:, None], other=0.0)
    return q.to(tl.float32) if INTERPRETED else q


@triton.jit
def _range(ranges_ptr, index, count):
    """(first tile, end) of a range, which is empty from `count` on."""
    mask = index < count
    return tl.load(ranges_ptr + index, mask=mask, other=0), tl.load(
        ranges_ptr + index + 1, mask=mask, other=0
    )


@triton.jit
def _nothing(GROUP_PADDED: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The running three before the first tile: sums of weighted values and of weights, the highest score."""
    out = tl.zeros([GROUP_PADDED, HEAD_DIM], tl.float32)
    return out, tl.zeros([GROUP_PADDED], tl.float32), tl.full([GROUP_PADDED], _NULL_SCORE, tl.float32)


@triton.jit
def _keys_values(
    k_ptr,
    v_ptr,
    table_ptr,
    record_ptr,
    place,
    key,
    inside,
    dim,
    kv_head,
    block_stride,
    head_stride,
    token_stride,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """A tile's keys [HEAD_DIM, KEYS] and values [KEYS, HEAD_DIM].

    DESCRIBED: what is not `inside` is whatever lies there, values being finite (see `qk_rope_kv`).
    """
    if DESCRIBED:
        line = place + kv_head * BLOCK_SIZE
        k, v = k_ptr.load([line, 0]).T, v_ptr.load([line, 0])
    else:
        position = place + key
        table_ptr += tl.load(record_ptr + 4).to(tl.int64) * table_stride
        block = tl.load(table_ptr + position // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        source = block * block_stride + kv_head.to(tl.int64) * head_stride
        source += (position % BLOCK_SIZE) * token_stride
        k = tl.load(k_ptr + source[None, :] + dim[:, None], mask=inside[None, :], other=0.0)
        v = tl.load(v_ptr + source[:, None] + dim[None, :], mask=inside[:, None], other=0.0)
    return k, v


@triton.jit
def _fold(q, k, v, inside, out, total, maximum, scale_log2):
    """A tile of keys into the running three; what is not `inside` weighs nothing."""
    if INTERPRETED:
        k, v = k.to(tl.float32), v.to(tl.float32)
    scores = tl.where(inside[None, :], tl.dot(q, k), float("-inf"))
    highest = tl.maximum(maximum, tl.max(scores, 1) * scale_log2)
    keep = tl.exp2(maximum - highest)
    weights = tl.exp2(scores * scale_log2 - highest[:, None])
    total = total * keep + tl.sum(weights, 1)
    out = tl.dot(weights.to(v.dtype), v, out * keep[:, None])
    return out, total, highest


@triton.jit
def _store_segment(
    row,
    segment,
    head,
    member,
    dim,
    out,
    total,
    maximum,
    out_ptr,
    partial_ptr,
    weight_ptr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """What a segment found: the row's result where it is all of the row, else for `_combine`."""
    found = out / total[:, None]
    in_group = (member < GROUP)[:, None]
    if segment == WHOLE:
        target = (row * HEADS + head + member)[:, None] * HEAD_DIM + dim[None, :]
        tl.store(out_ptr + target, found.to(out_ptr.dtype.element_ty), mask=in_group)
    else:
        part = ((segment * HEADS + head) + member).to(tl.int64)
        tl.store(partial_ptr + part[:, None] * HEAD_DIM + dim[None, :], found, mask=in_group)
        tl.store(weight_ptr + part, maximum + tl.log2(total), mask=member < GROUP)


@triton.jit
def _combine(
    out_ptr,
    partial_ptr,
    weight_ptr,
    first,
    parts,
    head,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Folds a row's segments in order, for the heads of a group. Reads past the near cache: others wrote."""
    dim = tl.arange(0, HEAD_DIM)
    member = tl.arange(0, TOGETHER)
    maximum = tl.full([TOGETHER], _NULL_SCORE, tl.float32)
    total = tl.zeros([TOGETHER], tl.float32)
    out = tl.zeros([TOGETHER, HEAD_DIM], tl.float32)
    for start in range(0, parts, BLOCK):
        segment = start + tl.arange(0, BLOCK)
        inside = (segment < parts)[:, None] & (member < GROUP)[None, :]
        part = ((first + segment) * HEADS + head).to(tl.int64)[:, None] + member[None, :]
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
def decode_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    key_lines_ptr,
    value_lines_ptr,
    out_ptr,
    table_ptr,
    tiles_ptr,
    ranges_ptr,
    count_ptr,
    first_ptr,
    parts_ptr,
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
    KEYS: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKED: tl.constexpr,
    DESCRIBED: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs walk their ranges, one for each key head. q, out: [rows, KV_HEADS · GROUP, HEAD_DIM].

    DESCRIBED: keys and values come as descriptors of [blocks · KV_HEADS · BLOCK_SIZE, HEAD_DIM], not
    pointers. AHEAD: their first tile is asked for before the wait, for which lines are pointers.
    """
    HEADS: tl.constexpr = KV_HEADS * GROUP
    member, dim, key = tl.arange(0, GROUP_PADDED), tl.arange(0, HEAD_DIM), tl.arange(0, KEYS)
    kv_head = tl.program_id(0) % KV_HEADS
    head = kv_head * GROUP
    let_downstream(PDL)
    # the list is older than any chain of early launches, so it need not be waited for
    count = tl.load(count_ptr)
    lane, lanes = tl.program_id(0) // KV_HEADS, tl.num_programs(0) // KV_HEADS
    index = lane if CHUNKED else 2 * lane
    begin, end = _range(ranges_ptr, index, count)
    last = end
    if not CHUNKED:  # a share's two ranges lie side by side, and the first may be empty
        _, last = _range(ranges_ptr, index + 1, count)
        end = tl.where(begin < end, end, last)
    if AHEAD:
        line = (tl.load(tiles_ptr + begin * FIELDS) + kv_head * BLOCK_SIZE).to(tl.int64)
        some = (begin < last).to(tl.int32)
        ask_ahead(key_lines_ptr + line * HEAD_DIM, 0, some, KEYS * HEAD_DIM)
        ask_ahead(value_lines_ptr + line * HEAD_DIM, 0, some, KEYS * HEAD_DIM)
    while begin < end:
        top, bottom = tl.load(tiles_ptr + begin * FIELDS + 2), tl.load(tiles_ptr + (end - 1) * FIELDS + 2)
        # only the last row may go on in other ranges
        first, parts = tl.load(first_ptr + bottom), tl.load(parts_ptr + bottom)
        wait_upstream(PDL)
        q = _query(q_ptr, top, head, member, dim, GROUP, HEADS, HEAD_DIM)
        out, total, maximum = _nothing(GROUP_PADDED, HEAD_DIM)
        for tile in range(begin, end):
            record_ptr = tiles_ptr + tile * FIELDS
            place, valid = tl.load(record_ptr), tl.load(record_ptr + 1)
            inside = key < valid % LAST
            k, v = _keys_values(
                *(k_ptr, v_ptr, table_ptr, record_ptr, place, key, inside, dim, kv_head),
                *(block_stride, head_stride, token_stride, table_stride, BLOCK_SIZE, DESCRIBED),
            )
            out, total, maximum = _fold(q, k, v, inside, out, total, maximum, scale_log2)
            if valid >= LAST:  # of a segment: what it found is stored, and the next one begins
                row, segment = tl.load(record_ptr + 2), tl.load(record_ptr + 3)
                _store_segment(
                    *(row, segment, head, member, dim, out, total, maximum, out_ptr, partial_ptr),
                    *(weight_ptr, GROUP, HEADS, HEAD_DIM),
                )
                out, total, maximum = _nothing(GROUP_PADDED, HEAD_DIM)
                later = tl.load(record_ptr + FIELDS + 2, mask=tile + 1 < end, other=0)
                q = _query(q_ptr, later, head, member, dim, GROUP, HEADS, HEAD_DIM)
        if parts > 1:
            tl.debug_barrier()  # the whole program's partial result is written before it counts
            counter = arrived_ptr + bottom * KV_HEADS + kv_head
            if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == parts - 1:
                tl.debug_barrier()
                row_out = out_ptr + (bottom * HEADS + head) * HEAD_DIM
                _combine(
                    *(row_out, partial_ptr, weight_ptr, first, parts, head),
                    *(GROUP, HEADS, HEAD_DIM, TOGETHER, BLOCK),
                )
                tl.store(counter, 0)
        if CHUNKED:
            index += lanes
            begin, end = _range(ranges_ptr, index, count)
        else:
            begin, end = end, last
    wait_upstream(PDL)  # those without work too


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    work: DecodeWork,
    scale: float,
    *,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """[rows, heads, head_dim] for q of that shape, row i being slot `work.slots[i]`'s new token.

    keys, values: [blocks, kv_heads, block_size, head_dim], head_dim a power of two from 16 on, values finite
    wherever anything was ever written; block_table: int32 [slots, blocks], the one that `work` was planned
    with for these rows. With `pdl`, an ordinary launch lies between that plan and this one. Rows that see
    nothing keep what `out` held.
    """
    rows, heads, head_dim = q.shape
    _, kv_heads, block_size, _ = keys.shape
    assert q.is_contiguous() and keys.stride() == values.stride() and keys.stride(3) == 1
    assert block_size == work.block_size and work.arrived.shape == (len(work.seen), kv_heads)
    tile, described = work.tile(rows), work.described(rows)
    assert not described or keys.is_contiguous()
    out = torch.empty_like(q) if out is None else out
    pdl = dependent(pdl, q.device)
    group = heads // kv_heads
    together = triton.next_power_of_2(group)
    decode_attention_kernel[(work.lanes(rows) * kv_heads,)](
        q,
        describe(keys.view(-1, head_dim), tile.keys, head_dim) if described else keys,
        describe(values.view(-1, head_dim), tile.keys, head_dim) if described else values,
        keys,
        values,
        out,
        block_table,
        work.listed,
        work.ranges,
        work.count,
        work.first,
        work.parts,
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
        GROUP_PADDED=max(16, together),
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        KEYS=tile.keys,
        TOGETHER=together,
        BLOCK=max(1, _COMBINE // together),
        CHUNKED=work.chunk is not None,
        DESCRIBED=described,
        AHEAD=pdl and described,
        PDL=pdl,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **({"launch_pdl": True} if pdl else {}),
    )
    return out
