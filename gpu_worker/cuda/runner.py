"""Executes plans on a CUDA device without ever waiting for it: plans are queued, results are picked up later.

    plan's changes → decode step (graph) → prompt chunks → advance → copy of the result to the host

All on one stream, in step order. Knows nothing of links, sessions or processes.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from baton_kernels import advance
from baton_kernels.decode_attention import DecodeWork
from baton_wire.columns import TOKEN
from baton_wire.plan import Plan
from baton_wire.result import ENDED, Result
from gpu_worker.attention.interface import AttentionShape
from gpu_worker.attention.triton_backend import TritonAttention
from gpu_worker.cuda.decode import Decoder
from gpu_worker.cuda.prefill import prefill
from gpu_worker.errors import PlanError
from gpu_worker.limits import Limits
from gpu_worker.models import Model
from gpu_worker.slots import SlotTable

RING = 32  # results on the device and on the host; more than plans in flight


@dataclass(frozen=True, slots=True)
class _Pending:
    """A step that is queued."""

    step: int
    row_bound: int
    place: int  # in the ring
    begun: torch.cuda.Event
    done: torch.cuda.Event


class CudaRunner:
    """One rank on one device. Not to be shared between threads."""

    def __init__(
        self,
        model: Model,
        attention: TritonAttention,
        shape: AttentionShape,
        cache: Tensor,
        rotary: Tensor,
        limits: Limits,
        vocabulary: int,
        rank: int = 0,
    ) -> None:
        self.limits, self.rank = limits, rank
        self._model, self._attention, self._shape = model, attention, shape
        self._cache, self._rotary = cache, rotary
        device, slots = cache.device, limits.max_slots
        width = -(-limits.max_model_len // limits.block_size)
        self.slots = SlotTable(slots, width, limits.block_size, limits.num_blocks, device)
        work = DecodeWork.make(
            slots, shape.heads, shape.kv_heads, shape.head_dim, limits.max_model_len, device
        )
        self.decoder = Decoder(model, attention, cache, rotary, self.slots, work, vocabulary)
        size = (RING, advance.HEADER + 2 * slots)
        self._results = torch.zeros(size, dtype=torch.int32, device=device)
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=True)
        self._steps = torch.zeros(1, dtype=torch.int64, device=device)
        self._count = 0  # of results asked for, as `_steps` on the device
        self._pending: deque[_Pending] = deque()
        self._decoding: set[int] = set()  # slots whose prompt was sent to the end; some may have ended

    def reset(self) -> None:
        """Forgets every sequence and every result not picked up."""
        torch.cuda.synchronize()
        self._pending.clear()
        self._decoding.clear()
        self.slots.reset()

    @property
    def outstanding(self) -> int:
        """Steps queued whose results were not picked up."""
        return len(self._pending)

    @torch.inference_mode()
    def submit(self, plan: Plan) -> None:
        """Queues a step. Raises `PlanError` where the plan cannot be executed; the table is void then."""
        if len(self._pending) >= RING - 1:
            raise PlanError(f"step {plan.step}: {len(self._pending)} steps are in flight already")
        begun, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        self.slots.apply(plan)
        self._decoding.difference_update(plan.releases.tolist(), plan.admissions["slot"].tolist())
        rows = max(1, plan.row_bound)
        if len(plan.held):
            held = torch.from_numpy(plan.held.astype(np.int64)).to(self._cache.device)
            masks = torch.from_numpy(plan.masks.astype(np.uint32).view(np.int32)).to(self._cache.device)
            self.decoder.constrained(rows, held, masks)
        elif self._decoding:
            self.decoder.step(rows)
        else:
            self.decoder.idle()
        if len(plan.chunks):
            self._prefill(plan)
        place = self._count % RING
        advance.advance(self.slots, self.decoder.rows.sampled, self._results, self._steps)
        self._host[place].copy_(self._results[place], non_blocking=True)
        done.record()
        self._count += 1
        self._pending.append(_Pending(plan.step, plan.row_bound, place, begun, done))

    def finished(self) -> list[Result]:
        """Results of steps that are through, in step order; does not wait."""
        results = []
        while self._pending and self._pending[0].done.query():
            results.append(self._result(self._pending.popleft()))
        return results

    def execute(self, plan: Plan) -> Result:
        """One step, waited for. For tests and warm-up; nothing may be outstanding."""
        assert not self._pending
        self.submit(plan)
        torch.cuda.synchronize()
        return self.finished()[0]

    def _prefill(self, plan: Plan) -> None:
        rows = self.decoder.rows
        prefill(
            plan,
            *(self._model, self._attention, self._shape, self._cache, self._rotary, self.slots),
            self.decoder.sampling,
            rows.sampled,
        )
        self._decoding.update(plan.chunks["slot"][plan.chunks["last"] == 1].tolist())

    def _result(self, pending: _Pending) -> Result:
        """Unpacks what `advance` packed."""
        packed = self._host[pending.place].numpy()
        header, slots = packed[: advance.HEADER].view(np.uint32), self.limits.max_slots
        tokens = packed[advance.HEADER : advance.HEADER + slots]
        reasons = packed[advance.HEADER + slots :]
        over = reasons.nonzero()[0]
        ends = np.empty(len(over), ENDED)
        ends["slot"], ends["reason"] = over, reasons[over]
        none = np.empty(0, TOKEN)
        return Result(
            step=pending.step,
            state_hash=int(header[0]) | int(header[1]) << 32,
            exec_us=round(pending.begun.elapsed_time(pending.done) * 1e3),
            rank=self.rank,
            tokens=tokens[: pending.row_bound].astype(TOKEN) if self.rank == 0 else none,
            ends=ends,
        )
