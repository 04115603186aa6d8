"""One request's state on its way through a group. Plain data: only the scheduler that holds it changes it."""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np

from baton_wire.columns import TOKEN, Column
from baton_wire.frontend import Submit
from scheduler_svc.core.prefix_index import Entry


class Status(IntEnum):
    """Where a sequence is, in the planned view (through the last plan sent)."""

    WAITING = 0  # in the queue: no slot, no blocks
    PREFILL = 1  # has slot and blocks; chunks up to `planned` are sent
    DECODE = 2  # its last chunk is sent: every plan advances it
    OVER = 3  # ended, withdrawn or moved away; holds nothing


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and what is generated from it.

    `owner`: whom tokens are for; opaque here, never negative. `tokens`: int32 [n], what a prefill must
    compute: the prompt and, after a preemption, the output confirmed so far. `max_length`, `min_length`: as
    in `baton_wire.plan.ADMISSION`, counted over prompt and output.
    """

    owner: int
    tokens: Column
    max_length: int
    min_length: int
    sampling: Any
    stop_ids: tuple[int, ...]
    status: Status = Status.WAITING
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    # Prefill: positions [0, planned) are cached or in a chunk that was sent; below len(tokens) at admission.
    planned: int = 0
    # The plan of this step gives the last token that max_length allows; known once the last chunk is sent.
    last_step: int = 0
    # Confirmed tokens of whole blocks, little-endian int32; the rest lies in the slot table's tail.
    history: bytearray = field(default_factory=bytearray)
    # Keys of `tokens`' whole blocks, computed once; the entry under which the chain continues.
    keys: list[bytes] = field(default_factory=list)
    chain: Entry | None = None
    # Of its first blocks, so many were found in the index at this admission.
    indexed: int = 0
    # Prompt tokens found in the prefix cache at the first admission; -1 before it.
    cached: int = -1
    preemptions: int = 0
    started: bool = False  # its owner was told of its first admission

    @staticmethod
    def of(owner: int, request: Submit) -> "Sequence":
        """A waiting sequence for a request."""
        prompt = np.ascontiguousarray(request.prompt, TOKEN)
        return Sequence(
            owner=owner,
            tokens=prompt,
            max_length=len(prompt) + request.max_tokens,
            min_length=len(prompt) + min(request.min_tokens, request.max_tokens),
            sampling=request.sampling,
            stop_ids=request.stop_ids,
        )
