"""What everything but the model adds to a token: from the end of its step to its arrival at the client.

The fake worker logs when each token was sampled, the client when it came; both by the host's monotonic clock.
"""

from array import array
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from baton_sim.slot_table import STEP_LOG

_MAX_POSITIONS = 1 << 20


class Arrivals:
    """What came, and when. Every request has a seed of its own, below 2^43."""

    def __init__(self) -> None:
        self._rows = array("q")  # not lists: the collector would walk them, and the clock would tick on

    def add(self, seed: int, first: int, count: int, now_ns: int) -> None:
        """Tokens of one request; `first`: the position of the first in its whole sequence."""
        self._rows.extend((seed, first, count, now_ns))

    def added_ms(self, step_log: Path) -> NDArray[np.float64]:
        """Added milliseconds of each token, once the worker has ended; its log must have every token."""
        log = np.fromfile(step_log, STEP_LOG)
        keys = log["seed"].astype(np.int64) * _MAX_POSITIONS + log["position"]
        order = np.argsort(keys)
        seeds, starts, counts, times_ns = np.array(self._rows).reshape(-1, 4).T
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        wanted = np.repeat(seeds * _MAX_POSITIONS + starts, counts) + within
        places = order[np.searchsorted(keys, wanted, sorter=order)]
        assert (keys[places] == wanted).all(), "a token that no step sampled"
        came_ns = np.repeat(times_ns, counts)
        added_ns: NDArray[np.int64] = came_ns - log["at_ns"][places]
        return added_ns / 1e6
