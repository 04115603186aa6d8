"""Numpy columns behind a fixed header: the one way payloads are laid out.

A payload is a packed little-endian header (`struct`), which holds the row count of every column, then the
columns' bytes back to back without padding. The sum of lengths must equal the payload's length exactly.
"""

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baton_wire.errors import WireError

Column = NDArray[Any]

TOKEN = np.dtype("<i4")
MASK_WORD = np.dtype("<u4")


def unpack_header(layout: struct.Struct, payload: bytes | memoryview, name: str) -> tuple[int, ...]:
    """Fields of the fixed header; `WireError` where the payload is shorter than it."""
    if len(payload) < layout.size:
        raise WireError(f"{name}: {len(payload)} bytes, header needs {layout.size}")
    return layout.unpack_from(payload)


def unpack_columns(
    payload: bytes | memoryview, offset: int, shape: list[tuple[np.dtype[Any], int]], name: str
) -> list[Column]:
    """Read-only views of the columns that start at `offset`; (dtype, rows) each, in order."""
    need = offset + sum(dtype.itemsize * rows for dtype, rows in shape)
    if need != len(payload):
        raise WireError(f"{name}: {len(payload)} bytes, header promises {need}")
    columns = []
    for dtype, rows in shape:
        columns.append(np.frombuffer(payload, dtype, rows, offset))
        offset += dtype.itemsize * rows
    return columns


def column(rows: Any, dtype: np.dtype[Any]) -> Column:
    """A column of `dtype` from a list (of tuples for records) or an array."""
    return np.asarray(rows, dtype=dtype)
