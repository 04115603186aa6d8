"""A pass over prompt chunks: their rows packed one after the other, known to the host from the plan."""

import numpy as np
import torch
from torch import Tensor

from baton_kernels import advance, sampler
from baton_kernels.prefill_attention import PromptChunk, plan_prefill
from baton_kernels.sampler import SampleWork
from baton_wire.plan import Plan
from gpu_worker.attention.interface import Attention, AttentionShape, Context
from gpu_worker.attention.triton_backend import Rows
from gpu_worker.models import Model
from gpu_worker.slots import SlotTable


def prefill(
    plan: Plan,
    model: Model,
    attention: Attention,
    shape: AttentionShape,
    cache: Tensor,
    rotary: Tensor,
    table: SlotTable,
    work: SampleWork,
    sampled: Tensor,
) -> None:
    """Computes the plan's chunks; slots whose prompt ends have their token in `sampled` afterwards."""
    device = cache.device
    slot, start, count = (plan.chunks[name].astype(np.int64) for name in ("slot", "start", "count"))
    ends = count.cumsum()
    numbers = np.empty((3, ends[-1]), np.int32)
    numbers[0] = plan.chunk_tokens
    numbers[1] = np.arange(ends[-1]) + (start + count - ends).repeat(count)
    numbers[2] = slot.repeat(count)
    tokens, positions, slots = torch.from_numpy(numbers).pin_memory().to(device, non_blocking=True)
    places = torch.empty_like(positions)
    advance.locate(table.block_table, table.block_size, slots, positions, places)
    firsts = ends - count
    chunks = [
        PromptChunk(s, f, c, b)
        for s, f, c, b in zip(slot.tolist(), firsts.tolist(), count.tolist(), start.tolist(), strict=True)
    ]
    heads = (shape.heads, shape.kv_heads, shape.head_dim)
    tiles = plan_prefill(chunks, *heads, device, block_size=shape.block_size)
    rows = Rows(positions, places, table.block_table, prefill=tiles)
    hidden = model(tokens, Context(attention, cache, rows, rotary))
    lengths = torch.from_numpy(np.stack((slot, start + count))).pin_memory().to(device, non_blocking=True)
    table.length.index_copy_(0, lengths[0], lengths[1])
    last = plan.chunks["last"] == 1
    if last.any():
        picked = np.stack((ends[last] - 1, slot[last])).astype(np.int32)
        where = torch.from_numpy(picked).pin_memory().to(device, non_blocking=True)
        logits = model.logits(hidden.index_select(0, where[0]))
        sampler.sample(logits, where[1], table, work, sampled)
