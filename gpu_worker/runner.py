"""Executes plans: the whole of a worker's step, from the plan's changes to the result.

Knows nothing of links, sessions or processes.
"""

import time

import numpy as np
import torch
from torch import Tensor

from baton_kernels import reference
from baton_wire.columns import Column
from baton_wire.plan import Plan
from baton_wire.result import ENDED, NO_TOKEN, Result
from gpu_worker.attention import Attention, Context
from gpu_worker.batch import Step, lay_out
from gpu_worker.limits import Limits
from gpu_worker.models import Model
from gpu_worker.slots import SlotTable


class Runner:
    """One rank: model, cache and slot table. Not to be shared between threads."""

    def __init__(
        self, model: Model, attention: Attention, cache: Tensor, rotary: Tensor, limits: Limits, rank: int = 0
    ) -> None:
        """cache: of `limits.num_blocks` blocks; rotary: for `limits.max_model_len` positions."""
        self.model, self.attention, self.cache, self.rotary = model, attention, cache, rotary
        self.limits, self.rank = limits, rank
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
        self.slots.reset()

    @torch.inference_mode()
    def execute(self, plan: Plan) -> Result:
        """One step. Raises `PlanError` where the plan does not fit the slot table; the table is void then."""
        started = time.perf_counter()
        fresh = self.slots.apply(plan)
        if fresh is not None:
            self.attention.clear(self.cache, fresh)
        tokens = torch.full((plan.row_bound,), NO_TOKEN, dtype=torch.int32)
        ends = np.empty(0, ENDED)
        step = lay_out(plan, self.slots, self.limits.row_multiple, self.limits.max_tokens_per_step)
        if step is not None:
            hidden = self._forward(step)
            self.slots.length[step.moved] = step.lengths
            if len(step.slots):
                ends = self._sample(plan, step, hidden, tokens)
        return Result(
            step=plan.step,
            state_hash=self.slots.hash(),
            exec_us=round((time.perf_counter() - started) * 1e6),
            rank=self.rank,
            tokens=tokens.numpy() if self.rank == 0 else np.empty(0, np.int32),
            ends=ends,
        )

    def _forward(self, step: Step) -> Tensor:
        """Hidden states of the step's rows; their keys and values are in the cache after it."""
        batch = step.batch
        context = Context(
            attention=self.attention,
            cache=self.cache,
            work=self.attention.plan(batch, self.slots.block_table),
            rotary=self.rotary[batch.positions],
        )
        hidden: Tensor = self.model(batch.tokens, context)
        return hidden

    def _sample(self, plan: Plan, step: Step, hidden: Tensor, tokens: Tensor) -> Column:
        """Samples, advances the slot table, fills in `tokens`; returns the ends."""
        slots, table = step.slots, self.slots
        logits = self._logits(step, hidden)
        self._mask(plan, slots, logits)
        rows = reference.SamplingRows(
            seed=table.seed[slots],
            position=table.length[slots],
            temperature=table.temperature[slots],
            top_p=table.top_p[slots],
            min_p=table.min_p[slots],
            top_k=table.top_k[slots],
        )
        sampled, finite = reference.sample(logits, rows)
        sampled = torch.where(finite, sampled, NO_TOKEN)
        reasons = table.advance(slots, sampled, finite)
        tokens[slots] = sampled.to(torch.int32)
        over = reasons.nonzero().squeeze(-1)
        ends = np.empty(len(over), ENDED)
        ends["slot"], ends["reason"] = slots[over].numpy(), reasons[over].numpy()
        return ends

    def _logits(self, step: Step, hidden: Tensor) -> Tensor:
        """float32 [n, vocabulary] of the slots that sample; may be written to."""
        logits: Tensor = self.model.logits(hidden[step.rows])
        return logits[: len(step.slots)]

    def _mask(self, plan: Plan, slots: Tensor, logits: Tensor) -> None:
        """Forbids stop ids below a slot's min_length, and what the masks of held slots do not allow."""
        table = self.slots
        early = (table.length[slots] < table.min_length[slots])[:, None] & (table.stop_ids[slots] >= 0)
        row, column = early.nonzero(as_tuple=True)
        if len(row):
            logits[row, table.stop_ids[slots][row, column]] = -torch.inf
        if len(plan.held):
            index = {slot: i for i, slot in enumerate(slots.tolist())}
            vocabulary = logits.shape[1]
            for slot, words in zip(plan.held.tolist(), plan.masks, strict=True):
                if slot in index:
                    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:vocabulary]
                    allowed = torch.zeros(vocabulary, dtype=torch.bool)
                    allowed[: len(bits)] = torch.from_numpy(bits.astype(bool))
                    logits[index[slot]].masked_fill_(~allowed, -torch.inf)
