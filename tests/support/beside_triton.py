"""A layer by the flash_attn backend beside ours, over the same rows and the same cache."""

import torch

from baton_kernels import reference
from gpu_worker.attention import AttentionShape, Context
from gpu_worker.attention.flash_backend import FlashAttention
from gpu_worker.attention.triton_backend import Rows, TritonAttention
from gpu_worker.cuda.prompt_rows import ROWS_MULTIPLE
from gpu_worker.layers.norm import QKNormRope

TOLERANCE = 2e-2  # of numbers of size 1 in bfloat16
LONGEST = 1024


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

    def forward(self, slots, positions, plan):
        """Outputs of both on fresh random rows; `plan`: the rows' plan of a backend, by keyword of `Rows`."""
        s = self.shape
        width = (s.heads + 2 * s.kv_heads) * s.head_dim
        qkv = torch.randn(len(slots), width, device=self.device).to(self.dtype)
        places = self.numbers(self.places(slots, positions))
        out = []
        for backend, cache in zip(self.backends, self.caches, strict=True):
            work = Rows(self.numbers(positions), places, self.table, **plan(backend))
            out.append(backend.forward(qkv.clone(), self.norm, 0, Context(backend, cache, work, self.rotary)))
        ours, theirs = self.caches[0], self.caches[1].transpose(3, 4)
        assert torch.equal(ours.nan_to_num(7), theirs.nan_to_num(7)), "what was written"
        return out

    def compare(self, out, rows):
        ours, theirs = (x[rows] for x in out)
        assert ours.isfinite().all()
        torch.testing.assert_close(theirs, ours, atol=TOLERANCE, rtol=TOLERANCE)

    def decode(self, rows):
        """rows: (slot, position); slot -1 for a row that is masked."""
        slots, positions = map(list, zip(*rows, strict=True))

        def plan(backend):
            space = backend.decode_space(len(rows) + 3, LONGEST)
            space.seen[: len(rows)] = self.numbers([0 if s < 0 else p + 1 for s, p in rows])
            space.slots[: len(rows)] = self.numbers(slots)
            return {"decode": backend.plan_decode(space, len(rows), self.table)}

        self.compare(self.forward(slots, positions, plan), [i for i, s in enumerate(slots) if s >= 0])

    def prompts(self, chunks, spare=2):
        """chunks: (slot, start, rows), after them padding; `spare`: items that are empty."""
        slot, start, count = (torch.tensor(x).numpy() for x in zip(*chunks, strict=True))
        ends, total = count.cumsum(), int(count.sum())
        padded = -(-(total + 1) // ROWS_MULTIPLE) * ROWS_MULTIPLE
        slots, positions = [-1] * padded, [0] * padded
        slots[:total] = slot.repeat(count).tolist()
        positions[:total] = [a + i for _, a, n in chunks for i in range(n)]

        def plan(backend):
            items, splits = backend.tiling.cut(slot, ends - count, count, start)
            items = torch.nn.functional.pad(torch.from_numpy(items), (0, 0, 0, spare)).to(self.device)
            splits = torch.from_numpy(splits).to(self.device)
            return {"prefill": backend.plan_prompts(items, splits, self.table)}

        self.compare(self.forward(slots, positions, plan), slice(total))


def check(shape: AttentionShape, device: torch.device) -> None:
    """Chunks of new prompts, after a prefix, across blocks, of one row; then decode rows, some masked."""
    pair = Pair(shape, [0, 300, 0, 255, 511, 0], device)
    pair.prompts([(4, 511, 40), (0, 0, 17), (1, 300, 1), (2, 0, 3)])
    pair.prompts([(5, 0, 1)], spare=0)
    pair.decode([(3, 255), (0, 17), (4, 551), (5, 1), (-1, 0), (-1, 0)])
    pair.decode([(-1, 0)])
