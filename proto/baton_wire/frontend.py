"""Messages between a front-end and the core: requests down, tokens of all its streams up, one frame a step.

A handle is a number the front-end gives a request; unique among its requests of one link epoch, never used
again in it. The first byte of a payload tells the message.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Self

import numpy as np

from baton_wire.columns import TOKEN, Column, unpack_columns, unpack_header
from baton_wire.errors import WireError
from baton_wire.hello import JsonRecord
from baton_wire.plan import MAX_STOP_IDS, SAMPLING


class Kind(IntEnum):
    """First byte of a payload on this hop."""

    SUBMIT = 1  # front-end to core
    WITHDRAW = 2  # front-end to core
    STEP = 3  # core to front-end
    SERVICE = 4  # core to front-end


class Verdict(IntEnum):
    """How the core's work on a request ended; 1–3 are `result.End`."""

    STOP = 1
    LENGTH = 2
    NUMERICAL = 3
    NO_WORKER = 4  # no group can take it, and none came within the wait budget
    TOO_LONG = 5  # prompt and output can never fit the group's cache or context
    QUEUE_FULL = 6  # as many requests wait as may
    QUARANTINED = 7  # it was running whenever one of several workers failed


_VERDICTS = frozenset(map(int, Verdict))

# kind, stop ids, handle, max_tokens, min_tokens, prompt tokens; then SAMPLING, stop ids, prompt
_SUBMIT = struct.Struct("<BBxxIIII")


@dataclass(frozen=True, slots=True)
class Submit:
    """A request for tokens. The prompt is int32 [n ≥ 1]; sampling a scalar record of SAMPLING, seed drawn."""

    handle: int
    prompt: Column
    max_tokens: int
    min_tokens: int = 0
    sampling: Any = field(default_factory=lambda: np.zeros((), SAMPLING))
    stop_ids: tuple[int, ...] = ()

    def encode(self) -> bytes:
        """The payload."""
        header = _SUBMIT.pack(
            Kind.SUBMIT, len(self.stop_ids), self.handle, self.max_tokens, self.min_tokens, len(self.prompt)
        )
        columns = (self.sampling, np.array(self.stop_ids, TOKEN), self.prompt.astype(TOKEN))
        return b"".join((header, *(c.tobytes() for c in columns)))

    @staticmethod
    def decode(payload: bytes | memoryview) -> "Submit":
        """The request in `payload`; `WireError` where it is malformed."""
        _, stops, handle, max_tokens, min_tokens, rows = unpack_header(_SUBMIT, payload, "submit")
        shape = [(SAMPLING, 1), (TOKEN, stops), (TOKEN, rows)]
        sampling, stop_ids, prompt = unpack_columns(payload, _SUBMIT.size, shape, "submit")
        if not rows or not max_tokens or stops > MAX_STOP_IDS:
            raise WireError("submit: empty prompt, no token asked for, or too many stop ids")
        return Submit(handle, prompt, max_tokens, min_tokens, sampling[0], tuple(stop_ids.tolist()))


_WITHDRAW = struct.Struct("<BxxxI")


@dataclass(frozen=True, slots=True)
class Withdraw:
    """The front-end wants no more of a request: cancelled, past its deadline, or finished by a stop string.

    Nothing more arrives for the handle once the core has seen this; the front-end drops what is on its way.
    """

    handle: int

    def encode(self) -> bytes:
        """The payload."""
        return _WITHDRAW.pack(Kind.WITHDRAW, self.handle)

    @staticmethod
    def decode(payload: bytes | memoryview) -> "Withdraw":
        """The message in `payload`; `WireError` where it is malformed."""
        unpack_columns(payload, _WITHDRAW.size, [], "withdraw")
        _, handle = unpack_header(_WITHDRAW, payload, "withdraw")
        return Withdraw(handle)


HANDLE = np.dtype("<u4")
STARTED = np.dtype([("handle", "<u4"), ("cached", "<u4")])
OVER = np.dtype([("handle", "<u4"), ("verdict", "<u4")])

# kind, started, tokens, over
_STEP = struct.Struct("<BxHII")


def _none(dtype: np.dtype[Any]) -> Column:
    return np.empty(0, dtype)


@dataclass(frozen=True, slots=True)
class Step:
    """What one step of one group, or a decision of the core, means for the requests of one front-end.

    `handles`, `tokens`: the next token of each of these requests, one each. `over`: records of OVER, for
    requests that are done; after their token of this frame, if they have one. `started`: records of
    STARTED, on a request's first admission: prompt tokens served from the prefix cache.
    """

    handles: Column = field(default_factory=lambda: _none(HANDLE))
    tokens: Column = field(default_factory=lambda: _none(TOKEN))
    over: Column = field(default_factory=lambda: _none(OVER))
    started: Column = field(default_factory=lambda: _none(STARTED))

    def encode(self) -> bytes:
        """The payload."""
        header = _STEP.pack(Kind.STEP, len(self.started), len(self.tokens), len(self.over))
        columns = (self.handles, self.tokens, self.over, self.started)
        return b"".join((header, *(c.tobytes() for c in columns)))

    @staticmethod
    def decode(payload: bytes | memoryview) -> "Step":
        """The frame in `payload`; `WireError` where it is malformed."""
        _, started, rows, over = unpack_header(_STEP, payload, "step")
        shape = [(HANDLE, rows), (TOKEN, rows), (OVER, over), (STARTED, started)]
        handles, tokens, ended, begun = unpack_columns(payload, _STEP.size, shape, "step")
        if over and not _VERDICTS.issuperset(ended["verdict"].tolist()):
            raise WireError("step: unknown verdict")
        return Step(handles, tokens, ended, begun)


@dataclass(frozen=True, slots=True)
class Service(JsonRecord):
    """What the core can do now; sent on welcome and whenever it changes.

    Limits are 0 until a first group has been ready; afterwards they are the smallest of all ready groups'.
    `max_sequence`: the longest sequence, in tokens, that context and cache can hold.
    """

    ready_groups: int
    max_model_len: int = 0
    max_sequence: int = 0
    vocab_size: int = 0
    block_size: int = 0
    max_slots: int = 0
    draining: bool = False

    def encode(self) -> bytes:
        """The payload: the kind, then JSON."""
        return bytes((Kind.SERVICE,)) + JsonRecord.encode(self)

    @classmethod
    def decode(cls, payload: bytes | memoryview) -> Self:
        """The message in `payload`; `WireError` where it is malformed."""
        return cls._of_json(payload[1:])


Message = Submit | Withdraw | Step | Service
_DECODERS: dict[int, Callable[[bytes | memoryview], Message]] = {
    Kind.SUBMIT: Submit.decode,
    Kind.WITHDRAW: Withdraw.decode,
    Kind.STEP: Step.decode,
    Kind.SERVICE: Service.decode,
}


def decode(payload: bytes | memoryview) -> Message:
    """The message of this hop in `payload`; `WireError` where it is none."""
    if not len(payload) or payload[0] not in _DECODERS:
        raise WireError("front-end hop: unknown message kind")
    return _DECODERS[payload[0]](payload)
