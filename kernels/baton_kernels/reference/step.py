"""What a step does to the slot table after sampling: which slots end, and the hash that both sides compare.

For devices that keep the table to themselves; the host has both in numpy.
"""

import torch
from torch import Tensor

STOP, LENGTH, NUMERICAL = 1, 2, 3  # as baton_wire.result.End; 0: goes on


def end_reasons(
    tokens: Tensor, finite: Tensor, length: Tensor, max_length: Tensor, stop_ids: Tensor
) -> Tensor:
    """Why each row that sampled ends, 0 where it goes on: int64 [n].

    tokens: sampled ids; finite: whether its logits were sound; length: positions in the cache, so that the
    sequence has one token more; stop_ids: [n, stops], -1 where there is none.
    """
    full = length + 1 >= max_length
    stopped = (stop_ids == tokens[:, None]).any(-1)
    reason = torch.where(stopped, STOP, full * LENGTH)
    return torch.where(finite, reason, NUMERICAL)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


_SLOT, _ADMITTED, _LENGTH, _OCCUPANCY, _TOKEN, _MIX_1, _MIX_2 = map(
    _signed,
    (
        0x9E3779B97F4A7C15,
        0xC2B2AE3D27D4EB4F,
        0x165667B19E3779F9,
        0xD6E8FEB86659FD93,
        0xA0761D6478BD642F,
        0xBF58476D1CE4E5B9,
        0x94D049BB133111EB,
    ),
)


def state_hash(admitted: Tensor, length: Tensor, occupancy: Tensor, last_token: Tensor) -> Tensor:
    """`baton_wire.state.state_hash` of a whole table: a scalar, the unsigned word's bits.

    Columns int64 [slots]; occupancy 0 is FREE.
    """
    slots = torch.arange(len(length), device=length.device)
    word = slots * _SLOT + admitted * _ADMITTED + length * _LENGTH + occupancy * _OCCUPANCY
    word += (last_token + 1) * _TOKEN
    word ^= (word >> 30) & ((1 << 34) - 1)
    word *= _MIX_1
    word ^= (word >> 27) & ((1 << 37) - 1)
    word *= _MIX_2
    word ^= (word >> 31) & ((1 << 33) - 1)
    return torch.where(occupancy != 0, word, 0).sum()
