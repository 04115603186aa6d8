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

from baton_kernels import advance, sampler
from baton_kernels.sampler import SampleWork
from baton_wire.plan import Plan
from gpu_worker.attention.interface import Context, DeviceAttention
from gpu_worker.attention.triton_backend import Rows
from gpu_worker.cuda.inbox import Inbox
from gpu_worker.cuda.prompt_rows import PassRows, PassSize, captured_sizes, largest_words, write
from gpu_worker.models import Model
from gpu_worker.slots import SlotTable

log = logging.getLogger(__name__)


class Prefiller:
    """Prompt passes of one model over one slot table."""

    def __init__(
        self,
        model: Model,
        attention: DeviceAttention,
        cache: Tensor,
        rotary: Tensor,
        table: SlotTable,
        sampling: SampleWork,
        sampled: Tensor,
        most_rows: int,
    ) -> None:
        """`sampling`, `sampled`: the decode step's; `sampled` has the tokens of prompts that end."""
        self._model, self._attention, self._cache, self._rotary = model, attention, cache, rotary
        self._table, self._sampling, self._sampled = table, sampling, sampled
        self._tiling = attention.tiling
        self._sizes = captured_sizes(self._tiling, len(table), most_rows)
        self._graphs: dict[PassSize, torch.cuda.CUDAGraph] = {}
        self._head: torch.cuda.CUDAGraph | None = None
        self._picked: Tensor | None = None  # hidden states to sample from, [picks, hidden]
        self.words = largest_words(self._tiling, len(table), most_rows)  # of an inbox

    def warm_up(self, inbox: Inbox) -> None:
        """Compiles what only small passes need, by one that is all padding."""
        self._forward(self._padding(inbox, self._sizes[0]))

    def capture(self, inbox: Inbox) -> None:
        """Captures every size, the largest first, so that the others find their memory in its pool."""
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self._sizes):
            rows = self._padding(inbox, size)
            hidden = self._forward(rows)
            if self._picked is None:
                self._picked = torch.empty_like(hidden)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._picked.copy_(self._forward(rows))
            self._graphs[size] = graph
        assert self._picked is not None, "there is a size for one token"
        self._sample(self._picked, rows.pick_slots)
        torch.cuda.synchronize()
        self._head = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._head, pool=pool):
            self._sample(self._picked, rows.pick_slots)
        log.info("captured prompt graphs=%d largest=%d", len(self._graphs), self._sizes[-1].rows)

    def lay_out(self, plan: Plan, page: NDArray[np.int32]) -> PassSize:
        """Writes the plan's chunks into a page of the inbox, from its first word on."""
        return write(plan, self._tiling, self._sizes, page, split=not self._attention.deterministic)

    def run(self, size: PassSize, inbox: Inbox, picks: bool) -> None:
        """Computes the chunks in the inbox. `picks`: some of them end a prompt, and sample its next token."""
        graph = self._graphs.get(size)
        if graph is not None and self._head is not None:
            graph.replay()
            if picks:
                self._head.replay()
            return
        rows = size.cut(inbox.words)
        hidden = self._forward(rows)
        if picks:
            self._sample(hidden, rows.pick_slots)

    def _padding(self, inbox: Inbox, size: PassSize) -> PassRows:
        """The inbox's rows for a pass of nothing but padding."""
        inbox.words.zero_()
        rows = size.cut(inbox.words)
        rows.slots.fill_(-1)
        rows.pick_slots.fill_(-1)
        return rows

    def _forward(self, rows: PassRows) -> Tensor:
        """Hidden states [picks, hidden]; keys and values are in the cache after it."""
        table = self._table
        places = torch.empty_like(rows.positions)
        advance.locate(table.block_table, table.block_size, rows.slots, rows.positions, places)
        work = self._attention.plan_prompts(rows.items, rows.splits, table.block_table)
        context = Context(
            attention=self._attention,
            cache=self._cache,
            work=Rows(rows.positions, places, table.block_table, prefill=work),
            rotary=self._rotary,
            picked=rows.picked,
        )
        return self._model(rows.tokens, context)

    def _sample(self, hidden: Tensor, slots: Tensor) -> None:
        sampler.sample(self._model.logits(hidden), slots, self._table, self._sampling, self._sampled)
