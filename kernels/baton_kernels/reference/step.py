"""What a step does to the slot table after sampling: which slots end."""

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
