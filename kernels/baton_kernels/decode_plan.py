"""A decode step's work list: every tile of keys that its rows see, shared out equally.

Made once per step on the device and walked by the attention of every layer. Tiles of a row follow each
other, rows too. Each program takes an equal share, so all have the same to read whatever the lengths are, and
what a program reads next does not wait for a row to end. A row's tiles within a share are a segment; a row of
several segments is combined in their order. A share is two ranges, one after the other: the rest of a row
that began in the share before, then everything else. So of a row's segments all but the first are through
long before that one is, and whoever has it seldom finds anything missing.
With a fixed chunk, ranges are chunks instead, at multiples of a number of positions of each row: then a row's
bits depend on its own length alone, not on its batch.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton_kernels.launch import machine
from baton_kernels.tiles import DecodeTile, tiles

CHUNK = 512  # positions of a chunk where a row's bits must be its own
MAX_ROWS = 1 << 12
FIELDS = tl.constexpr(5)  # of a tile: where its keys are, how many of them count, its row, segment, slot
LAST = tl.constexpr(256)  # added to the number of keys of a segment's last tile
WHOLE = tl.constexpr(-1)  # segment of a row that has but one
_LEAST_POSITIONS = 64  # of a share: shorter ones cost more to combine than to read
_TILES_TOGETHER = 128  # of a row, listed at a time: one for each thread


@dataclass(frozen=True, slots=True)
class DecodeWork:
    """A step's work list and the scratch space of its layers; made once, for the most rows there can be.

    `seen` and `slots`: int32 [rows], written by the caller before `plan`: positions that each row sees, its
    own among them, 0 for a row that is masked; whose row it is. Everything else belongs to these modules.
    """

    seen: Tensor
    slots: Tensor
    listed: Tensor  # int32 [most tiles, FIELDS]
    ranges: Tensor  # int32 [most ranges + 1]: first tile of each, and where the last one ends
    count: Tensor  # int32 [1], of ranges that hold something
    first: Tensor  # int32 [rows]: where a row's segments start in `partial` …
    parts: Tensor  # int32 [rows]: … and how many they are
    partial: Tensor  # float32 [most segments, heads, head_dim]
    weight: Tensor  # float32 [most segments, heads], log2 of the sum of exponentials
    arrived: Tensor  # int32 [rows, kv_heads], zero between launches
    tiles: tuple[DecodeTile, ...]  # by the number of rows; the last for any
    block_size: int
    processors: int
    chunk: int | None  # positions of a range, or None for equal shares

    @staticmethod
    def make(
        rows: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        block_size: int,
        max_length: int,
        device: torch.device | str,
        chunk: int | None = None,
        tile: DecodeTile | None = None,
    ) -> "DecodeWork":
        """Space for `rows` sequences of up to `max_length` positions.

        `chunk` (say, CHUNK) makes a row's bits the same in a batch of any size, with one tile for all.
        """
        device = torch.device(device)
        capability, processors = machine(device)
        fit = (tile,) if tile else tiles(capability).decode_for(block_size, head_dim)
        fit = fit[:1] if chunk else fit
        assert rows <= MAX_ROWS
        assert all((chunk or tile.keys) % tile.keys == 0 and tile.keys < LAST.value for tile in fit)
        lanes = max(_lanes(processors, tile, kv_heads) for tile in fit)
        most_ranges = rows * triton.cdiv(max_length, chunk) if chunk else 2 * lanes
        segments = most_ranges if chunk else rows + lanes

        def numbers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return DecodeWork(
            seen=numbers(rows),
            slots=numbers(rows),
            listed=numbers(rows * triton.cdiv(max_length, min(tile.keys for tile in fit)), FIELDS.value),
            ranges=numbers(most_ranges + 1),
            count=numbers(1),
            first=numbers(rows),
            parts=numbers(rows),
            partial=torch.empty((segments, heads, head_dim), dtype=torch.float32, device=device),
            weight=torch.empty((segments, heads), dtype=torch.float32, device=device),
            arrived=numbers(rows, kv_heads),
            tiles=fit,
            block_size=block_size,
            processors=processors,
            chunk=chunk,
        )

    def tile(self, rows: int) -> DecodeTile:
        """Of a step of so many rows."""
        fit = (tile for tile in self.tiles if tile.most_rows is None or rows <= tile.most_rows)
        return next(fit, self.tiles[-1])

    def lanes(self, rows: int) -> int:
        """Programs for each key head."""
        return _lanes(self.processors, self.tile(rows), self.arrived.shape[1])

    def described(self, rows: int) -> bool:
        """Whether keys come by the bulk copy engine: a tile then lies in one block."""
        tile = self.tile(rows)
        return tile.described and self.block_size % tile.keys == 0


def _lanes(processors: int, tile: DecodeTile, kv_heads: int) -> int:
    return max(1, processors * tile.programs // kv_heads)


@triton.jit
def plan_kernel(
    seen_ptr,
    slots_ptr,
    table_ptr,
    tiles_ptr,
    ranges_ptr,
    count_ptr,
    first_ptr,
    parts_ptr,
    rows,
    lanes,
    table_stride,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK_TILES: tl.constexpr,
    LEAST_TILES: tl.constexpr,
    DESCRIBED: tl.constexpr,
    ROWS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program, one row: it sums what the rows before it need and lists its own tiles.

    CHUNK_TILES: tiles of a chunk; 0 for equal shares, of LEAST_TILES or more. DESCRIBED: a tile's place is
    its line among [blocks · KV_HEADS · BLOCK_SIZE] for the first key head, else its first position.
    """
    row = tl.program_id(0)
    other = tl.arange(0, ROWS_PADDED)
    counts = tl.cdiv(tl.load(seen_ptr + other, mask=other < rows, other=0), KEYS)
    own, slot = tl.load(seen_ptr + row), tl.load(slots_ptr + row)
    table_ptr += slot.to(tl.int64) * table_stride
    own_tiles = tl.cdiv(own, KEYS)
    base, total = tl.sum(tl.where(other < row, counts, 0), 0), tl.sum(counts, 0)
    if CHUNK_TILES > 0:
        chunks = tl.cdiv(counts, CHUNK_TILES)
        lane = 0
        first = tl.sum(tl.where(other < row, chunks, 0), 0)
        count, parts = tl.sum(chunks, 0), tl.cdiv(own_tiles, CHUNK_TILES)
        size = CHUNK_TILES
    else:
        size = tl.maximum(tl.cdiv(total, lanes), LEAST_TILES)
        lane = base // size
        first = row + lane  # a new segment starts with each row and with each share
        count = 2 * tl.cdiv(total, size)
        parts = tl.where(own_tiles > 0, (base + own_tiles - 1) // size - lane + 1, 0)
    tl.store(first_ptr + row, first)
    tl.store(parts_ptr + row, parts)
    for start in range(0, own_tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        mask = tile < own_tiles
        counted = tile if CHUNK_TILES > 0 else base + tile
        segment = first + counted // size - lane
        last = ((counted + 1) % size == 0) | (tile == own_tiles - 1)
        position = tile * KEYS
        place = position
        if DESCRIBED:
            block = tl.load(table_ptr + position // BLOCK_SIZE, mask=mask, other=0)
            place = block * (KV_HEADS * BLOCK_SIZE) + position % BLOCK_SIZE
        valid = tl.minimum(own - position, KEYS)
        record_ptr = tiles_ptr + (base + tile) * FIELDS
        tl.store(record_ptr, place, mask=mask)
        tl.store(record_ptr + 1, tl.where(last, valid + LAST, valid), mask=mask)
        tl.store(record_ptr + 2, tl.zeros_like(tile) + row, mask=mask)
        tl.store(record_ptr + 3, tl.where(parts == 1, WHOLE, segment), mask=mask)
        tl.store(record_ptr + 4, tl.zeros_like(tile) + slot, mask=mask)
        begins = mask & (counted % size == 0)
        if CHUNK_TILES > 0:
            tl.store(ranges_ptr + segment, base + tile, mask=begins)
        else:
            rest = tl.where(parts > 1, tl.minimum(base + own_tiles, counted + size), counted)
            tl.store(ranges_ptr + counted // size * 2, counted, mask=begins)
            tl.store(ranges_ptr + counted // size * 2 + 1, rest, mask=begins)
    if row == 0:
        tl.store(count_ptr, count)
        tl.store(ranges_ptr + count, total)


def plan(work: DecodeWork, rows: int, block_table: Tensor) -> None:
    """Lists the step's work from `seen` and `slots` of these rows.

    block_table: int32 [slots, blocks]. Nothing waits for the device; fit for graph capture.
    """
    keys = work.tile(rows).keys
    plan_kernel[(rows,)](
        work.seen,
        work.slots,
        block_table,
        work.listed,
        work.ranges,
        work.count,
        work.first,
        work.parts,
        rows,
        work.lanes(rows),
        block_table.stride(0),
        KV_HEADS=work.arrived.shape[1],
        BLOCK_SIZE=work.block_size,
        KEYS=keys,
        CHUNK_TILES=work.chunk // keys if work.chunk else 0,
        LEAST_TILES=triton.cdiv(_LEAST_POSITIONS, keys),
        DESCRIBED=work.described(rows),
        ROWS_PADDED=triton.next_power_of_2(rows),
        BLOCK=_TILES_TOGETHER,
        num_warps=4,
    )
