"""The confirmed view: the worker's slot table as of the last result applied, as numpy arrays.

Vector operations over the rows of a step, so that the cost per token is nanoseconds. Knows nothing of
blocks or of what is planned; mirrors exactly what the worker hashes.
"""

import numpy as np

from baton_wire.columns import TOKEN, Column
from baton_wire.state import Occupancy, state_hash
from scheduler_svc.core.sequence import Sequence

NOBODY = -1


class Slots:
    """Rows [0, max_slots). `tail[slot, p % block_size]`: the token at position p of the unfinished block."""

    def __init__(self, max_slots: int, block_size: int) -> None:
        self._numbers = np.arange(max_slots, dtype=np.uint64)
        self.admitted = np.zeros(max_slots, np.int64)
        self.length = np.zeros(max_slots, np.int64)
        self.occupancy = np.zeros(max_slots, np.uint8)
        self.last_token = np.full(max_slots, -1, TOKEN)
        self.owner = np.full(max_slots, NOBODY, np.int64)
        self.tail = np.zeros((max_slots, block_size), TOKEN)
        self.sequence: list[Sequence | None] = [None] * max_slots

    def admit(self, slot: int, sequence: Sequence, step: int, cached: int, owner: int) -> None:
        """The slot now belongs to `sequence`; its tokens go to `owner`, or to nobody."""
        self.sequence[slot] = sequence
        self.admitted[slot] = step
        self.length[slot] = cached
        self.occupancy[slot] = Occupancy.PREFILL
        self.last_token[slot] = -1
        self.owner[slot] = owner

    def free(self, slot: int) -> None:
        """The slot ended or was released."""
        self.sequence[slot] = None
        self.occupancy[slot] = Occupancy.FREE
        self.owner[slot] = NOBODY

    def advance(self, rows: Column, tokens: Column) -> Column:
        """Decoding slots `rows` sampled `tokens`, one each. Returns the rows whose block is now complete.

        The completed block's tokens must be read with `completed` before `write` puts the new tokens in.
        """
        length = self.length[rows] + 1
        self.length[rows] = length
        self.last_token[rows] = tokens
        complete: Column = rows[length % self.tail.shape[1] == 0]
        return complete

    def completed(self, rows: Column) -> bytes:
        """The tokens of the blocks just completed by `rows`, a block's bytes each."""
        return self.tail[rows].tobytes()

    def write(self, rows: Column, tokens: Column) -> None:
        """Puts each row's last sampled token at its position, which is the row's length."""
        self.tail[rows, self.length[rows] % self.tail.shape[1]] = tokens

    def start_decoding(self, slot: int, length: int, token: int, rest: Column) -> None:
        """The prompt of `length` ends here with `token` sampled; `rest` are its tokens after whole blocks."""
        self.length[slot] = length
        self.last_token[slot] = token
        self.occupancy[slot] = Occupancy.DECODE
        self.tail[slot, : len(rest)] = rest
        self.tail[slot, len(rest)] = token

    def hash_after(self, tokens: Column, begun: list[int], ended: Column) -> int:
        """State hash of the slots below len(tokens) once these are taken in. Changes nothing.

        tokens: one for each slot that decodes, and for those in `begun`, whose prompt was at its end; no
        other slot has any. ended: slots that are free then.
        """
        bound = len(tokens)
        occupancy = self.occupancy[:bound]
        length = self.length[:bound] + (occupancy == Occupancy.DECODE)
        if begun or len(ended):
            occupancy = occupancy.copy()
            occupancy[begun] = Occupancy.DECODE
            occupancy[ended] = Occupancy.FREE
        rows = np.flatnonzero(occupancy)
        return state_hash(
            self._numbers[rows], self.admitted[rows], length[rows], occupancy[rows], tokens[rows]
        )
