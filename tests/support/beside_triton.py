"""A layer by the flash_attn backend beside ours, over the same rows and the same cache."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from baton_kernels import reference
from gpu_worker.attention import AttentionShape, Context
from gpu_worker.attention.flash_backend import FlashAttention
from gpu_worker.attention.triton_backend import Rows, TritonAttention
from gpu_worker.cuda.prompt_rows import ROWS_MULTIPLE
from gpu_worker.layers.norm import QKNormRope

TOLERANCE = 2e-2  # of numbers of size 1 in bfloat16
LONGEST = 1024
BEHIND = 7.0  # what stands where nothing was written


@dataclass(frozen=True)
class Part:
    """Rows of one kind; `plan`: what a backend plans for them, by keyword of `Rows`."""

    slots: list[int]
    positions: list[int]
    plan: Callable[[Any], dict[str, Any]]

    @property
    def valid(self):
        return [i for i, slot in enumerate(self.slots) if slot >= 0]


class Pair:
    """Both backends, their caches with the same content: what no sequence has is NaN."""

    def __init__(self, shape, lengths, device, dtype=torch.bfloat16):
        """lengths: positions in the cache of each slot; the caches have room for LONGEST of each."""
        self.shape, self.device, self.dtype = shape, device, dtype
        width = LONGEST // shape.block_size
        self.table = torch.randperm(width * len(lengths), device=device).to(torch.int32).view(-1, width)
        self.norm = QKNormRope(shape.heads, shape.kv_heads, shape.head_dim, 1e-6)
        self.norm.q, self.norm.k = (
            torch.randn(2, shape.head_dim, device=device).mul(0.2).add(1).to(dtype).unbind()
        )
        rotary = reference.rotary_table(LONGEST, shape.head_dim, 1e4)
        rotary[:, 1, : shape.head_dim // 2].neg_()  # the kernel rotates halves itself
        self.rotary = rotary.to(device)
        self.backends = [kind(shape, dtype, device) for kind in (TritonAttention, FlashAttention)]
        self.caches = [b.cache(1, self.table.numel()).fill_(torch.nan) for b in self.backends]
        self.caches[0][:, 1] = BEHIND  # no kernel of ours writes values that are not finite
        for slot, length in enumerate(lengths):
            places = self.numbers(self.places([slot] * length, range(length))).long()
            blocks, offsets = places // shape.block_size, places % shape.block_size
            kv = torch.randn(2, length, shape.kv_heads, shape.head_dim, device=device).to(dtype)
            for part in (0, 1):
                self.caches[0][0, part, blocks, :, offsets] = kv[part]
                self.caches[1][0, part, blocks, offsets] = kv[part]

    def numbers(self, values):
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def places(self, slots, positions):
        size = self.shape.block_size
        return [
            -1 if s < 0 else int(self.table[s, p // size]) * size + p % size
            for s, p in zip(slots, positions, strict=True)
        ]

    def decode(self, rows):
        """rows: (slot, position) of each; slot -1 for a row that is masked."""
        slots, positions = map(list, zip(*rows, strict=True))

        def plan(backend):
            space = backend.decode_space(len(rows) + 3, LONGEST)
            space.seen[: len(rows)] = self.numbers([0 if s < 0 else p + 1 for s, p in rows])
            space.slots[: len(rows)] = self.numbers(slots)
            return {"decode": backend.plan_decode(space, len(rows), self.table)}

        return Part(slots, positions, plan)

    def prompts(self, chunks, spare=2):
        """chunks: (slot, start, rows) of each, after them padding; `spare`: items that are empty."""
        slot, start, count = (torch.tensor(x).numpy() for x in zip(*chunks, strict=True))
        ends, total = count.cumsum(), int(count.sum())
        padding = -(-(total + 1) // ROWS_MULTIPLE) * ROWS_MULTIPLE - total
        slots = slot.repeat(count).tolist() + [-1] * padding
        positions = [a + i for _, a, n in chunks for i in range(n)] + [0] * padding

        def plan(backend):
            items, splits = backend.tiling.cut(slot, ends - count, count, start)
            items = torch.nn.functional.pad(torch.from_numpy(items), (0, 0, 0, spare)).to(self.device)
            splits = torch.from_numpy(splits).to(self.device)
            return {"prefill": backend.plan_prompts(items, splits, self.table)}

        return Part(slots, positions, plan)

    def inputs(self, *parts):
        """Fresh random projections for the rows of these parts."""
        s = self.shape
        width = (s.heads + 2 * s.kv_heads) * s.head_dim
        return torch.randn(sum(len(p.slots) for p in parts), width, device=self.device).to(self.dtype)

    def forward(self, which, qkv, *parts):
        """Outputs of one backend over these parts, in one pass."""
        backend, cache = self.backends[which], self.caches[which]
        slots, positions = [s for p in parts for s in p.slots], [x for p in parts for x in p.positions]
        plans = {name: plan for part in parts for name, plan in part.plan(backend).items()}
        places = self.numbers(self.places(slots, positions))
        decodes = len(parts[0].slots) if "decode" in plans else 0  # they come first
        work = Rows(self.numbers(positions), places, self.table, **plans, decodes=decodes)
        return backend.forward(qkv.clone(), self.norm, 0, Context(backend, cache, work, self.rotary))

    def compare(self, part):
        qkv = self.inputs(part)
        ours, theirs = (self.forward(which, qkv, part)[part.valid] for which in (0, 1))
        assert ours.isfinite().all()
        torch.testing.assert_close(theirs, ours, atol=TOLERANCE, rtol=TOLERANCE)
        ours, theirs = self.caches[0], self.caches[1].transpose(3, 4)
        assert torch.equal(ours.nan_to_num(BEHIND), theirs.nan_to_num(BEHIND)), "what was written"


def check(shape: AttentionShape, device: torch.device) -> None:
    """Chunks of new prompts, after a prefix, across blocks, of one row; then decode rows, some masked."""
    pair = Pair(shape, [0, 300, 0, 255, 511, 0], device)
    pair.compare(pair.prompts([(4, 511, 40), (0, 0, 17), (1, 300, 1), (2, 0, 3)]))
    pair.compare(pair.prompts([(5, 0, 1)], spare=0))
    pair.compare(pair.decode([(3, 255), (0, 17), (4, 551), (5, 1), (-1, 0), (-1, 0)]))
    pair.compare(pair.decode([(-1, 0)]))


def check_together(shape: AttentionShape, device: torch.device) -> None:
    """Decode rows and prompt rows in one pass of the flash_attn backend get what they get alone."""
    pair = Pair(shape, [300, 0, 255, 0], device)
    decode, prompts = pair.decode([(2, 255), (-1, 0)]), pair.prompts([(0, 300, 5), (3, 0, 9)])
    qkv = pair.inputs(decode, prompts)
    together = pair.forward(1, qkv, decode, prompts)
    count = len(decode.slots)
    for part, rows in ((decode, slice(count)), (prompts, slice(count, None))):
        alone = pair.forward(1, qkv[rows], part)[part.valid]
        torch.testing.assert_close(together[rows][part.valid], alone, atol=TOLERANCE, rtol=TOLERANCE)
