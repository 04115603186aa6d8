"""A paged cache with sequences in it, and attention over it in float64."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Paged:
    """Caches [blocks, kv_heads, block_size, head_dim]; all positions that no sequence has hold rubbish."""

    keys: torch.Tensor
    values: torch.Tensor
    block_table: torch.Tensor  # int32 [slots, blocks]

    def attend(self, q, slot, seen):
        """float64 [heads, head_dim] for one query [heads, head_dim] over the first `seen` positions."""
        kv_heads, head_dim = self.keys.shape[1], self.keys.shape[3]

        def rows(cache):
            blocks = cache[self.block_table[slot].long()]
            return blocks.transpose(1, 2).reshape(-1, kv_heads, head_dim)[:seen].double()

        group = q.shape[0] // kv_heads
        keys, values = (rows(c).repeat_interleave(group, 1) for c in (self.keys, self.values))
        scores = torch.einsum("hd,nhd->hn", q.double(), keys) * head_dim**-0.5
        return torch.einsum("hn,nhd->hd", scores.softmax(-1), values)


def paged(lengths, kv_heads, head_dim, block_size, dtype, device, behind=torch.nan):
    """Sequences of these lengths in slots 0, 1 …, their blocks in random order.

    `behind`: values where no sequence is; keys there are NaN.
    """
    width = -(-max(*lengths, 1) // block_size)
    count = width * len(lengths)
    size = (count + 1, kv_heads, block_size, head_dim)
    keys, values = (torch.randn(size, device=device).to(dtype) for _ in range(2))
    table = torch.randperm(count, device=device).to(torch.int32).view(len(lengths), width)
    for slot, length in enumerate(lengths):
        for place in range(length // block_size, width):
            first = max(length - place * block_size, 0)
            keys[table[slot, place], :, first:] = torch.nan
            values[table[slot, place], :, first:] = behind
    return Paged(keys, values, table)
