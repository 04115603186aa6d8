"""Executes plans: the whole of a worker's step, from the plan's changes to the result.

Knows nothing of links, sessions or processes.
"""

import time

import numpy as np
import torch
from torch import Tensor

from baton_kernels import reference
from baton_wire.columns import TOKEN, Column
from baton_wire.plan import Plan
from baton_wire.result import ENDED, NO_TOKEN, Result
from gpu_worker.attention import Context, HostAttention
from gpu_worker.attention.interface import Numbers
from gpu_worker.batch import Step, lay_out
from gpu_worker.limits import Limits
from gpu_worker.models import Model
from gpu_worker.slots import SlotTable


class Runner:
    """One rank: model, cache and slot table. Not to be shared between threads."""

    def __init__(
        self,
        model: Model,
        attention: HostAttention,
        cache: Tensor,
        rotary: Tensor,
        limits: Limits,
        rank: int = 0,
    ) -> None:
        """cache: of `limits.num_blocks` blocks; rotary: for `limits.max_model_len` positions."""
        self.model, self.attention, self.cache, self.rotary = model, attention, cache, rotary
        self.limits, self.rank = limits, rank
        self._finished: list[Result] = []
        width = -(-limits.max_model_len // limits.block_size)
        self.slots = SlotTable(
            limits.max_slots,
            -(-width // attention.blocks_multiple) * attention.blocks_multiple,
            limits.block_size,
            limits.num_blocks,
            cache.device,
        )

    def reset(self) -> None:
        """Forgets every sequence."""
        self._finished.clear()
        self.slots.reset()

    outstanding = 0  # a step is through when it has been submitted

    def submit(self, plan: Plan) -> None:
        """Executes a step; `finished` has its result. Raises as `execute`."""
        self._finished.append(self.execute(plan))

    def finished(self) -> list[Result]:
        """Results not picked up yet, in step order."""
        finished, self._finished = self._finished, []
        return finished

    @torch.inference_mode()
    def execute(self, plan: Plan) -> Result:
        """One step. Raises `PlanError` where the plan does not fit the slot table; the table is void then."""
        started = time.perf_counter()
        fresh = self.slots.apply(plan)
        if fresh is not None:
            self.attention.clear(self.cache, fresh)
        tokens = np.full(plan.row_bound if self.rank == 0 else 0, NO_TOKEN, TOKEN)
        ends = np.empty(0, ENDED)
        step = lay_out(plan, self.slots, self.limits.row_multiple, self.limits.max_tokens_per_step)
        if step is not None:
            hidden = self._forward(step)
            self.slots.length.numpy()[step.moved] = step.lengths
            if len(step.slots):
                sampled, reasons = self._sample(plan, step, hidden)
                if self.rank == 0:
                    tokens[step.slots] = sampled
                over = reasons.nonzero()[0]
                ends = np.empty(len(over), ENDED)
                ends["slot"], ends["reason"] = step.slots[over], reasons[over]
        return Result(
            step=plan.step,
            state_hash=self.slots.hash(plan.row_bound),
            exec_us=round((time.perf_counter() - started) * 1e6),
            rank=self.rank,
            tokens=tokens,
            ends=ends,
        )

    def _forward(self, step: Step) -> Tensor:
        """Hidden states of the step's rows; their keys and values are in the cache after it."""
        context = Context(
            attention=self.attention,
            cache=self.cache,
            work=self.attention.plan(step.batch, self.slots.block_table),
            rotary=self.rotary.index_select(0, step.positions),
        )
        return self.model(step.tokens, context)

    def _sample(self, plan: Plan, step: Step, hidden: Tensor) -> tuple[Column, Column]:
        """(tokens, why each ends or 0) of the slots that sample; the slot table has taken them in."""
        logits = self._logits(step, hidden)
        self._mask(plan, step.slots, logits)
        sampled, finite = (x.numpy() for x in reference.sample(logits, self.slots.sampling(step.slots)))
        if not finite.all():
            sampled[~finite] = NO_TOKEN
        return sampled, self.slots.advance(step.slots, sampled, finite)

    def _logits(self, step: Step, hidden: Tensor) -> Tensor:
        """float32 [n, vocabulary] of the slots that sample; may be written to."""
        rows = len(step.slots)
        if step.samples is not None:
            hidden = hidden.index_select(0, step.samples)
        return self.model.logits(hidden)[:rows]

    def _mask(self, plan: Plan, slots: Numbers, logits: Tensor) -> None:
        """Forbids stop ids below a slot's min_length, and what the masks of held slots do not allow."""
        table = self.slots
        early = (table.length.numpy()[slots] < table.min_length.numpy()[slots]).nonzero()[0]
        if len(early):
            stops = table.stop_ids.numpy()[slots[early]]
            row, column = ((stops >= 0) & (stops < logits.shape[1])).nonzero()
            logits[torch.from_numpy(early[row]), torch.from_numpy(stops[row, column])] = -torch.inf
        for slot, words in zip(plan.held.tolist(), plan.masks, strict=True):
            for row in (slots == slot).nonzero()[0]:
                bits = np.unpackbits(words.view(np.uint8), count=logits.shape[1], bitorder="little")
                logits[row].masked_fill_(torch.from_numpy(bits == 0), -torch.inf)
