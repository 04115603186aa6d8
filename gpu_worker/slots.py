"""The slot table: all state of sequences that a worker keeps, indexed by slot and persistent on the device.

Plans change it, sampling advances it. What only plans decide (how many blocks a slot has been given, its stop
ids) is also known on the host, so nothing here ever waits for the device.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from baton_kernels import reference
from baton_wire.columns import Column
from baton_wire.plan import MAX_STOP_IDS, Mode, Plan
from baton_wire.result import End
from baton_wire.state import Occupancy, state_hash
from gpu_worker.attention.interface import Numbers
from gpu_worker.errors import PlanError


class SlotTable:
    """Columns [slots, …]. A row is meaningful while its occupancy is not FREE."""

    def __init__(
        self, slots: int, blocks_per_slot: int, block_size: int, null_block: int, device: torch.device
    ) -> None:
        def column(value: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.full((slots, *shape), value, dtype=dtype, device=device)

        self.block_size = block_size
        self.null_block = null_block
        self.block_table = column(null_block, blocks_per_slot, dtype=torch.int32)
        self.length = column(0)  # positions in the cache
        self.occupancy = column(Occupancy.FREE)
        self.mode = column(Mode.AUTO)
        self.admitted = column(0)  # step of the latest admission
        self.last_token = column(-1)
        self.max_length = column(0)
        self.min_length = column(0)
        self.stop_ids = column(-1, MAX_STOP_IDS)
        self.seed = column(0)
        self.temperature = column(0, dtype=torch.float32)
        self.top_p = column(1, dtype=torch.float32)
        self.min_p = column(0, dtype=torch.float32)
        self.top_k = column(0)
        self._blocks = np.zeros(slots, np.int64)  # blocks given to each slot since its admission
        self._cached = np.zeros(slots, np.int64)  # its length at admission
        self._random = np.zeros(slots, np.bool_)  # whether its temperature is above 0
        self._device = device

    def __len__(self) -> int:
        return len(self.length)

    def reset(self) -> None:
        """Every slot is free; as new."""
        self.occupancy.fill_(Occupancy.FREE)

    def apply(self, plan: Plan) -> Tensor | None:
        """Releases, admissions and block appends. Returns the blocks that will be written anew, if any.

        Raises `PlanError` for slots or blocks that do not exist.
        """
        self._check(plan)
        if len(plan.releases):
            self.occupancy[self._rows(plan.releases)] = Occupancy.FREE
        if len(plan.admissions):
            self._admit(plan)
        return self._append(plan) if len(plan.appends) else None

    def _check(self, plan: Plan) -> None:
        for name, slots in (
            ("release", plan.releases),
            ("admission", plan.admissions["slot"]),
            ("append", plan.appends["slot"]),
            ("chunk", plan.chunks["slot"]),
            ("held", plan.held),
        ):
            if len(slots) and slots.max() >= len(self):
                raise PlanError(f"step {plan.step}: {name} of slot {slots.max()}, there are {len(self)}")
        if len(plan.appends) and plan.appends["block"].max() >= self.null_block:
            raise PlanError(
                f"step {plan.step}: block {plan.appends['block'].max()}, there are {self.null_block}"
            )
        if plan.row_bound > len(self):
            raise PlanError(f"step {plan.step}: row bound {plan.row_bound}, there are {len(self)} slots")

    def _rows(self, values: NDArray[np.generic], dtype: type[np.generic] = np.int64) -> Tensor:
        """A plan's column on the device."""
        return torch.from_numpy(values.astype(dtype)).to(self._device)

    def _admit(self, plan: Plan) -> None:
        admissions = plan.admissions
        slots = self._rows(admissions["slot"])
        self.occupancy[slots] = Occupancy.PREFILL
        self.admitted[slots] = plan.step
        self.last_token[slots] = -1
        self.block_table[slots] = self.null_block
        for column, name in (
            (self.mode, "mode"),
            (self.length, "cached"),
            (self.max_length, "max_length"),
            (self.min_length, "min_length"),
        ):
            column[slots] = self._rows(admissions[name])
        sampling = admissions["sampling"]
        self.seed[slots] = self._rows(sampling["seed"])  # astype keeps the bits
        self.top_k[slots] = self._rows(sampling["top_k"])
        for column, name in (
            (self.temperature, "temperature"),
            (self.top_p, "top_p"),
            (self.min_p, "min_p"),
        ):
            column[slots] = self._rows(sampling[name], np.float32)
        self.stop_ids[slots] = self._rows(_ragged(plan.stop_ids, admissions["stops"].astype(np.int64)))
        self._blocks[admissions["slot"]] = 0
        self._cached[admissions["slot"]] = admissions["cached"]
        self._random[admissions["slot"]] = sampling["temperature"] > 0

    def _append(self, plan: Plan) -> Tensor | None:
        """Blocks go to the end of their slots' rows; those behind a slot's cached prefix are returned."""
        order = np.argsort(plan.appends["slot"], kind="stable")
        slots = plan.appends["slot"][order].astype(np.int64)
        blocks = plan.appends["block"][order].astype(np.int64)
        places = self._blocks[slots] + np.arange(len(slots)) - np.searchsorted(slots, slots)
        if places.max() >= self.block_table.shape[1]:
            raise PlanError(f"step {plan.step}: slot {slots[places.argmax()]} gets block {places.max() + 1}")
        self._blocks[slots] = places + 1  # the last of a slot's assignments counts
        self.block_table[self._rows(slots), self._rows(places)] = self._rows(blocks, np.int32)
        fresh = blocks[places * self.block_size >= self._cached[slots]]
        return self._rows(fresh) if len(fresh) else None

    def sampling(self, slots: Numbers) -> reference.SamplingRows | None:
        """Parameters of these slots' next tokens, None where all are greedy."""
        if not self._random[slots].any():
            return None
        rows = torch.from_numpy(slots).to(self._device)
        columns = (self.seed, self.length, self.temperature, self.top_p, self.min_p, self.top_k)
        return reference.SamplingRows(*(column.index_select(0, rows) for column in columns))

    def advance(self, slots: Numbers, tokens: Column, finite: Column) -> Column:
        """Takes in what the slots sampled; returns why each ends (`End`), 0 where it goes on.

        Their lengths are those after the step; a sequence has one token more. `finite`: whether its logits
        were sound.
        """
        full = self.length.numpy()[slots] + 1 >= self.max_length.numpy()[slots]
        stopped = (self.stop_ids.numpy()[slots] == tokens[:, None]).any(1)
        reasons: Column = np.where(stopped, End.STOP, full * End.LENGTH)
        reasons[~finite] = End.NUMERICAL
        self.last_token.numpy()[slots] = tokens
        self.occupancy.numpy()[slots] = (reasons == 0) * Occupancy.DECODE
        return reasons

    def hash(self, row_bound: int) -> int:
        """The state hash after a step: slots from `row_bound` on are free."""
        columns = (self.admitted, self.length, self.occupancy, self.last_token)
        admitted, length, occupancy, last_token = (column.numpy()[:row_bound] for column in columns)
        slots = occupancy.nonzero()[0]
        return state_hash(slots, admitted[slots], length[slots], occupancy[slots], last_token[slots])


def _ragged(values: NDArray[np.generic], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """[len(counts), MAX_STOP_IDS], row i holding its `counts[i]` values, then -1."""
    rows = np.full((len(counts), MAX_STOP_IDS), -1, np.int64)
    rows[np.arange(MAX_STOP_IDS) < counts[:, None]] = values
    return rows
