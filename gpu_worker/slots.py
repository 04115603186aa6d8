"""The slot table: all state of sequences that a worker keeps, indexed by slot and persistent on the device.

Plans change it, sampling advances it. What only plans decide (how many blocks a slot has been given, its stop
ids) is also known on the host, so nothing here ever waits for the device. All columns lie in one tensor of
words: whatever a plan changes is a list of pairs (where, what), and one operation makes all of it.
"""

from dataclasses import dataclass

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

_WORD = np.dtype(np.int32)
_ALIGNED_WORDS = 64  # columns begin at multiples of this: kernels read in vectors

# All columns that an admission sets.
_RECORD = np.dtype(
    [
        ("occupancy", "<i8"),
        ("mode", "<i8"),
        ("length", "<i8"),
        ("admitted", "<i8"),
        ("last_token", "<i8"),
        ("max_length", "<i8"),
        ("min_length", "<i8"),
        ("seed", "<u8"),
        ("top_k", "<i8"),
        ("stop_ids", "<i8", (MAX_STOP_IDS,)),
        ("temperature", "<f4"),
        ("top_p", "<f4"),
        ("min_p", "<f4"),
    ]
)
_RECORD_WORDS = {name: _RECORD[name].itemsize // _WORD.itemsize for name in _RECORD.names or ()}
_ADMITTED_AS_SENT = ("mode", "max_length", "min_length")
_SAMPLING_AS_SENT = ("seed", "top_k", "temperature", "top_p", "min_p")


@dataclass(frozen=True, slots=True)
class Changes:
    """Words of the table that a plan sets. A word that is named twice gets the same value both times."""

    where: list[Numbers]  # indices of `SlotTable.words`
    what: list[NDArray[np.int32]]
    fresh: Numbers  # blocks that will be written anew

    def __len__(self) -> int:
        return sum(map(len, self.what))


class SlotTable:
    """Columns [slots, …]. A row is meaningful while its occupancy is not FREE."""

    def __init__(
        self, slots: int, blocks_per_slot: int, block_size: int, null_block: int, device: torch.device
    ) -> None:
        sizes = _RECORD_WORDS | {"block_table": blocks_per_slot}
        self._first, end = {}, 0
        for name, size in sizes.items():
            self._first[name] = end
            end += -(-slots * size // _ALIGNED_WORDS) * _ALIGNED_WORDS
        self.words = torch.zeros(end, dtype=torch.int32, device=device)

        def column(name: str, value: float, dtype: torch.dtype, *shape: int) -> Tensor:
            first = self._first[name]
            words = self.words[first : first + slots * sizes[name]]
            return words.view(dtype).view(slots, *shape).fill_(value)

        self.block_size = block_size
        self.null_block = null_block
        self.block_table = column("block_table", null_block, torch.int32, blocks_per_slot)
        self.length = column("length", 0, torch.int64)  # positions in the cache
        self.occupancy = column("occupancy", Occupancy.FREE, torch.int64)
        self.mode = column("mode", Mode.AUTO, torch.int64)
        self.admitted = column("admitted", 0, torch.int64)  # step of the latest admission
        self.last_token = column("last_token", -1, torch.int64)
        self.max_length = column("max_length", 0, torch.int64)
        self.min_length = column("min_length", 0, torch.int64)
        self.stop_ids = column("stop_ids", -1, torch.int64, MAX_STOP_IDS)
        self.seed = column("seed", 0, torch.int64)
        self.temperature = column("temperature", 0, torch.float32)
        self.top_p = column("top_p", 1, torch.float32)
        self.min_p = column("min_p", 0, torch.float32)
        self.top_k = column("top_k", 0, torch.int64)
        # of each word of a record: where slot 0 has it, and how much further each next slot does
        counts = np.array([*_RECORD_WORDS.values()])
        self._record_first = np.concatenate([self._first[n] + np.arange(c) for n, c in _RECORD_WORDS.items()])
        self._record_stride = counts.repeat(counts)
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
        """Makes the plan's changes, on CPU. Returns the blocks that will be written anew, if any.

        Raises as `changes`.
        """
        changes = self.changes(plan)
        if len(changes):
            self.block_table.numpy()[plan.admissions["slot"]] = self.null_block
            self.words.numpy()[np.concatenate(changes.where)] = np.concatenate(changes.what)
        return torch.from_numpy(changes.fresh) if len(changes.fresh) else None

    def changes(self, plan: Plan, *, prompts: bool = False) -> Changes:
        """What releases, admissions and block appends set; the blocks count as given from here on.

        `prompts`: the lengths that the chunks' slots will have are set as well. Raises `PlanError` for slots
        or blocks that do not exist.
        """
        self._check(plan)
        where: list[Numbers] = []
        what: list[NDArray[np.int32]] = []
        fresh = np.empty(0, np.int64)

        def set_words(first: Numbers, values: NDArray[np.generic]) -> None:
            """Each of the values, [n], at the words from its `first` on."""
            words = values.view(_WORD)
            where.append((first[:, None] + np.arange(len(words) // max(1, len(first)))).reshape(-1))
            what.append(words)

        admitted = plan.admissions["slot"].astype(np.int64)
        if len(plan.releases):
            released = plan.releases.astype(np.int64)
            if len(admitted):  # of a slot that is given away again in this plan, the admission counts
                released = np.setdiff1d(released, admitted)
            set_words(
                self._first["occupancy"] + 2 * released, np.full(len(released), Occupancy.FREE, np.int64)
            )
        records = self._records(plan) if len(admitted) else np.empty(0, _RECORD)
        if prompts:
            slots, lengths = (plan.chunks[name].astype(np.int64) for name in ("slot", "start"))
            lengths += plan.chunks["count"]
            record, chunk = (admitted[:, None] == slots).nonzero()
            records["length"][record] = lengths[chunk]
            set_words(self._first["length"] + 2 * slots, lengths)
        if len(admitted):
            where.append((self._record_first + admitted[:, None] * self._record_stride).reshape(-1))
            what.append(records.view(_WORD))
        if len(plan.appends):
            places, blocks, fresh = self._append(plan)
            set_words(self._first["block_table"] + places, blocks)
        return Changes(where, what, fresh)

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

    def _records(self, plan: Plan) -> NDArray[np.void]:
        """_RECORD of each admission."""
        admissions = plan.admissions
        sampling, slots = admissions["sampling"], admissions["slot"]
        records = np.empty(len(admissions), _RECORD)
        records["occupancy"], records["admitted"], records["last_token"] = Occupancy.PREFILL, plan.step, -1
        records["length"] = admissions["cached"]
        for name in _ADMITTED_AS_SENT:
            records[name] = admissions[name]
        for name in _SAMPLING_AS_SENT:
            records[name] = sampling[name]
        records["stop_ids"] = _ragged(plan.stop_ids, admissions["stops"].astype(np.int64))
        self._blocks[slots] = 0
        self._cached[slots] = admissions["cached"]
        self._random[slots] = sampling["temperature"] > 0
        return records

    def _append(self, plan: Plan) -> tuple[Numbers, NDArray[np.int32], Numbers]:
        """(places in the flattened block table, blocks that go there, those of them behind a prefix)."""
        order = np.argsort(plan.appends["slot"], kind="stable")
        slots = plan.appends["slot"][order].astype(np.int64)
        blocks = plan.appends["block"][order].astype(np.int64)
        places = self._blocks[slots] + np.arange(len(slots)) - np.searchsorted(slots, slots)
        width = self.block_table.shape[1]
        if places.max() >= width:
            raise PlanError(f"step {plan.step}: slot {slots[places.argmax()]} gets block {places.max() + 1}")
        self._blocks[slots] = places + 1  # the last of a slot's assignments counts
        fresh = blocks[places * self.block_size >= self._cached[slots]]
        return slots * width + places, blocks.astype(np.int32), fresh

    def known(self, plan: Plan) -> NDArray[np.bool_]:
        """Which chunks are the last position of a prompt that is cached whole: computed, but not written.

        To be asked after `changes`. Raises `PlanError` for any other chunk within what is cached.
        """
        chunks, cached = plan.chunks, self._cached[plan.chunks["slot"]]
        within: NDArray[np.bool_] = chunks["start"] < cached
        if within.any():
            whole = (chunks["start"] + 1 == cached) & (chunks["count"] == 1) & (chunks["last"] == 1)
            for slot, _, start, count in chunks[within & ~whole].tolist():
                cached_here = f"{self._cached[slot]} positions are cached"
                raise PlanError(f"step {plan.step}: chunk of {count} at {start}, slot {slot}: {cached_here}")
        return within

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
