"""docs/wire.md says what the code does."""

import re
import struct
from pathlib import Path

import numpy as np
import pytest

from baton_wire import frame, frontend, link, plan, result, transport
from baton_wire.frame import FrameKind
from baton_wire.frontend import Kind, Verdict
from baton_wire.plan import Plan
from baton_wire.result import End, Result

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "wire.md").read_text()

RECORDS = {
    "ADMISSION": plan.ADMISSION,
    "SAMPLING": plan.SAMPLING,
    "APPEND": plan.APPEND,
    "CHUNK": plan.CHUNK,
    "ENDED": result.ENDED,
    "OVER": frontend.OVER,
    "STARTED": frontend.STARTED,
}
HEADERS = {
    "plan header": plan._HEADER,
    "result header": result._HEADER,
    "submit header": frontend._SUBMIT,
    "withdraw header": frontend._WITHDRAW,
    "step header": frontend._STEP,
}


def rows_after(start: int) -> list[list[str]]:
    """Cells of the first table after `start`."""
    table = re.search(r"(?:^\|.*\n)+", PAGE[start:], re.MULTILINE)
    assert table is not None
    lines = table[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def table(name: str) -> list[tuple[int, int, str]]:
    """(offset, size, field) of the table named `name`."""
    begins = [m.end() for m in re.finditer(rf"^`{re.escape(name)}`.*$", PAGE, re.MULTILINE)]
    assert len(begins) == 1, name
    return [(int(offset), int(size), field) for offset, size, field, *_ in rows_after(begins[0])]


@pytest.mark.parametrize("name", RECORDS)
def test_records(name):
    dtype = RECORDS[name]
    assert dtype.names is not None and dtype.fields is not None
    assert table(name) == [(dtype.fields[f][1], dtype.fields[f][0].itemsize, f) for f in dtype.names]


def sizes(layout: struct.Struct) -> list[int]:
    """Sizes of a header's fields; a run of padding is one field."""
    items = re.findall(r"(x+)|(\d*[a-zA-Z])", layout.format[1:])
    return [len(pad) or struct.calcsize("<" + item) for pad, item in items]


@pytest.mark.parametrize("name", HEADERS)
def test_headers(name):
    rows, expected = table(name), sizes(HEADERS[name])
    assert [size for _, size, _ in rows] == expected
    assert [offset for offset, _, _ in rows] == [sum(expected[:i]) for i in range(len(expected))]


@pytest.mark.parametrize(
    ("name", "value", "sample"),
    [
        ("plan header", Plan(0x0807060504030201, row_bound=1, bucket=2), {"row_bound": 1, "bucket": 2}),
        ("result header", Result(1, 2, 0xAABBCCDD, 7), {"exec_us": 0xAABBCCDD, "rank": 7, "rows": 0}),
        (
            "submit header",
            frontend.Submit(9, np.ones(3, "<i4"), 11, 5),
            {"handle": 9, "max_tokens": 11, "prompt": 3},
        ),
        ("withdraw header", frontend.Withdraw(12), {"kind": 2, "handle": 12}),
        (
            "step header",
            frontend.Step(
                over=np.array([(1, 2)] * 3, frontend.OVER), started=np.array([(1, 2)], frontend.STARTED)
            ),
            {"started": 1, "tokens": 0, "over": 3},
        ),
    ],
)
def test_header_fields_lie_where_the_page_says(name, value, sample):
    payload = value.encode()
    where = {field: payload[offset : offset + size] for offset, size, field in table(name)}
    assert {field: int.from_bytes(where[field], "little") for field in sample} == sample


def test_frame_table():
    rows = rows_after(PAGE.index("## Frame"))
    fixed = [(int(r[0]), int(r[1])) for r in rows if r[0].isdigit() and r[1].isdigit()]
    expected = [struct.calcsize(c) for c in ("4s", "B", "B", "H", "<I", "<Q", "<Q")]
    assert [size for _, size in fixed] == expected
    assert sum(expected) == frame._HEADER.size == int(rows[-2][0])
    assert rows[0][3] == f"`{frame.MAGIC.decode()}`" and int(rows[1][3]) == frame.VERSION


def test_kinds():
    rows = rows_after(PAGE.index("| kind | |"))
    assert {name: int(number) for name, number, *_ in rows} == {kind.name: kind.value for kind in FrameKind}
    for name, kind in (
        ("submit header", Kind.SUBMIT),
        ("withdraw header", Kind.WITHDRAW),
        ("step header", Kind.STEP),
    ):
        assert f"`{name}`, kind {kind.value}" in PAGE
    assert f"`Service`, kind {Kind.SERVICE.value}" in PAGE


def words(enum):
    return ", ".join(f"{each.value} {each.name.lower().replace('_', ' ')}" for each in enum)


def test_enumerations_and_constants():
    assert words(End) in PAGE and words(Verdict) in PAGE
    for number in (
        f"{link.MAX_STORED_FRAMES:,} frames or",
        f"{transport.HIGH_WATER_FRAMES:,} frames per peer",
    ):
        assert number in re.sub(r"\s+", " ", PAGE)
    flat = re.sub(r"\s+", " ", PAGE)
    assert f"{link.MAX_STORED_BYTES >> 20} MiB" in flat
    assert f"every {link.HELLO_S * 1000:.0f} ms, with the same random nonce" in flat
    assert f"Every {link.BEAT_S * 1000:.0f} ms from both ends" in flat
    assert f"sent {link.RESEND_AFTER_S * 1000:.0f} ms or longer ago" in flat


def test_sizes_of_steady_decode():
    overhead = frame.OVERHEAD_BYTES
    appends = np.zeros(16, plan.APPEND)
    assert f"plan {len(Plan(1, appends=appends).encode()) + overhead} bytes" in PAGE
    full = Result(1, 2, tokens=np.zeros(256, "<i4"))
    assert f"result {len(full.encode()) + overhead:,} bytes and {result.ENDED.itemsize} per end" in PAGE
