"""How many plans may be in flight, by what steps take."""

import pytest

from scheduler_svc.core.credit import MAX_PLANS, QUEUED_US, Credit


def settled(exec_us: int) -> int:
    credit = Credit()
    for _ in range(100):
        credit.observe(exec_us)
    return credit.plans


@pytest.mark.parametrize(
    ("exec_us", "plans"), [(20_000, 2), (1001, 2), (1000, 2), (999, 3), (760, 3), (400, 4), (1, MAX_PLANS)]
)
def test_plans_by_execution_time(exec_us, plans):
    assert settled(exec_us) == plans


@pytest.mark.parametrize("exec_us", range(150, 5000, 50))
def test_what_is_queued_covers_a_round_trip_and_hardly_more(exec_us):
    queued_us = (settled(exec_us) - 1) * exec_us
    assert QUEUED_US <= queued_us < QUEUED_US + exec_us


def test_before_any_result_one_is_queued():
    assert Credit().plans == 2
