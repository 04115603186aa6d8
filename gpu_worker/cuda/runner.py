"""Executes plans on a CUDA device without ever waiting for it: plans are queued, results are picked up later.

    changes and prompt rows, one copy → decode step and prompt chunks → advance, which writes the result

All on one stream, in step order; each but the first is a captured graph where one fits, and a step's decode
rows and chunks are one pass where that fits. A plan without words costs no copy. Results go straight into
memory of the host. Knows nothing of links, sessions or processes.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from baton_kernels import advance
from baton_kernels.sampler import SampleWork
from baton_wire.columns import TOKEN
from baton_wire.plan import Plan
from baton_wire.result import ENDED, Result
from gpu_worker.attention.interface import DeviceAttention
from gpu_worker.cuda.decode import Decoder
from gpu_worker.cuda.forward import Forward
from gpu_worker.cuda.inbox import Inbox, send
from gpu_worker.cuda.mixed import Mixer
from gpu_worker.cuda.prefill import Prefiller
from gpu_worker.cuda.prompt_rows import PICKS, PassSize
from gpu_worker.errors import PlanError
from gpu_worker.limits import Limits
from gpu_worker.models import Model
from gpu_worker.slots import Changes, SlotTable

RING = 32  # results and pages of the inbox; more than plans in flight
_CHANGED_WORDS = 128  # per slot, that a page has room for; what changes more is sent apart


@dataclass(frozen=True, slots=True)
class _Pending:
    """A step that is queued."""

    step: int
    row_bound: int
    place: int  # in the ring


class CudaRunner:
    """One rank on one device. Not to be shared between threads."""

    def __init__(
        self,
        model: Model,
        attention: DeviceAttention,
        cache: Tensor,
        rotary: Tensor,
        limits: Limits,
        vocabulary: int,
        rank: int = 0,
    ) -> None:
        self.limits, self.rank = limits, rank
        self._cache = cache
        device, slots = cache.device, limits.max_slots
        width = -(-limits.max_model_len // limits.block_size)
        self.slots = SlotTable(slots, width, limits.block_size, limits.num_blocks, device)
        sampling = SampleWork.make(slots + PICKS, vocabulary, device)
        sampled = torch.zeros(slots, dtype=torch.int32, device=device)
        forward = Forward(model, attention, cache, rotary, self.slots, sampling, sampled)
        self.decoder = Decoder(forward, attention.decode_space(slots, limits.max_model_len))
        self._prefiller = Prefiller(forward, limits.max_tokens_per_step)
        self._mixer = Mixer(forward, self.decoder, self._prefiller)
        self._inbox = Inbox(self._prefiller.words + 3 * _CHANGED_WORDS * slots, RING, device)
        self._results = torch.zeros(
            (RING, advance.HEADER + 2 * slots), dtype=torch.int32, pin_memory=device.type == "cuda"
        )
        self._packed: NDArray[np.int32] = self._results.numpy()
        self._steps = torch.zeros(1, dtype=torch.int64, device=device)
        self._advance: torch.cuda.CUDAGraph | None = None
        self._count = 0  # of results asked for, as `_steps` on the device
        self._events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(RING)]
        self._pending: deque[_Pending] = deque()

    @torch.inference_mode()
    def prepare(self, *, graphs: bool) -> None:
        """Compiles what is not yet, and captures graphs. Nothing may be outstanding; `reset` afterwards."""
        self._prefiller.warm_up(self._inbox)
        if graphs:
            # one pool: graphs never run beside each other, and what they leave behind lies outside
            pool = torch.cuda.graph_pool_handle()
            self._mixer.capture(self._inbox, pool)
            self._prefiller.capture(self._inbox, pool)
            self.decoder.capture(pool)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._take_in()
            self._advance = graph

    def reset(self) -> None:
        """Forgets every sequence and every result not picked up."""
        torch.cuda.synchronize()
        self._pending.clear()
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
        if plan.bucket > len(self.slots):
            raise PlanError(f"step {plan.step}: bucket {plan.bucket}, there are {len(self.slots)} slots")
        longest = self.limits.max_model_len + 1  # the last token is never read
        if len(plan.admissions) and plan.admissions["max_length"].max() > longest:
            raise PlanError(f"step {plan.step}: a sequence of more than {longest} tokens")
        place = self._count % RING
        begun, done = self._events[place]
        changes = self.slots.changes(plan, prompts=len(plan.chunks) > 0)
        size = self._lay_out(plan, place)
        begun.record()
        self._change(changes, place, size)
        if size is not None and not len(plan.held) and self._mixer.fits(plan.bucket, size):
            self._mixer.run(plan.bucket, size, self._inbox)
        else:
            self._decode(plan)
            if size is not None:
                self._prefiller.run(size, self._inbox, picks=bool(plan.chunks["last"].any()))
        if self._advance is None:
            self._take_in()
        else:
            self._advance.replay()
        done.record()
        self._count += 1
        self._pending.append(_Pending(plan.step, plan.row_bound, place))

    def finished(self) -> list[Result]:
        """Results of steps that are through, in step order; does not wait."""
        results = []
        while self._pending and self._events[self._pending[0].place][1].query():
            results.append(self._result(self._pending.popleft()))
        return results

    def execute(self, plan: Plan) -> Result:
        """One step, waited for. For tests and warm-up; nothing may be outstanding."""
        assert not self._pending
        self.submit(plan)
        torch.cuda.synchronize()
        return self.finished()[0]

    def _lay_out(self, plan: Plan, place: int) -> PassSize | None:
        """Writes the plan's prompt rows into the page, if there are any, and refuses what does not fit."""
        if not len(plan.chunks):
            return None
        limits = self.limits
        if len(plan.chunk_tokens) > limits.max_tokens_per_step or len(plan.chunks) > limits.max_slots:
            raise PlanError(f"step {plan.step}: {len(plan.chunk_tokens)} rows in {len(plan.chunks)} chunks")
        if (plan.chunks["start"].astype(np.int64) + plan.chunks["count"]).max() > limits.max_model_len:
            raise PlanError(f"step {plan.step}: a chunk beyond position {limits.max_model_len}")
        return self._prefiller.lay_out(plan, self._inbox.page(place))

    def _change(self, changes: Changes, place: int, size: PassSize | None) -> None:
        """Sends what the host has to say, prompt rows and changes, and makes the changes."""
        inbox, page, count = self._inbox, self._inbox.page(place), len(changes)
        begin = 0 if size is None else size.words
        middle, end = begin + 2 * count, begin + 3 * count
        if end <= len(page):
            if end:
                if count:
                    np.concatenate(changes.where, out=page[begin:middle].view(np.int64))
                    np.concatenate(changes.what, out=page[middle:end])
                inbox.send(place, end)
            where, what = inbox.words[begin:middle].view(torch.int64), inbox.words[middle:end]
        else:
            inbox.send(place, begin)
            device = self._cache.device
            where, what = (send(np.concatenate(x), device) for x in (changes.where, changes.what))
        if count:
            self.slots.words.scatter_(0, where, what)

    def _decode(self, plan: Plan) -> None:
        """One token for every slot that decodes."""
        rows = plan.bucket
        if len(plan.held):
            device = self._cache.device
            masks = send(plan.masks.astype(np.uint32).view(np.int32), device)
            self.decoder.constrained(rows, send(plan.held.astype(np.int64), device), masks)
        elif rows:
            self.decoder.step(rows)
        else:
            self.decoder.idle()

    def _take_in(self) -> None:
        """The step's end: what was sampled goes into the table, and the result to the host."""
        advance.advance(self.slots, self.decoder.rows.sampled, self._results, self._steps)

    def _result(self, pending: _Pending) -> Result:
        """Unpacks what `advance` packed."""
        packed: NDArray[np.int32] = self._packed[pending.place]
        begun, done = self._events[pending.place]
        header, slots = packed[: advance.HEADER].view(np.uint32), self.limits.max_slots
        tokens = packed[advance.HEADER : advance.HEADER + slots]
        reasons = packed[advance.HEADER + slots :]
        over = reasons.nonzero()[0]
        ends = np.empty(len(over), ENDED)
        ends["slot"], ends["reason"] = over, reasons[over]
        return Result(
            step=pending.step,
            state_hash=int(header[0]) | int(header[1]) << 32,
            exec_us=round(begun.elapsed_time(done) * 1e3),
            rank=self.rank,
            tokens=tokens[: pending.row_bound if self.rank == 0 else 0].astype(TOKEN),
            ends=ends,
        )
