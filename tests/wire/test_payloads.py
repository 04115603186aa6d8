"""Every payload survives the wire unchanged, and nothing but a payload is taken for one."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from baton_wire.errors import VersionError, WireError
from baton_wire.frame import OVERHEAD_BYTES, VERSION, Frame, FrameKind
from baton_wire.plan import ADMISSION, APPEND, CHUNK, Plan
from baton_wire.result import ENDED, Result
from tests.wire.payloads import KINDS, u32, u64


def same(a, b):
    """Equal fields; arrays by dtype, shape and bytes."""
    if isinstance(a, np.ndarray | np.void):
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    return a == b


def assert_same(a, b):
    assert type(a) is type(b)
    for each in dataclasses.fields(a):
        assert same(getattr(a, each.name), getattr(b, each.name)), each.name


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_round_trip(kind, data):
    values, decode = KINDS[kind]
    value: Any = data.draw(values)
    payload = value.encode()
    assert_same(decode(payload), value)
    assert_same(decode(memoryview(payload)), value)
    decoded: Any = decode(payload)
    assert decoded.encode() == payload


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_damaged_payload_is_another_payload_or_an_error(kind, data):
    """Behind the checksum nothing damaged arrives; a peer's bug must still not raise anything else."""
    values, decode = KINDS[kind]
    payload = bytearray(data.draw(values).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    payload = payload[: data.draw(st.integers(0, len(payload)))]
    try:
        decoded: Any = decode(bytes(payload))
    except WireError:
        return
    decoded.encode()


@pytest.mark.parametrize("kind", KINDS)
@given(garbage=st.binary(max_size=200))
def test_garbage_is_an_error(kind, garbage):
    _, decode = KINDS[kind]
    try:
        decoded: Any = decode(garbage)
    except WireError:
        return
    again: Any = decode(decoded.encode())
    assert again.encode() == decoded.encode()


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{}", "[]", "null", '{"name": 3}', '{"name": "a", "more": 1}']
)
def test_json_that_is_no_hello(text):
    with pytest.raises(WireError):
        KINDS["front-end hello"][1](text.encode())
    with pytest.raises(WireError):
        KINDS["service"][1](b"\x04" + text.encode().replace(b"{}", b'{"x": 1}'))


@pytest.mark.parametrize(
    "wrong",
    [
        {"ready_groups": "1"},
        {"ready_groups": 1, "draining": 1},
        {"ready_groups": True},
        {"ready_groups": 1, "vocab_size": 1.5},
    ],
)
def test_service_checks_types(wrong):
    with pytest.raises(WireError):
        KINDS["service"][1](b"\x04" + json.dumps(wrong).encode())


def test_plans_that_contradict_themselves_are_refused():
    good = Plan(1, row_bound=2, bucket=2)
    wrong: dict[str, dict[str, Any]] = {
        "stop_ids": {"stop_ids": np.array([1], "<i4")},
        "chunk_tokens": {"chunk_tokens": np.array([1], "<i4")},
        "empty": {"chunks": np.array([(0, 0, 0, 0)], CHUNK)},
        "last flag": {
            "chunks": np.array([(0, 2, 0, 1)], CHUNK),
            "chunk_tokens": np.array([1], "<i4"),
        },
        "mode": {"admissions": np.array([(0, 2, 0, 0, 0, 0, (0, 0, 0, 0, 0))], ADMISSION)},
        "too many stop ids": {
            "admissions": np.array([(0, 0, 17, 0, 0, 0, (0, 0, 0, 0, 0))], ADMISSION),
            "stop_ids": np.zeros(17, "<i4"),
        },
        "bucket of 2": {"held": np.arange(3, dtype="<u2"), "masks": np.zeros((3, 1), "<u4")},
    }
    for text, change in wrong.items():
        with pytest.raises(WireError, match=text):
            Plan.decode(dataclasses.replace(good, **change).encode())


def test_results_that_contradict_themselves_are_refused():
    tokens = np.array([3, -1], "<i4")
    wrong: dict[str, dict[str, Any]] = {
        "end reason": {"ends": np.array([(0, 4)], ENDED)},
        "row bound": {"ends": np.array([(2, 1)], ENDED)},
        "negative": {"tokens": np.array([-2], "<i4")},
    }
    for text, change in wrong.items():
        with pytest.raises(WireError, match=text):
            Result.decode(dataclasses.replace(Result(1, 2, tokens=tokens), **change).encode())


# ---- frames -----------------------------------------------------------------------------------------------

frames = st.builds(Frame, st.sampled_from(FrameKind), u32, u64, u64, st.binary(max_size=100))


@given(frames)
def test_frame_round_trip(frame):
    data = frame.encode()
    assert len(data) == len(frame.payload) + OVERHEAD_BYTES
    assert_same_frame(Frame.decode(data), frame)


def assert_same_frame(a, b):
    assert (a.kind, a.epoch, a.sequence, a.acknowledged) == (b.kind, b.epoch, b.sequence, b.acknowledged)
    assert bytes(a.payload) == bytes(b.payload)


@given(frames, st.integers(1, 255))
def test_no_altered_byte_is_accepted(frame, flip):
    data = frame.encode()
    for i in range(len(data)):
        altered = bytearray(data)
        altered[i] ^= flip
        with pytest.raises(WireError):
            Frame.decode(bytes(altered))


@given(frames)
def test_no_truncated_or_extended_frame_is_accepted(frame):
    data = frame.encode()
    for size in range(len(data)):
        with pytest.raises(WireError):
            Frame.decode(data[:size])
    with pytest.raises(WireError):
        Frame.decode(data + b"\0")


@given(st.binary(max_size=200))
def test_no_garbage_is_a_frame(garbage):
    with pytest.raises(WireError):
        Frame.decode(garbage)


def resealed(frame, offset, value):
    """The frame's bytes with one changed and the checksum right again."""
    body = bytearray(frame.encode()[:-8])
    body[offset] = value
    return bytes(body) + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")


@given(frames, st.integers(0, 255))
def test_frames_of_other_versions_are_refused_by_name(frame, version):
    if version == VERSION:
        Frame.decode(resealed(frame, 4, version))
    else:
        with pytest.raises(VersionError, match=f"version {version}"):
            Frame.decode(resealed(frame, 4, version))


@pytest.mark.parametrize(("offset", "value"), [(0, 0), (5, 0), (5, 9), (5, 255), (6, 1), (7, 1)])
def test_sealed_frames_with_unknown_fields_are_refused(offset, value):
    with pytest.raises(WireError):
        Frame.decode(resealed(Frame(FrameKind.DATA, 1, 2, 3, b"x"), offset, value))


# ---- budgets ----------------------------------------------------------------------------------------------


def framed(payload: bytes) -> int:
    return len(Frame(FrameKind.DATA, 1, 2, 3, payload).encode())


def test_byte_budget_of_steady_decode():
    """256 sequences, block size 16: 16 of them cross into a new block in a typical step."""
    appends = np.array([(i, 1000 + i) for i in range(16)], APPEND)
    plan = Plan(10_000, 9_999, 1 << 63, 256, 256, appends=appends)
    assert framed(plan.encode()) <= 256
    result = Result(10_000, 1 << 63, 5_000, 0, np.full(256, 100_000, "<i4"), np.array([(3, 1)] * 16, ENDED))
    assert framed(result.encode()) <= 1200
