"""What goes into a step and comes out of it: limits, a plan in the making, a plan in flight, an outcome."""

from dataclasses import dataclass, field

import numpy as np

from baton_wire.columns import TOKEN, Column
from baton_wire.hello import longest_sequence
from baton_wire.plan import ADMISSION, APPEND, CHUNK, Mode
from baton_wire.result import End
from scheduler_svc.core.sequence import Sequence


class DesyncError(Exception):
    """A result that this scheduler's plans cannot have: the worker's slot table is not what we think."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a worker group can hold; the worker owns these numbers. See `baton_wire.hello.WorkerHello`."""

    max_slots: int
    num_blocks: int
    block_size: int
    max_model_len: int
    max_tokens_per_step: int
    row_multiple: int = 1

    @property
    def max_sequence(self) -> int:
        """See `longest_sequence`."""
        return longest_sequence(self.max_model_len, self.num_blocks, self.block_size)


@dataclass(slots=True)
class Changes:
    """What the plan being made changes, before it becomes columns."""

    admissions: list[tuple[int, Sequence, int]] = field(default_factory=list)  # slot, sequence, cached
    appends: list[tuple[int, int]] = field(default_factory=list)  # slot, block
    chunks: list[tuple[int, int, int, int]] = field(default_factory=list)  # slot, last, start, count
    tokens: list[Column] = field(default_factory=list)  # of the chunks

    def columns(self) -> dict[str, Column]:
        """The plan's columns that are not empty, by name."""
        columns: dict[str, Column] = {}
        if self.admissions:
            columns["admissions"] = np.array([_admission(*a) for a in self.admissions], ADMISSION)
            columns["stop_ids"] = np.array([i for _, s, _ in self.admissions for i in s.stop_ids], TOKEN)
        if self.appends:
            columns["appends"] = np.array(self.appends, APPEND)
        if self.chunks:
            columns["chunks"] = np.array(self.chunks, CHUNK)
            columns["chunk_tokens"] = np.concatenate(self.tokens)
        return columns


@dataclass(frozen=True, slots=True)
class Flight:
    """A plan on its way: what the confirmed view must repeat when its result comes."""

    step: int
    row_bound: int
    releases: list[int]
    admissions: list[tuple[int, Sequence, int]]
    chunks: list[tuple[int, int, int, int]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one result means for the owners of sequences.

    `owners`, `tokens`: int64 and int32 [n], one new token each. `ended`: sequences that ended with this
    step, after their token if they have one. `started`: sequences first admitted with this step.
    """

    owners: Column
    tokens: Column
    ended: list[tuple[Sequence, End]]
    started: list[Sequence]


def _admission(slot: int, sequence: Sequence, cached: int) -> tuple[object, ...]:
    """The row of `ADMISSION` for a sequence."""
    stops = len(sequence.stop_ids)
    lengths = (cached, sequence.max_length, sequence.min_length)
    return (slot, Mode.AUTO, stops, *lengths, tuple(sequence.sampling.tolist()))
