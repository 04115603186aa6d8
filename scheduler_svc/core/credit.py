"""How many plans may be on their way to a group: enough that its queue never runs dry, and no more.

Besides the plan that executes, just as many are queued as cover a millisecond, by the execution times that
results report: less, and a device idles whenever a round trip takes longer than that; more, and a new arrival
waits longer. Never more than 8 in all.
"""

import math

MAX_PLANS = 8
QUEUED_US = 1000
_WEIGHT = 0.25  # of the newest sample


class Credit:
    """Smooths execution times and turns them into a number of plans."""

    def __init__(self) -> None:
        self._exec_us = float(QUEUED_US)

    def observe(self, exec_us: int) -> None:
        """A result reported that its step took so long."""
        self._exec_us += _WEIGHT * (exec_us - self._exec_us)

    @property
    def plans(self) -> int:
        """Plans that may be in flight, the executing one included: 2 to 8."""
        queued = math.ceil(QUEUED_US / max(self._exec_us, 1.0))
        return 1 + min(max(queued, 1), MAX_PLANS - 1)
