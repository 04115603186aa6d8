"""Paged attention in torch operations: decodes and prompt chunks in one way, with the same bits for a row.

Rows of a sequence form tiles; all query heads that share a key head lie in one tile, so a matrix product has
`rows · group` rows, padded to a multiple of 8. Tiles are sorted by how far they see, farthest first: those
that see chunk j, at level j, are the first n_j.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from baton_kernels import reference
from baton_kernels.reference import RmsOf
from gpu_worker.attention.interface import AttentionShape, Batch, Context, Numbers
from gpu_worker.exactness import batched_is_exact
from gpu_worker.layers.norm import QKNormRope

_TILE_PRODUCT_ROWS = 64  # rows · group of a tile of a prompt chunk
_SPAN_BYTES = 8 << 20  # keys and values gathered at a time: they should still be in cache when used
_MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class Piece:
    """Tiles [first, last) of a group at one level, the results of which begin at `start` in their span's."""

    level: int
    first: int
    last: int
    start: int


@dataclass(frozen=True, slots=True)
class Span:
    """Some (level, tile) pairs, level by level, that are computed together."""

    pieces: list[Piece]
    queries: Tensor | None  # int64: (tile, kv head) of each product; None: there is one piece, take a slice
    places: (
        Tensor  # int64: of their keys, then of their values, in the cache, flattened to (block, k/v, head)
    )
    hidden: Tensor | None  # bool [pairs, 1, m or 1, chunk]: what rows may not see


@dataclass(frozen=True, slots=True)
class Group:
    """Tiles of equal height, [tiles, height] rows."""

    tiles: int
    height: int
    rows: Tensor | None  # int64 [tiles · height], rows of the batch, some twice where a tile is not full …
    kept: Tensor | None  # … these of them not; None: the tiles are the batch's first rows, in order
    spans: list[Span]


@dataclass(frozen=True, slots=True)
class Work:
    """A step's plan."""

    written: Tensor | None  # int64: rows whose keys and values go into the cache; None: the first ones …
    places: Tensor  # … int64 [written · 2 · kv_heads], and where, as `reference.write_kv`
    groups: list[Group]


class TorchAttention:
    """The reference backend, and the one for CPU.

    Cache: [layers, blocks + 1, 2, kv_heads, block_size, head_dim].
    """

    def __init__(self, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.blocks_multiple = max(1, reference.CHUNK // shape.block_size)
        self._chunk = self.blocks_multiple * shape.block_size
        bytes_per_tile = 2 * self._chunk * shape.kv_heads * shape.head_dim * dtype.itemsize
        self._pairs_per_span = max(1, _SPAN_BYTES // bytes_per_tile)
        self._height = _MULTIPLE * max(1, _TILE_PRODUCT_ROWS // (_MULTIPLE * shape.group))
        self._heads = np.arange(2 * shape.kv_heads)
        # [2, 1, kv_heads, 1]: what to add to a block's place for its keys, its values, of each head
        self._head_places = self._heads.reshape(2, 1, -1, 1)

    def cache(self, layers: int, blocks: int) -> Tensor:
        """See `Attention.cache`."""
        s = self.shape
        size = (layers, blocks + 1, 2, s.kv_heads, s.block_size, s.head_dim)
        return torch.zeros(size, dtype=self.dtype, device=self.device)

    def is_exact(self) -> bool:
        """See `Attention.is_exact`."""
        return batched_is_exact(self.shape.kv_heads, self.shape.head_dim, self._chunk, _MULTIPLE)

    def clear(self, cache: Tensor, blocks: Tensor) -> None:
        """Zeros: a hidden value has weight 0, but 0 · NaN, from an owner whose numbers broke, is NaN."""
        cache[:, blocks] = 0

    def plan(self, batch: Batch, block_table: Tensor) -> Work:
        """See `Attention.plan`."""
        table, size = block_table.numpy(), self.shape.block_size
        slots, positions, written = batch.slots, batch.positions, None
        if batch.written is not None:
            slots, positions = slots[batch.written], positions[batch.written]
            written = torch.from_numpy(batch.written)
        blocks = table[slots, positions // size].astype(np.int64)
        places = (blocks[:, None] * len(self._heads) + self._heads) * size + (positions % size)[:, None]
        groups, start = [], batch.decodes
        if batch.decodes:
            groups.append(self._plan_group(np.arange(batch.decodes)[:, None], None, batch, table))
        tiles = []
        for count in batch.chunks:
            full = np.arange(-(-count // self._height) * self._height)
            tiles.append(np.minimum(full, count - 1).reshape(-1, self._height) + start)
            start += count
        if tiles:
            rows = np.concatenate(tiles)
            order = np.argsort(-batch.positions[rows[:, -1]], kind="stable")
            rows = rows[order]
            kept = np.unique(rows, return_index=True)[1]
            groups.append(self._plan_group(rows, kept, batch, table))
        return Work(written, torch.from_numpy(places.reshape(-1)), groups)

    def forward(
        self, qkv: Tensor, norm: QKNormRope, layer: int, context: Context, rms_of: RmsOf | None = None
    ) -> Tensor:
        """See `Attention.forward`. `context.rotary` has the rows' positions; `context.work` is `Work`."""
        if rms_of is not None:
            qkv = reference.over_rms(qkv, rms_of)
        heads = qkv.view(qkv.shape[0], -1, self.shape.head_dim)
        norm(heads, context.rotary)
        cache = context.cache[layer]
        self.write(heads[:, self.shape.heads :], cache, context.work)
        return self.attend(heads[:, : self.shape.heads], cache, context.work)

    def write(self, kv: Tensor, cache: Tensor, work: Work) -> None:
        """Puts keys, then values [rows, 2 · kv_heads, head_dim] into a layer's cache."""
        if work.written is not None:
            kv = kv.index_select(0, work.written)
        reference.write_kv(kv, cache, work.places)

    def attend(self, queries: Tensor, cache: Tensor, work: Work) -> Tensor:
        """Scaled queries [rows, heads, head_dim] → [rows, heads · head_dim]; all keys are written before."""
        out = torch.zeros(queries.shape, dtype=queries.dtype, device=queries.device)
        for group in work.groups:
            self._attend_group(queries, cache, group, out)
        return out.flatten(1)

    def _plan_group(
        self, rows: Numbers, kept: Numbers | None, batch: Batch, table: NDArray[np.int32]
    ) -> Group:
        """Plans tiles of the batch's `rows` [tiles, height], in falling order of their last positions."""
        tiles, height = rows.shape
        positions = batch.positions[rows]
        slots = batch.slots[rows[:, 0]]
        sees = positions[:, -1] // self._chunk + 1  # chunks that a tile sees, at least one
        spans, pieces, room = [], [], self._pairs_per_span
        for level in range(int(sees[0])):
            first, count = 0, int(np.count_nonzero(sees > level))
            while first < count:
                last = min(count, first + room)
                pieces.append(Piece(level, first, last, self._pairs_per_span - room))
                first, room = last, room - (last - first)
                if not room:
                    spans.append(self._plan_span(pieces, slots, positions, table))
                    pieces, room = [], self._pairs_per_span
        if pieces:
            spans.append(self._plan_span(pieces, slots, positions, table))
        if kept is None:
            return Group(tiles, height, None, None, spans)
        return Group(tiles, height, torch.from_numpy(rows.reshape(-1)), torch.from_numpy(kept), spans)

    def _plan_span(
        self, pieces: list[Piece], slots: Numbers, positions: Numbers, table: NDArray[np.int32]
    ) -> Span:
        """The span of these pieces; of the group's tiles, slots: [tiles], positions: [tiles, height]."""
        of = np.concatenate([np.arange(p.first, p.last) for p in pieces])
        levels = np.array([p.level for p in pieces]).repeat([p.last - p.first for p in pieces])
        width, heads = self.blocks_multiple, self.shape.kv_heads
        blocks = table[slots[of][:, None], levels[:, None] * width + np.arange(width)].astype(np.int64)
        places = blocks[:, None, :] * len(self._heads) + self._head_places
        queries = None
        if len(pieces) > 1:
            queries = torch.from_numpy((of[:, None] * heads + np.arange(heads)).reshape(-1))
        hidden = None
        behind = positions[of] - levels[:, None] * self._chunk  # rows' positions, from the chunk's first key
        if behind.min() < self._chunk - 1:
            mask = np.arange(self._chunk) > behind[:, :, None]
            if positions.shape[1] > 1:
                mask = np.repeat(mask, self.shape.group, axis=1)
                mask = np.pad(mask, ((0, 0), (0, -mask.shape[1] % _MULTIPLE), (0, 0)))
            hidden = torch.from_numpy(mask[:, None])
        return Span(pieces, queries, torch.from_numpy(places.reshape(-1)), hidden)

    def _attend_group(self, queries: Tensor, cache: Tensor, group: Group, out: Tensor) -> None:
        """Fills in the group's rows of `out` [rows, heads, head_dim]."""
        s, tiles, height = self.shape, group.tiles, group.height
        m = height * s.group
        if group.rows is None or group.kept is None:
            q = queries[:tiles].view(tiles, s.kv_heads, m, s.head_dim)
        else:
            q = queries.index_select(0, group.rows).view(tiles, height, s.kv_heads, s.group, s.head_dim)
            q = q.transpose(1, 2).reshape(tiles, s.kv_heads, m, s.head_dim)
        q = pad(q, (0, 0, 0, -m % _MULTIPLE)).float().reshape(tiles * s.kv_heads, -1, s.head_dim)
        weighted, weight = self._attend_tiles(q, cache, group)
        weighted = weighted.view(tiles, s.kv_heads, -1, s.head_dim)[:, :, :m]
        weight = weight.view(tiles, s.kv_heads, -1, 1)[:, :, :m]
        if group.rows is None or group.kept is None:
            torch.div(weighted, weight, out=out[:tiles].view(tiles, s.kv_heads, m, s.head_dim))
            return
        done = (weighted / weight).view(tiles, s.kv_heads, height, s.group, s.head_dim).transpose(1, 2)
        done = done.reshape(tiles * height, s.heads, s.head_dim).to(out.dtype)
        out.index_copy_(0, group.rows.index_select(0, group.kept), done.index_select(0, group.kept))

    def _attend_tiles(self, q: Tensor, cache: Tensor, group: Group) -> tuple[Tensor, Tensor]:
        """(weighted values, sum of weights) of all tiles. q: float32 [tiles · kv_heads, m, head_dim]."""
        s = self.shape
        flat = cache.view(-1, s.block_size * s.head_dim)
        running: reference.Partial | None = None
        for span in group.spans:
            one = span.pieces[0]
            part = q[one.first * s.kv_heads : one.last * s.kv_heads]
            if span.queries is not None:
                part = q.index_select(0, span.queries)
            kv = flat.index_select(0, span.places).float().view(2, -1, self._chunk, s.head_dim)
            partial = reference.attend(part, kv[0], kv[1], span.hidden)
            if len(group.spans) == 1 and span.queries is None:
                return partial[:2]
            if running is None:
                narrow = q.new_empty(*q.shape[:2], 1)
                running = (torch.empty_like(q), narrow, torch.empty_like(narrow))
            for piece in span.pieces:
                self._take(running, partial, piece)
        assert running is not None, "a group has a span"
        return running[:2]

    def _take(self, running: reference.Partial, partial: reference.Partial, piece: Piece) -> None:
        """Takes one piece of a span's results into the group's; pieces come in the order of levels."""
        heads = self.shape.kv_heads
        first, count, start = piece.first * heads, (piece.last - piece.first) * heads, piece.start * heads
        a, b, c = (x[first : first + count] for x in running)
        out, total, maximum = (x[start : start + count] for x in partial)
        if piece.level:
            reference.fold((a, b, c), (out, total, maximum))
        else:
            a.copy_(out)
            b.copy_(total)
            c.copy_(maximum)
