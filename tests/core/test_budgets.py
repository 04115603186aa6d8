"""What a step may weigh on the wire: the budgets that the design promises."""

import pytest

from bench.scheduler import measure


@pytest.mark.parametrize("running", [64, 256])
def test_steady_decode_stays_within_the_wire_budgets(running) -> None:
    figures = measure(running)
    assert figures["plan_bytes"] <= 256
    assert figures["result_bytes"] <= 1200


def test_plan_grows_with_changes_not_with_the_batch() -> None:
    """One sequence in sixteen needs a block per step: 6 bytes each, and nothing else grows."""
    small, large = measure(64), measure(256)
    assert large["plan_bytes"] - small["plan_bytes"] <= 6 * (256 - 64) // 16 + 6
