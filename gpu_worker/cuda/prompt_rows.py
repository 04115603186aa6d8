"""The rows of a pass over prompt chunks: sizes that are captured, and how the host writes one down.

Rows are packed one chunk after the other, then padding, which has no slot: it writes nothing to the cache,
belongs to no tile and samples nothing. The row of a prompt that is cached whole writes nothing either.
Knows nothing of models or devices.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baton_kernels.prefill_attention import ITEM_FIELDS, PARTS, SPLIT_FIELDS
from baton_wire.plan import Plan
from gpu_worker.attention.interface import Tiler
from gpu_worker.cuda.inbox import aligned

PICKS = 32  # rows that a captured pass may sample from; also its most chunks
ROWS_MULTIPLE = 16  # rows of any pass: kernels compiled for multiples of 16 serve all
# Close together: padding costs a large model as much as rows do.
_CAPTURED = (16, 32, 64, *range(128, 1025, 128), *range(1280, 2049, 256), *range(2560, 4097, 512))


@dataclass(frozen=True, slots=True)
class PassSize:
    """How much a pass has room for; its sections lie one after the other in a page of words."""

    picks: int
    rows: int
    items: int
    splits: int

    def cut(self, words: Any) -> "PassRows":
        """Views of the sections of a page: a numpy array, or a tensor on the device."""
        sections, begin = [], 0
        for size in self._sizes():
            sections.append(words[begin : begin + size])
            begin += aligned(size)
        picked, pick_slots, tokens, positions, slots, items, splits = sections
        items, splits = items.reshape(-1, ITEM_FIELDS), splits.reshape(-1, SPLIT_FIELDS)
        return PassRows(picked, pick_slots, tokens, positions, slots, items, splits)

    @property
    def words(self) -> int:
        """Of the whole."""
        return sum(map(aligned, self._sizes()))

    def _sizes(self) -> tuple[int, ...]:
        rows, picks = (self.rows,) * 3, (self.picks,) * 2
        return (*picks, *rows, self.items * ITEM_FIELDS, self.splits * SPLIT_FIELDS)


@dataclass(frozen=True, slots=True)
class PassRows:
    """int32, each a numpy array or a tensor."""

    picked: Any  # [picks] rows whose next token is sampled, first of all so that every size has them there …
    pick_slots: Any  # [picks] … and for which slot, -1 for none
    tokens: Any  # [rows]
    positions: Any  # [rows]
    slots: Any  # [rows] in whose blocks keys and values go, -1 for rows that write nothing
    items: Any  # [items, 8], of the backend's `Tiler`; zeros where there is none
    splits: Any  # [splits, 4]


def captured_sizes(tiling: Tiler, slots: int, most_rows: int) -> list[PassSize]:
    """Sizes to capture for a table of `slots`, the smallest first."""
    picks = min(PICKS, slots)
    found, fewest = [], 1
    for rows in _CAPTURED:
        if fewest <= most_rows:
            tiles = -(-rows // tiling.height) + picks
            splits = tiling.most_split if -(-fewest // tiling.height) <= tiling.most_split else 0
            found.append(PassSize(picks, rows, max(tiles, PARTS + splits if splits else 0), splits))
        fewest = rows + 1
    return found


def largest_words(tiling: Tiler, slots: int, most_rows: int) -> int:
    """Words of the largest pass over `most_rows` tokens of at most `slots` chunks."""
    rows = -(-most_rows // ROWS_MULTIPLE) * ROWS_MULTIPLE
    items = -(-rows // tiling.height) + slots + PARTS
    return max(
        PassSize(slots, rows, items, tiling.most_split).words,
        *(size.words for size in captured_sizes(tiling, slots, most_rows)),
    )


def write(
    plan: Plan,
    known: NDArray[np.bool_],
    tiling: Tiler,
    sizes: list[PassSize],
    page: NDArray[np.int32],
    split: bool,
) -> PassSize:
    """Writes down the plan's chunks; the least of `sizes` that holds them, or one of their own.

    known: [chunks], as of `SlotTable.known`. Attention and sampling have these rows' slots from `items` and
    `pick_slots`.
    """
    slot, start, count = (plan.chunks[name].astype(np.int64) for name in ("slot", "start", "count"))
    ends = count.cumsum()
    total, last = int(ends[-1]), plan.chunks["last"] == 1
    items, splits = tiling.cut(slot, ends - count, count, start, split=split)
    size = next((s for s in sizes if s.rows >= total and s.picks >= len(slot)), None)
    if size is None:
        rows = -(-total // ROWS_MULTIPLE) * ROWS_MULTIPLE
        size = PassSize(max(1, int(last.sum())), rows, len(items), len(splits))  # kernels want a row
    assert len(items) <= size.items and len(splits) <= size.splits, "sizes have room for every tiling"
    into = size.cut(page)
    into.tokens[:total] = plan.chunk_tokens
    into.positions[:total] = np.arange(total) + (start + count - ends).repeat(count)
    into.slots[:total] = np.where(known, -1, slot).repeat(count)
    into.tokens[total:], into.positions[total:], into.slots[total:] = 0, 0, -1
    picks = int(last.sum())
    into.picked[:picks], into.pick_slots[:picks] = ends[last] - 1, slot[last]
    into.picked[picks:], into.pick_slots[picks:] = 0, -1
    for list_, entries in ((into.items, items), (into.splits, splits)):
        list_[: len(entries)], list_[len(entries) :] = entries, 0
    return size
