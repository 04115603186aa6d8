"""Attention by our Triton kernels: norm, rotation and cache write in one, then decode or prompt chunks.

A forward pass here is over slots that decode, over prompt chunks, or over both: `Rows` says which.
Cache: [layers, 2, blocks, kv_heads, block_size, head_dim].
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from baton_kernels.decode_attention import decode_attention
from baton_kernels.decode_plan import CHUNK, DecodeWork, plan
from baton_kernels.prefill_attention import PrefillWork, Tiling, prefill_attention
from baton_kernels.qk_rope_kv import qk_rope_kv
from baton_kernels.reference import RmsOf
from gpu_worker.attention.interface import AttentionShape, Context
from gpu_worker.layers import ops
from gpu_worker.layers.norm import QKNormRope


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a pass on the device, decode rows first, and the plans that its layers share: one, or both."""

    positions: Tensor  # int32 [rows]
    places: Tensor  # int32 [rows], block · block_size + offset, -1 for rows that write nothing
    block_table: Tensor  # int32 [slots, blocks]
    decode: Any = None  # of the backend's `plan_decode` …
    prefill: Any = None  # … or `plan_prompts`
    decodes: int = 0  # of rows, where there are both


class TritonAttention:
    """The backend for CUDA devices of compute capability 8.0 and later."""

    blocks_multiple = 1

    def __init__(
        self,
        shape: AttentionShape,
        dtype: torch.dtype,
        device: torch.device,
        *,
        deterministic: bool = False,
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.deterministic = deterministic
        heads = (shape.heads, shape.kv_heads, shape.head_dim)
        self.tiling = Tiling.make(*heads, shape.block_size, device)
        # what tiles that are split leave behind; the lists are a pass's own
        empty = torch.empty(0, dtype=torch.int32, device=device)
        self._space = self.tiling.work(empty, empty, shape.heads, shape.head_dim)
        self._scale = shape.head_dim**-0.5

    def cache(self, layers: int, blocks: int) -> Tensor:
        """See `Attention.cache`; there is no null block, masked rows read and write nothing."""
        s = self.shape
        size = (layers, 2, blocks, s.kv_heads, s.block_size, s.head_dim)
        return torch.zeros(size, dtype=self.dtype, device=self.device)

    def decode_space(self, rows: int, max_length: int) -> DecodeWork:
        """See `DeviceAttention.decode_space`."""
        s = self.shape
        chunk = CHUNK if self.deterministic else None
        sizes = (s.heads, s.kv_heads, s.head_dim, s.block_size)
        return DecodeWork.make(rows, *sizes, max_length, self.device, chunk)

    def plan_decode(self, space: DecodeWork, rows: int, block_table: Tensor) -> DecodeWork:
        """See `DeviceAttention.plan_decode`."""
        plan(space, rows, block_table)
        return space

    def plan_prompts(self, items: Tensor, splits: Tensor, block_table: Tensor) -> PrefillWork:
        """See `DeviceAttention.plan_prompts`."""
        return self._space.over(items, splits)

    def forward(
        self, qkv: Tensor, norm: QKNormRope, layer: int, context: Context, rms_of: RmsOf | None = None
    ) -> Tensor:
        """See `Attention.forward`. `context.rotary` is the whole table; `context.work` is `Rows`."""
        rows: Rows = context.work
        keys, values = context.cache[layer]
        places, positions = rows.places, rows.positions
        pdl = ops.early(qkv)
        q = qk_rope_kv(
            *(qkv, norm.q, norm.k, norm.eps, context.rotary, positions, places, keys, values),
            rms_of=rms_of,
            pdl=pdl,
        )
        out, where = torch.empty_like(q), (keys, values, rows.block_table)
        count = len(q) if rows.prefill is None else rows.decodes
        if rows.decode is not None:
            decode_attention(q[:count], *where, rows.decode, self._scale, out=out[:count], pdl=pdl)
        if rows.prefill is not None:
            prefill_attention(q[count:], *where, rows.prefill, self._scale, out[count:])
        return out.flatten(1)
