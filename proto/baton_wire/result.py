"""The result: what one step sampled, which slots ended, and the hash of the slot table after it."""

import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np

from baton_wire.columns import TOKEN, Column, unpack_columns, unpack_header
from baton_wire.errors import WireError

NO_TOKEN = -1


class End(IntEnum):
    """Why a slot ended."""

    STOP = 1  # it sampled one of its stop ids
    LENGTH = 2  # it has max_length tokens
    NUMERICAL = 3  # its logits held no finite maximum; no token was sampled


ENDED = np.dtype([("slot", "<u2"), ("reason", "<u2")])

# step, state_hash, exec_us, rank, rows, ends
_HEADER = struct.Struct("<QQIHHH")


def _none(dtype: np.dtype[Any]) -> Column:
    return np.empty(0, dtype)


@dataclass(frozen=True, slots=True)
class Result:
    """Reply to the plan of the same `step`, by one rank.

    `tokens`: int32, one per row of the slot table below the plan's row bound, `NO_TOKEN` where the row
    sampled none; empty from ranks other than 0, which only acknowledge. `ends`: records of ENDED.
    `exec_us`: time the step took on the device, microseconds.
    """

    step: int
    state_hash: int
    exec_us: int = 0
    rank: int = 0
    tokens: Column = field(default_factory=lambda: _none(TOKEN))
    ends: Column = field(default_factory=lambda: _none(ENDED))

    def encode(self) -> bytes:
        """The payload."""
        header = _HEADER.pack(
            self.step, self.state_hash, self.exec_us, self.rank, len(self.tokens), len(self.ends)
        )
        return b"".join((header, self.tokens.tobytes(), self.ends.tobytes()))

    @staticmethod
    def decode(payload: bytes | memoryview) -> "Result":
        """The result in `payload`, columns as read-only views of it; `WireError` where it is malformed."""
        step, state_hash, exec_us, rank, rows, ended = unpack_header(_HEADER, payload, "result")
        tokens, ends = unpack_columns(payload, _HEADER.size, [(TOKEN, rows), (ENDED, ended)], "result")
        slots, reasons = ends["slot"].tolist(), ends["reason"].tolist()  # few: lists beat numpy
        if ended and not (End.STOP <= min(reasons) and max(reasons) <= End.NUMERICAL):
            raise WireError("result: unknown end reason")
        if ended and rows and max(slots) >= rows:
            raise WireError("result: an ended slot is beyond the row bound")
        if rows and tokens.min() < NO_TOKEN:
            raise WireError("result: a negative token")
        return Result(step, state_hash, exec_us, rank, tokens, ends)
