"""Attention by the package flash-attn (version 2): `flash_attn_with_kvcache` for decode rows, of which each
may split its keys over the machine, and `flash_attn_varlen_func` for prompt chunks.

Norm, rotation and the cache write are our kernel's. Cache: [layers, 2, blocks, block_size, kv_heads,
head_dim], as the package wants it; our kernel gets a view of it with heads before positions.

Both calls run in captured graphs: the package asks the host only for sizes (rows, the block table's width,
upper bounds of lengths), which a captured size fixes; lengths themselves it reads on the device.
"""

from dataclasses import dataclass

import numpy as np
import torch
from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from numpy.typing import NDArray
from torch import Tensor

from baton_kernels.prefill_attention import ITEM_FIELDS, SPLIT_FIELDS
from baton_kernels.qk_rope_kv import qk_rope_kv
from baton_kernels.reference import RmsOf
from gpu_worker.attention.interface import AttentionShape, Context, Numbers
from gpu_worker.attention.triton_backend import Rows
from gpu_worker.layers import ops
from gpu_worker.layers.norm import QKNormRope


@dataclass(frozen=True, slots=True)
class FlashSpace:
    """See `DecodeSpace`."""

    seen: Tensor
    slots: Tensor


@dataclass(frozen=True, slots=True)
class FlashDecode:
    """Decode rows of a step, one new token each."""

    seen: Tensor  # int32 [rows]; 0 gives zeros
    block_table: Tensor  # int32 [rows, blocks], those of the rows' slots


@dataclass(frozen=True, slots=True)
class FlashPrompts:
    """Chunks of a pass, in the order of their rows; behind them some without rows."""

    query_ends: Tensor  # int32 [chunks + 1], from 0 on
    key_ends: Tensor  # int32 [chunks + 1], likewise of positions seen
    block_table: Tensor  # int32 [chunks, blocks]


@dataclass(frozen=True, slots=True)
class Chunks:
    """As `baton_kernels.prefill_attention.Tiling`, for a backend that cuts chunks itself: one is one item."""

    height: int = 1 << 30  # rows of an item
    most_split: int = 0

    def cut(
        self, slot: Numbers, first: Numbers, rows: Numbers, start: Numbers, *, split: bool = True
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """(items [chunks, 8], no splits): rows, slot and what the last row sees, where a tile has them."""
        items = np.zeros((len(rows), ITEM_FIELDS), np.int32)
        items[:, _ROWS], items[:, _SLOT], items[:, _SEEN] = rows, slot, start + rows
        return items, np.zeros((0, SPLIT_FIELDS), np.int32)


_ROWS, _SLOT, _SEEN = 1, 2, 5  # fields of an item; zeros where there is none


class FlashAttention:
    """The backend for CUDA devices where flash-attn is installed; `choice` says what else it wants."""

    blocks_multiple = 1

    def __init__(
        self,
        shape: AttentionShape,
        dtype: torch.dtype,
        device: torch.device,
        *,
        deterministic: bool = False,
    ) -> None:
        assert not deterministic, "refused before"
        self.shape, self.dtype, self.device = shape, dtype, device
        self.deterministic = False
        self.tiling = Chunks()
        self._scale = shape.head_dim**-0.5

    def cache(self, layers: int, blocks: int) -> Tensor:
        """See `Attention.cache`; there is no null block, masked rows read and write nothing."""
        s = self.shape
        size = (layers, 2, blocks, s.block_size, s.kv_heads, s.head_dim)
        return torch.zeros(size, dtype=self.dtype, device=self.device)

    def decode_space(self, rows: int, max_length: int) -> FlashSpace:
        """See `DeviceAttention.decode_space`."""
        seen = torch.zeros(rows, dtype=torch.int32, device=self.device)
        return FlashSpace(seen, torch.zeros_like(seen))

    def plan_decode(self, space: FlashSpace, rows: int, block_table: Tensor) -> FlashDecode:
        """See `DeviceAttention.plan_decode`. A row of nobody gets blocks too, and sees nothing of them."""
        slots = space.slots[:rows].clamp(min=0)
        return FlashDecode(space.seen[:rows], block_table.index_select(0, slots))

    def plan_prompts(self, items: Tensor, splits: Tensor, block_table: Tensor) -> FlashPrompts:
        """See `DeviceAttention.plan_prompts`."""
        table = block_table.index_select(0, items[:, _SLOT])
        return FlashPrompts(_ends(items[:, _ROWS]), _ends(items[:, _SEEN]), table)

    def forward(
        self, qkv: Tensor, norm: QKNormRope, layer: int, context: Context, rms_of: RmsOf | None = None
    ) -> Tensor:
        """See `Attention.forward`. `context.rotary` is the whole table; `context.work` is `Rows`.

        Decode rows come first where there are prompt rows too.
        """
        rows: Rows = context.work
        keys, values = context.cache[layer]
        q = qk_rope_kv(
            *(qkv, norm.q, norm.k, norm.eps, context.rotary, rows.positions, rows.places),
            *(keys.transpose(1, 2), values.transpose(1, 2)),
            rms_of=rms_of,
            pdl=ops.early(qkv),
        )
        parts, count = [], 0
        if rows.decode is not None:
            count = len(q) if rows.prefill is None else rows.decodes
            parts.append(self._decode(q[:count], keys, values, rows.decode))
        if rows.prefill is not None:
            parts.append(self._prompts(q[count:], keys, values, rows.prefill))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)

    def _decode(self, q: Tensor, keys: Tensor, values: Tensor, work: FlashDecode) -> Tensor:
        out: Tensor = flash_attn_with_kvcache(
            q[:, None],
            keys,
            values,
            cache_seqlens=work.seen,
            block_table=work.block_table,
            softmax_scale=self._scale,
            causal=True,
        )
        return out[:, 0]

    def _prompts(self, q: Tensor, keys: Tensor, values: Tensor, work: FlashPrompts) -> Tensor:
        """What rows of no chunk get is whatever lay in memory; nobody reads it."""
        out: Tensor = flash_attn_varlen_func(
            q,
            keys,
            values,
            cu_seqlens_q=work.query_ends,
            cu_seqlens_k=work.key_ends,
            # bounds, so that they may be captured; by a bound of 1 the package would take every chunk to
            # have exactly one row
            max_seqlen_q=max(2, len(q)),
            max_seqlen_k=work.block_table.shape[1] * self.shape.block_size,
            softmax_scale=self._scale,
            causal=True,  # a chunk's last row sees all of its keys
            block_table=work.block_table,
        )
        return out


def _ends(counts: Tensor) -> Tensor:
    """0, then running sums: int32 [counts + 1]."""
    ends = counts.new_zeros(len(counts) + 1)
    torch.cumsum(counts, 0, dtype=torch.int32, out=ends[1:])
    return ends
