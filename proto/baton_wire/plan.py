"""The plan: all that a worker group is told for one step, as changes to its slot table.

Order within a plan: releases, admissions, block appends, then one forward pass over (a) every active slot
in `auto` mode that has finished its prefill, (b) the held slots named, (c) the prefill chunks. Blocks and
slots released in a plan may be reused in the same plan. A length is the number of positions whose keys and
values are in the cache; a position counts from 0 in the sequence, prompt first.

A chunk goes on where its slot is, but for one: where a prompt is cached whole, its only chunk is its last
position, one below the slot's length. It is computed and sampled from, and not written, for others may be
reading its block.
"""

import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np

from baton_wire.columns import MASK_WORD, TOKEN, Column, unpack_columns, unpack_header
from baton_wire.errors import WireError

MAX_STOP_IDS = 16
MAX_SLOTS = 1 << 16


class Mode(IntEnum):
    """How a slot advances once its prompt is computed."""

    AUTO = 0  # in every plan, unnamed
    HELD = 1  # only in a plan that names it, under that plan's token mask


SAMPLING = np.dtype(
    [
        ("seed", "<u8"),  # key of the counter-based noise, with position and token id
        ("temperature", "<f4"),  # 0 is greedy
        ("top_p", "<f4"),  # 1 keeps all
        ("min_p", "<f4"),  # 0 keeps all
        ("top_k", "<u4"),  # 0 keeps all
    ]
)

ADMISSION = np.dtype(
    [
        ("slot", "<u2"),
        ("mode", "u1"),
        ("stops", "u1"),  # rows of `stop_ids` that belong to this admission, at most 16
        ("cached", "<u4"),  # length at admission: prefix that is in its blocks already, or the whole prompt
        ("max_length", "<u4"),  # tokens, prompt and output: the slot ends when it has so many
        ("min_length", "<u4"),  # stop ids cannot be sampled at positions below this
        ("sampling", SAMPLING),
    ]
)

APPEND = np.dtype([("slot", "<u2"), ("block", "<u4")])

CHUNK = np.dtype(
    [
        ("slot", "<u2"),
        ("last", "<u2"),  # 1: the prompt ends here, sample its next token; else 0
        ("start", "<u4"),  # position of the chunk's first token = the slot's length before it, but see above
        ("count", "<u4"),  # tokens, at least 1
    ]
)

RELEASE = np.dtype("<u2")
HELD = np.dtype("<u2")

# step, applied, state_hash, row_bound, bucket, releases, admissions, stop_ids, appends, chunks, chunk_tokens,
# held, mask_words
_HEADER = struct.Struct("<QQQHHHHIIIIHH")


def _none(dtype: np.dtype[Any]) -> Column:
    return np.empty(0, dtype)


@dataclass(frozen=True, slots=True)
class Plan:
    """One step for one worker group. Columns are numpy arrays of the dtypes above.

    `row_bound`: rows [0, row_bound) of the slot table take part; results carry so many tokens.
    `bucket`: at most so many slots decode; the forward pass over them is padded to it.
    `applied`: the last step whose result the core applied, 0 for none; `state_hash` is of that step.
    """

    step: int
    applied: int = 0
    state_hash: int = 0
    row_bound: int = 0
    bucket: int = 0
    releases: Column = field(default_factory=lambda: _none(RELEASE))
    admissions: Column = field(default_factory=lambda: _none(ADMISSION))
    stop_ids: Column = field(default_factory=lambda: _none(TOKEN))  # of all admissions, in their order
    appends: Column = field(default_factory=lambda: _none(APPEND))
    chunks: Column = field(default_factory=lambda: _none(CHUNK))
    chunk_tokens: Column = field(default_factory=lambda: _none(TOKEN))  # of all chunks, in their order
    held: Column = field(default_factory=lambda: _none(HELD))
    masks: Column = field(default_factory=lambda: np.empty((0, 0), MASK_WORD))  # [held, words]; bit = allowed

    def encode(self) -> bytes:
        """The payload. Out-of-range fields are bugs of ours and raise `struct.error`."""
        header = _HEADER.pack(
            self.step,
            self.applied,
            self.state_hash,
            self.row_bound,
            self.bucket,
            len(self.releases),
            len(self.admissions),
            len(self.stop_ids),
            len(self.appends),
            len(self.chunks),
            len(self.chunk_tokens),
            len(self.held),
            self.masks.shape[1],
        )
        columns = (
            *(self.releases, self.admissions, self.stop_ids, self.appends),
            *(self.chunks, self.chunk_tokens, self.held, self.masks),
        )
        return b"".join([header, *(c.tobytes() for c in columns if len(c))])

    @staticmethod
    def decode(payload: bytes | memoryview) -> "Plan":
        """The plan in `payload`, columns as read-only views of it; `WireError` where it is malformed."""
        fields = unpack_header(_HEADER, payload, "plan")
        step, applied, state_hash, row_bound, bucket = fields[:5]
        rows, mask_words = fields[5:-1], fields[-1]
        dtypes: tuple[np.dtype[Any], ...] = (RELEASE, ADMISSION, TOKEN, APPEND, CHUNK, TOKEN, HELD, MASK_WORD)
        counts = (*rows, rows[-1] * mask_words)
        columns = unpack_columns(payload, _HEADER.size, [*zip(dtypes, counts, strict=True)], "plan")
        columns[-1] = columns[-1].reshape(rows[-1], mask_words)
        plan = Plan(step, applied, state_hash, row_bound, bucket, *columns)
        plan._check()
        return plan

    def _check(self) -> None:
        """Refuses what no core sends: counts that contradict each other, values outside their range.

        By lists: of a few rows numpy's sums and maxima cost several times as much.
        """
        stops, modes = self.admissions["stops"].tolist(), self.admissions["mode"].tolist()
        counts, lasts = self.chunks["count"].tolist(), self.chunks["last"].tolist()
        if sum(stops) != len(self.stop_ids):
            raise WireError("plan: stop_ids do not add up to the admissions' counts")
        if sum(counts) != len(self.chunk_tokens):
            raise WireError("plan: chunk_tokens do not add up to the chunks' counts")
        if counts and (min(counts) < 1 or max(lasts) > 1):
            raise WireError("plan: a chunk is empty or its last flag is not 0 or 1")
        if stops and (max(modes) > Mode.HELD or max(stops) > MAX_STOP_IDS):
            raise WireError("plan: an admission has an unknown mode or too many stop ids")
        if self.bucket < len(self.held):
            raise WireError(f"plan: {len(self.held)} held slots are named in a bucket of {self.bucket}")
