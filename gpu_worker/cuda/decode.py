"""A decode step: row i is the i-th slot that moves; which that is, and how many do, the host need not know.

One captured graph per bucket (number of rows); a plan's bucket alone, the most slots that can move, picks the
graph, so that equal plans run equal kernels. Rows without a slot are masked.
"""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from baton_kernels import advance
from gpu_worker.attention.interface import DecodeSpace
from gpu_worker.attention.triton_backend import Rows
from gpu_worker.cuda.forward import Forward, Pool

log = logging.getLogger(__name__)

_WARM_UPS = 2


@dataclass(slots=True)
class StepRows:
    """What `advance.begin` writes for a step; see `baton_kernels.advance.StepRows`."""

    tokens: Tensor
    positions: Tensor
    places: Tensor
    seen: Tensor
    slots: Tensor
    sampled: Tensor

    @staticmethod
    def make(space: DecodeSpace, sampled: Tensor) -> "StepRows":
        """For as many rows as the attention's space, which `seen` and `slots` belong to."""

        def numbers() -> Tensor:
            return torch.zeros_like(space.seen)

        return StepRows(numbers(), numbers(), numbers(), space.seen, space.slots, sampled)


def buckets(most: int) -> list[int]:
    """Row counts that are captured: close together where a step is short, and `most`."""
    sizes = [*range(1, 5), 6, 8, 12, 16, 24, 32, 48, 64, *range(96, 513, 32), *range(640, 4097, 128)]
    return [size for size in sizes if size < most] + [most]


class Decoder:
    """Decode steps."""

    def __init__(self, forward: Forward, space: DecodeSpace) -> None:
        slots = len(forward.table)
        self._forward, self._space = forward, space
        self.rows = StepRows.make(space, forward.sampled)
        self._named = torch.zeros(slots, dtype=torch.int8, device=space.seen.device)
        self._buckets = buckets(slots)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def bucket(self, rows: int) -> int:
        """The captured size for a plan's bucket of `rows`."""
        return next(size for size in self._buckets if size >= rows)

    def capture(self, pool: Pool) -> None:
        """Captures every bucket, the largest first, so that the others find their memory in the pool."""
        for bucket in reversed(self._buckets):
            for _ in range(_WARM_UPS):
                self._pass(bucket)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._pass(bucket)
            self._graphs[bucket] = graph
        log.info("captured graphs=%d largest=%d", len(self._graphs), self._buckets[-1])

    def step(self, rows: int) -> None:
        """Advances every slot that moves, at most `rows`; `self.rows.sampled` has their tokens."""
        bucket = self.bucket(rows)
        graph = self._graphs.get(bucket)
        if graph is None:
            self._pass(bucket)
        else:
            graph.replay()

    def constrained(self, rows: int, held: Tensor, allowed: Tensor) -> None:
        """The same with held slots: `held` int64 [n] move too, under their masks `allowed` [n, words]."""
        masks = torch.full((len(self._named) + 1,), -1, dtype=torch.int32, device=held.device)
        masks[held] = torch.arange(len(held), dtype=torch.int32, device=held.device)
        self._named[held] = 1
        self._pass(self.bucket(rows), allowed, masks)
        self._named.zero_()

    def idle(self) -> None:
        """No decode row in this step: only marks that no slot has sampled yet."""
        self.rows.sampled.fill_(advance.NOT_SAMPLED)

    def begin(self, bucket: int) -> tuple[Tensor, Rows]:
        """Lays out a step of up to `bucket` rows on the device: their tokens, and what else a pass needs."""
        table, rows = self._forward.table, self.rows
        advance.begin(table, rows, bucket, table.block_size, self._named)
        work = self._forward.attention.plan_decode(self._space, bucket, table.block_table)
        places, positions = rows.places[:bucket], rows.positions[:bucket]
        return rows.tokens[:bucket], Rows(positions, places, table.block_table, decode=work)

    def _pass(self, bucket: int, allowed: Tensor | None = None, masks: Tensor | None = None) -> None:
        """`masks`: int32 [slots + 1], which of `allowed` a slot is under; -1 for none, and at the end."""
        hidden = self._forward(*self.begin(bucket))
        slots = self.rows.slots[:bucket]
        by_row = None if masks is None else masks[slots.long()]
        self._forward.sample(hidden, slots, allowed, by_row)
