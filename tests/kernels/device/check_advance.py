"""The slot table's steps, many in a row, against the twins and the wire's hash."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from baton_kernels import advance, reference
from baton_wire.result import End
from baton_wire.state import Occupancy, state_hash

BLOCK_SIZE = 16
STOPS = 16


@dataclass(slots=True)
class Table:
    block_table: torch.Tensor
    length: torch.Tensor
    occupancy: torch.Tensor
    mode: torch.Tensor
    admitted: torch.Tensor
    last_token: torch.Tensor
    max_length: torch.Tensor
    stop_ids: torch.Tensor


@dataclass(slots=True)
class Rows:
    tokens: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor
    seen: torch.Tensor
    slots: torch.Tensor
    sampled: torch.Tensor


def table_of(slots, dtype, device):
    def numbers(low, high, *shape, dtype=dtype):
        return torch.randint(low, high, (slots, *shape), dtype=dtype, device=device)

    return Table(
        block_table=numbers(0, 1000, 40, dtype=torch.int32),
        length=numbers(0, 300),
        occupancy=numbers(0, 3),
        mode=numbers(0, 2),
        admitted=numbers(0, 1 << 31 if dtype == torch.int32 else 1 << 40),
        last_token=numbers(-1, 99),
        max_length=numbers(250, 330),
        stop_ids=numbers(-1, 5000, STOPS),
    )


def test_the_constants_are_those_of_the_wire():
    ends = (End.STOP, End.LENGTH, End.NUMERICAL)
    assert (advance.STOP, advance.LENGTH, advance.NUMERICAL) == ends
    states = (Occupancy.FREE, Occupancy.PREFILL, Occupancy.DECODE)
    assert (advance.FREE, advance.PREFILL, advance.DECODE) == states


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("slots", "bucket"), [(600, 280), (300, 30), (5, 5)])
def test_steps(slots, bucket, dtype, device, full):
    """More slots may move than the bucket has rows for, and fewer."""
    table = table_of(slots, dtype, device)
    rows = Rows(*(torch.full((slots,), -99, dtype=torch.int32, device=device) for _ in range(6)))
    named = torch.randint(0, 2, (slots,), dtype=torch.int8, device=device)
    results = torch.full((3, advance.HEADER + 2 * slots), -77, dtype=torch.int32, device=device)
    steps = torch.tensor([(1 << 33) + 4], device=device)
    for _ in range(20 if full else 3):
        before, count = table.length.clone(), steps.item()
        moves = (table.occupancy == Occupancy.DECODE) & ((table.mode == 0) | (named != 0))
        moves &= moves.cumsum(0) <= bucket
        last, mine = table.last_token.clone(), moves.nonzero()[:, 0]
        advance.begin(table, rows, bucket, BLOCK_SIZE, named)
        assert torch.equal(table.length, before + moves)
        position = before[mine].long()
        block = table.block_table[mine, position // BLOCK_SIZE]
        expected = {
            "tokens": (last[mine], 0),
            "positions": (position, 0),
            "places": (block * BLOCK_SIZE + position % BLOCK_SIZE, -1),
            "seen": (position + 1, 0),
            "slots": (mine, -1),
        }
        for name, (column, nothing) in expected.items():
            written = getattr(rows, name)
            assert torch.equal(written[: len(mine)].long(), column.long()), name
            assert (written[len(mine) : bucket] == nothing).all(), name
            assert (written[bucket:] == -99).all(), name
        assert (rows.sampled == advance.NOT_SAMPLED).all()
        sampled = torch.randint(-1, 5000, (slots,), dtype=torch.int32, device=device)
        rows.sampled.copy_(torch.where(moves, sampled, advance.NOT_SAMPLED))
        occupancy, old = table.occupancy.clone(), results.clone()
        advance.advance(table, rows.sampled, results, steps)
        check_result(results, old, count, table, moves, sampled, occupancy, last)
        assert steps.item() == count + 1


def check_result(results, old, count, table, moves, sampled, occupancy, last):
    slots = len(sampled)
    reasons = reference.end_reasons(sampled, sampled >= 0, table.length, table.max_length, table.stop_ids)
    reasons = torch.where(moves, reasons, 0)
    state = torch.where(moves, torch.where(reasons == 0, Occupancy.DECODE, Occupancy.FREE), occupancy)
    assert torch.equal(table.occupancy.long(), state.long())
    assert torch.equal(table.last_token.long(), torch.where(moves, sampled, last).long())
    mine = results[count % 3]
    for other in range(3):
        assert other == count % 3 or torch.equal(results[other], old[other])
    assert torch.equal(mine[advance.HEADER : advance.HEADER + slots], torch.where(moves, sampled, -1))
    assert torch.equal(mine[advance.HEADER + slots :].long(), reasons.long())
    header = mine[: advance.HEADER].cpu().numpy().view(np.uint32)
    live = (state != Occupancy.FREE).cpu().numpy()
    columns = (table.admitted, table.length, table.occupancy, table.last_token)
    expected = state_hash(np.arange(slots)[live], *(c.cpu().numpy()[live] for c in columns))
    assert int(header[0]) | int(header[1]) << 32 == expected
    assert int(header[2]) | int(header[3]) << 32 == count + 1


def test_locate(device):
    table = torch.randint(0, 99, (7, 5), dtype=torch.int32, device=device)
    slots = torch.randint(-1, 7, (600,), dtype=torch.int32, device=device)
    positions = torch.randint(0, 15, (600,), dtype=torch.int32, device=device)
    places = torch.full((600,), -9, dtype=torch.int32, device=device)
    advance.locate(table, 3, slots, positions, places)
    expected = table[slots.long(), positions.long() // 3] * 3 + positions % 3
    assert torch.equal(places, torch.where(slots >= 0, expected, -1))
