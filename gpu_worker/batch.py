"""Lays out the rows of one forward pass from a plan and the slot table.

On CPU rows are packed: decoding slots, then the chunks' tokens, then padding. The plan's bucket, meant for
captured graphs over all rows of the table, is not needed then: no row's bits depend on the others.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from baton_wire.plan import Plan
from baton_wire.state import Occupancy
from gpu_worker.attention import Batch
from gpu_worker.errors import PlanError
from gpu_worker.slots import SlotTable


@dataclass(frozen=True, slots=True)
class Step:
    """A batch, and which of its rows sample for which slot."""

    batch: Batch
    rows: Tensor  # int64 [n, padded]: rows of the batch whose logits are needed
    slots: Tensor  # int64 [n]: slots that sample, in that order
    moved: Tensor  # int64: slots whose length changes …
    lengths: Tensor  # … and to what


def lay_out(plan: Plan, slots: SlotTable, multiple: int, max_rows: int) -> Step | None:
    """The step that `plan` asks for, None where nothing is to be computed.

    `multiple`: rows are padded to a multiple of this. Raises `PlanError` where chunks do not go on where the
    slot is, or there are more than `max_rows` rows.
    """
    decoding = slots.decoding(plan)
    chunks = {name: plan.chunks[name].astype(np.int64) for name in ("slot", "start", "count", "last")}
    _check(plan, chunks, slots)
    decodes, total = len(decoding), len(decoding) + len(plan.chunk_tokens)
    if total > max_rows:
        raise PlanError(f"step {plan.step}: {total} rows, at most {max_rows} were offered")
    if not total:
        return None
    tokens = torch.zeros(_padded(total, multiple), dtype=torch.int64)
    positions = torch.zeros_like(tokens)
    tokens[:decodes] = slots.last_token[decoding]
    positions[:decodes] = slots.length[decoding]
    tokens[decodes:total] = torch.from_numpy(plan.chunk_tokens.astype(np.int64))
    positions[decodes:total] = torch.from_numpy(_positions(chunks["start"], chunks["count"]))
    ends = decodes + chunks["count"].cumsum()
    last = chunks["last"] == 1
    samples = np.concatenate((np.arange(decodes), ends[last] - 1))
    rows = np.zeros(_padded(len(samples), multiple), np.int64)
    rows[: len(samples)] = samples
    batch = Batch(
        tokens=tokens,
        positions=positions,
        slots=np.concatenate((decoding.numpy(), chunks["slot"].repeat(chunks["count"]))),
        places=positions[:total].numpy(),
        decodes=decodes,
        chunks=tuple(chunks["count"].tolist()),
    )
    return Step(
        batch=batch,
        rows=torch.from_numpy(rows),
        slots=torch.cat((decoding, torch.from_numpy(chunks["slot"][last]))),
        moved=torch.cat((decoding, torch.from_numpy(chunks["slot"]))),
        lengths=torch.cat((positions[:decodes] + 1, torch.from_numpy(chunks["start"] + chunks["count"]))),
    )


def _padded(rows: int, multiple: int) -> int:
    return -(-rows // multiple) * multiple


def _positions(start: NDArray[np.int64], count: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions of all chunks' tokens, one chunk after the other."""
    first = count.cumsum() - count
    positions: NDArray[np.int64] = np.arange(count.sum()) + (start - first).repeat(count)
    return positions


def _check(plan: Plan, chunks: dict[str, NDArray[np.int64]], slots: SlotTable) -> None:
    for slot, start in zip(chunks["slot"].tolist(), chunks["start"].tolist(), strict=True):
        occupancy, length = int(slots.occupancy[slot]), int(slots.length[slot])
        if occupancy != Occupancy.PREFILL or length != start:
            state = Occupancy(occupancy).name
            raise PlanError(
                f"step {plan.step}: chunk at {start} for slot {slot}, which is {state} at {length}"
            )
