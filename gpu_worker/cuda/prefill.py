"""Passes over prompt chunks: their rows are known to the host from the plan, so it writes them down.

A pass that fits one of a few sizes is a captured graph over fixed inputs: where little is to be computed, as
after a prefix hit, launching kernels one by one would take longer than computing. Others are launched as they
come; they are large, so the device is the slower one.
"""

import logging

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from baton_kernels import advance
from baton_wire.plan import Plan
from gpu_worker.attention.triton_backend import Rows
from gpu_worker.cuda.forward import Forward, Pool
from gpu_worker.cuda.inbox import Inbox
from gpu_worker.cuda.prompt_rows import PassRows, PassSize, captured_sizes, largest_words, write

log = logging.getLogger(__name__)


class Prefiller:
    """Prompt passes."""

    def __init__(self, forward: Forward, most_rows: int) -> None:
        self._forward, self._tiling = forward, forward.attention.tiling
        slots = len(forward.table)
        self.sizes = captured_sizes(self._tiling, slots, most_rows)
        self._graphs: dict[PassSize, torch.cuda.CUDAGraph] = {}
        self._head: torch.cuda.CUDAGraph | None = None
        self._picked: Tensor | None = None  # hidden states to sample from, [picks, hidden]
        self.words = largest_words(self._tiling, slots, most_rows)  # of an inbox

    def warm_up(self, inbox: Inbox) -> None:
        """Compiles what only small passes need, by one that is all padding."""
        self._hidden(self.padding(inbox, self.sizes[0]))

    def capture(self, inbox: Inbox, pool: Pool) -> None:
        """Captures every size, the largest first, so that the others find their memory in the pool."""
        for size in reversed(self.sizes):
            rows = self.padding(inbox, size)
            hidden = self._hidden(rows)
            if self._picked is None:
                self._picked = torch.empty_like(hidden)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._picked.copy_(self._hidden(rows))
            self._graphs[size] = graph
        assert self._picked is not None, "there is a size for one token"
        self._forward.sample(self._picked, rows.pick_slots)
        torch.cuda.synchronize()
        self._head = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._head, pool=pool):
            self._forward.sample(self._picked, rows.pick_slots)
        log.info("captured prompt graphs=%d largest=%d", len(self._graphs), self.sizes[-1].rows)

    def lay_out(self, plan: Plan, page: NDArray[np.int32]) -> PassSize:
        """Writes the plan's chunks into a page of the inbox, from its first word on.

        The table must have been asked for the plan's changes before. Raises as `SlotTable.known`.
        """
        split = not self._forward.attention.deterministic
        known = self._forward.table.known(plan)
        return write(plan, known, self._tiling, self.sizes, page, split=split)

    def run(self, size: PassSize, inbox: Inbox, picks: bool) -> None:
        """Computes the chunks in the inbox. `picks`: some of them end a prompt, and sample its next token."""
        graph = self._graphs.get(size)
        if graph is not None and self._head is not None:
            graph.replay()
            if picks:
                self._head.replay()
            return
        rows = size.cut(inbox.words)
        hidden = self._hidden(rows)
        if picks:
            self._forward.sample(hidden, rows.pick_slots)

    def padding(self, inbox: Inbox, size: PassSize) -> PassRows:
        """The inbox's rows for a pass of nothing but padding."""
        inbox.words.zero_()
        rows = size.cut(inbox.words)
        rows.slots.fill_(-1)
        rows.pick_slots.fill_(-1)
        return rows

    def begin(self, rows: PassRows) -> Rows:
        """What a pass over these rows needs besides their tokens."""
        table = self._forward.table
        places = torch.empty_like(rows.positions)
        advance.locate(table.block_table, table.block_size, rows.slots, rows.positions, places)
        work = self._forward.attention.plan_prompts(rows.items, rows.splits, table.block_table)
        return Rows(rows.positions, places, table.block_table, prefill=work)

    def _hidden(self, rows: PassRows) -> Tensor:
        """Hidden states [picks, hidden]; keys and values are in the cache after it."""
        return self._forward(rows.tokens, self.begin(rows), rows.picked)
