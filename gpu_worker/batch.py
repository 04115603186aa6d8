"""Lays out the rows of one forward pass from a plan and the slot table, on the host.

For devices whose memory the host shares, CPU that is: rows are packed, decoding slots first, then the chunks'
tokens, then padding. The plan's bucket, which picks captured graphs elsewhere, is only checked: no row's bits
depend on the others.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from baton_wire.plan import Mode, Plan
from baton_wire.state import Occupancy
from gpu_worker.attention import Batch
from gpu_worker.attention.interface import Numbers
from gpu_worker.errors import PlanError
from gpu_worker.slots import SlotTable


@dataclass(frozen=True, slots=True)
class Step:
    """A batch with its tokens, which rows sample for which slot, and what becomes of lengths."""

    batch: Batch
    tokens: Tensor  # int64 [padded rows]
    positions: Tensor  # int64 [padded rows], 0 in the padding
    samples: Tensor | None  # int64 [padded]: rows of the batch whose logits are needed; None: the first ones
    slots: Numbers  # [n]: slots that sample, in that order
    moved: Numbers  # slots whose length changes …
    lengths: Numbers  # … and to what


def lay_out(plan: Plan, slots: SlotTable, multiple: int, max_rows: int) -> Step | None:
    """The step that `plan` asks for, None where nothing is to be computed.

    `multiple`: rows are padded to a multiple of this. Raises `PlanError` where chunks do not go on where the
    slot is, more slots decode than the bucket says, or there are more than `max_rows` rows.
    """
    decoding = _decoding(plan, slots)
    decodes, total = len(decoding), len(decoding) + len(plan.chunk_tokens)
    if decodes > plan.bucket:
        raise PlanError(f"step {plan.step}: {decodes} slots decode in a bucket of {plan.bucket}")
    if total > max_rows:
        raise PlanError(f"step {plan.step}: {total} rows, at most {max_rows} were offered")
    if not total:
        return None
    tokens = np.zeros(_padded(total, multiple), np.int64)
    positions = np.zeros_like(tokens)
    tokens[:decodes] = slots.last_token.numpy()[decoding]
    positions[:decodes] = slots.length.numpy()[decoding]
    sampling, moved, lengths, rows, samples = decoding, decoding, positions[:decodes] + 1, decoding, None
    written = None
    if len(plan.chunks):
        chunked, start, count = (plan.chunks[name].astype(np.int64) for name in ("slot", "start", "count"))
        known = slots.known(plan)
        _check(plan, chunked, start, known, slots)
        tokens[decodes:total] = plan.chunk_tokens
        ends = count.cumsum()
        positions[decodes:total] = np.arange(ends[-1]) + (start + count - ends).repeat(count)
        last = plan.chunks["last"] == 1
        sampling = np.concatenate((decoding, chunked[last]))
        samples = np.zeros(_padded(len(sampling), multiple), np.int64)
        samples[: len(sampling)] = np.concatenate((np.arange(decodes), decodes + ends[last] - 1))
        rows = np.concatenate((decoding, chunked.repeat(count)))
        if known.any():
            written = np.delete(np.arange(total), decodes + ends[known] - 1)
        moved, lengths = np.concatenate((decoding, chunked)), np.concatenate((lengths, start + count))
    return Step(
        batch=Batch(rows, positions[:total], decodes, tuple(plan.chunks["count"].tolist()), written),
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        samples=None if samples is None else torch.from_numpy(samples),
        slots=sampling,
        moved=moved,
        lengths=lengths,
    )


def _decoding(plan: Plan, slots: SlotTable) -> Numbers:
    """Slots that take one step: active ones in auto mode, and held ones that are named. Longest first."""
    bound = plan.row_bound
    moves = slots.mode.numpy()[:bound] == Mode.AUTO
    moves[plan.held[plan.held < bound]] = True
    moves &= slots.occupancy.numpy()[:bound] == Occupancy.DECODE
    found: Numbers = moves.nonzero()[0]
    if len(found) > 1:
        found = found[np.argsort(-slots.length.numpy()[found], kind="stable")]
    return found


def _padded(rows: int, multiple: int) -> int:
    return -(-rows // multiple) * multiple


def _check(plan: Plan, chunked: Numbers, start: Numbers, known: NDArray[np.bool_], slots: SlotTable) -> None:
    """Every chunk must go on where its slot is; a known position is the one before."""
    occupancy, length = slots.occupancy.numpy()[chunked], slots.length.numpy()[chunked]
    wrong = ((occupancy != Occupancy.PREFILL) | (length != start + known)).nonzero()[0]
    if len(wrong):
        i = wrong[0]
        state = Occupancy(occupancy[i]).name
        raise PlanError(
            f"step {plan.step}: chunk at {start[i]} for slot {chunked[i]}: {state} at {length[i]}"
        )
