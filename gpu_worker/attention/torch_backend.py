"""Paged attention in torch operations: decodes and prompt chunks in one way, with the same bits for a row.

Rows of a sequence form tiles; all query heads that share a key head lie in one tile, so a matrix product has
`rows · group` rows, padded to a multiple of 8. Tiles are sorted by how far they see, farthest first: those
that see chunk j are the first n_j, and every level j is a slice, not a gather.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from baton_kernels import reference
from gpu_worker.attention.interface import AttentionShape, Batch, Numbers

_TILE_PRODUCT_ROWS = 64  # rows · group of a tile of a prompt chunk
_SPAN_BYTES = 8 << 20  # keys and values gathered at a time: they should still be in cache when used
_M_MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class Span:
    """Tiles [first, last) of a group, at one level: where their keys are, and what they may not see."""

    level: int
    first: int
    last: int
    rows: Tensor  # int64: rows of the cache, flattened to (block, kv head)
    hidden: Tensor | None  # bool [tiles, 1, m, chunk]


@dataclass(frozen=True, slots=True)
class Group:
    """Tiles of equal height."""

    rows: Tensor  # int64 [tiles, height], row of the batch; any valid row where the tile is not full
    spans: list[Span]
    places: Tensor  # int64 [tiles · height], where the batch's rows `targets` are among the tiles' rows
    targets: Tensor


@dataclass(frozen=True, slots=True)
class Work:
    """A step's plan."""

    blocks: Tensor  # int64 [rows without padding]: where each row's key and value go
    offsets: Tensor
    groups: list[Group]


class TorchAttention:
    """The reference backend, and the one for CPU.

    Cache: [layers, 2, blocks + 1, kv_heads, block_size, head_dim].
    """

    def __init__(self, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.blocks_multiple = max(1, reference.CHUNK // shape.block_size)
        self._chunk = self.blocks_multiple * shape.block_size
        bytes_per_tile = 2 * self._chunk * shape.kv_heads * shape.head_dim * dtype.itemsize
        self._tiles_per_span = max(1, _SPAN_BYTES // bytes_per_tile)
        self._tile_rows = _M_MULTIPLE * max(1, _TILE_PRODUCT_ROWS // (_M_MULTIPLE * shape.group))

    def cache(self, layers: int, blocks: int) -> Tensor:
        """See `Attention.cache`."""
        s = self.shape
        size = (layers, 2, blocks + 1, s.kv_heads, s.block_size, s.head_dim)
        return torch.zeros(size, dtype=self.dtype, device=self.device)

    def clear(self, cache: Tensor, blocks: Tensor) -> None:
        """Zeros: a hidden value has weight 0, but 0 · NaN, from an owner whose numbers broke, is NaN."""
        cache[:, :, blocks] = 0

    def plan(self, batch: Batch, block_table: Tensor) -> Work:
        """See `Attention.plan`."""
        table, size = block_table.numpy(), self.shape.block_size
        blocks = table[batch.slots, batch.places // size].astype(np.int64)
        groups, start = [], batch.decodes
        if batch.decodes:
            groups.append(self._group(np.arange(batch.decodes)[:, None], batch, table))
        tiles = []
        for count in batch.chunks:
            padded = -(-count // self._tile_rows) * self._tile_rows
            tiles.append(np.minimum(np.arange(padded), count - 1).reshape(-1, self._tile_rows) + start)
            start += count
        if tiles:
            groups.append(self._group(np.concatenate(tiles), batch, table))
        return Work(torch.from_numpy(blocks), torch.from_numpy(batch.places % size), groups)

    def write(self, keys: Tensor, values: Tensor, cache: Tensor, work: Work) -> None:
        """See `Attention.write`."""
        reference.write_kv(keys, cache[0], work.blocks, work.offsets)
        reference.write_kv(values, cache[1], work.blocks, work.offsets)

    def attend(self, queries: Tensor, cache: Tensor, work: Work) -> Tensor:
        """See `Attention.attend`."""
        scaled = queries.float() * self.shape.head_dim**-0.5
        out = torch.zeros_like(scaled)
        for group in work.groups:
            out[group.targets] = self._attend_group(scaled, cache, group)
        return out.flatten(1).to(queries.dtype)

    def _group(self, rows: Numbers, batch: Batch, table: NDArray[np.int32]) -> Group:
        """Plans tiles of the batch's `rows` [tiles, height]; repeated rows fill a tile that is not full."""
        sees = batch.places[rows].max(axis=1) // self._chunk + 1  # chunks that a tile sees, at least one
        order = np.argsort(-sees, kind="stable")
        rows, sees = rows[order], sees[order]
        places = batch.places[rows]
        spans = [
            self._span(level, first, min(first + self._tiles_per_span, count), rows, places, batch, table)
            for level, count in enumerate(_counts(sees))
            for first in range(0, count, self._tiles_per_span)
        ]
        targets, index = np.unique(rows, return_index=True)
        return Group(torch.from_numpy(rows), spans, torch.from_numpy(index), torch.from_numpy(targets))

    def _span(
        self,
        level: int,
        first: int,
        last: int,
        rows: Numbers,
        places: Numbers,
        batch: Batch,
        table: NDArray[np.int32],
    ) -> Span:
        """Tiles [first, last) at one level."""
        heads, width = self.shape.kv_heads, self.blocks_multiple
        blocks = table[batch.slots[rows[first:last, 0]], level * width : (level + 1) * width].astype(np.int64)
        cache_rows = blocks[:, None, :] * heads + np.arange(heads)[None, :, None]
        places, start = places[first:last], level * self._chunk
        hidden = None
        if places.min() < start + self._chunk - 1:
            keys = np.arange(start, start + self._chunk)
            mask = np.repeat(keys > places[:, :, None], self.shape.group, axis=1)
            missing = -mask.shape[1] % _M_MULTIPLE
            hidden = torch.from_numpy(np.pad(mask, ((0, 0), (0, missing), (0, 0)))[:, None])
        return Span(level, first, last, torch.from_numpy(cache_rows.reshape(-1)), hidden)

    def _attend_group(self, queries: Tensor, cache: Tensor, group: Group) -> Tensor:
        """Rows `group.targets` of the result."""
        s, (tiles, height) = self.shape, group.rows.shape
        q = queries[group.rows].view(tiles, height, s.kv_heads, s.group, s.head_dim)
        q = q.transpose(1, 2).reshape(tiles, s.kv_heads, height * s.group, s.head_dim)
        q = pad(q, (0, 0, 0, -q.shape[2] % _M_MULTIPLE))
        out = torch.empty_like(q)
        total = q.new_empty(*q.shape[:3], 1)
        maximum = torch.empty_like(total)
        keys, values = (half.view(-1, s.block_size * s.head_dim) for half in cache)
        for span in group.spans:
            part = slice(span.first, span.last)
            size = (span.last - span.first, s.kv_heads, self._chunk, s.head_dim)
            k = keys.index_select(0, span.rows).view(size).float()
            v = values.index_select(0, span.rows).view(size).float()
            chunk = reference.attend(q[part], k, v, span.hidden)
            if span.level == 0:
                out[part], total[part], maximum[part] = chunk
            else:
                reference.fold(out[part], total[part], maximum[part], chunk)
        out = out.div_(total)[:, :, : height * s.group]
        out = out.reshape(tiles, s.kv_heads, height, s.group, s.head_dim).transpose(1, 2)
        return out.reshape(tiles * height, s.heads, s.head_dim)[group.places]


def _counts(sees: Numbers) -> list[int]:
    """How many tiles see chunk 0, 1, 2 …"""
    return [int(np.count_nonzero(sees > level)) for level in range(int(sees.max()))]
