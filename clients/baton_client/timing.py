"""When the tokens of a stream arrived: time to first token and inter-token times, in milliseconds.

Knows nothing about clocks: times are handed in, in seconds.
"""

import math
from collections.abc import Sequence


class StreamTimes:
    """Arrival times of one stream.

    A delta of k tokens that arrives g after the one before counts as k inter-token times of g/k: the pace at
    which tokens come, whatever number the server gathers into one message.
    """

    def __init__(self, started_s: float) -> None:
        self._last_s = self._started_s = started_s
        self.ttft_ms: float | None = None
        self.itl_ms: list[float] = []
        self.tokens = 0

    def add(self, now_s: float, tokens: int) -> None:
        """Note the arrival of `tokens` more tokens."""
        if tokens == 0:
            return
        if self.ttft_ms is None:
            self.ttft_ms = (now_s - self._started_s) * 1e3
        else:
            self.itl_ms += [(now_s - self._last_s) * 1e3 / tokens] * tokens
        self._last_s = now_s
        self.tokens += tokens

    @property
    def elapsed_s(self) -> float:
        """From the start to the last token."""
        return self._last_s - self._started_s

    def summary(self) -> str:
        """Return one line: TTFT, ITL (median and 99th percentile) and tokens per second."""
        if self.ttft_ms is None:
            return "no tokens"
        itl = f", ITL {describe(self.itl_ms)}" if self.itl_ms else ""
        return f"TTFT {self.ttft_ms:.1f} ms{itl}, {self.tokens / max(self.elapsed_s, 1e-9):.0f} tok/s"


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that at least `percent` of the values do not exceed; NaN for no values."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def describe(values_ms: Sequence[float]) -> str:
    """Return the median and the 99th percentile of times, for a person."""
    return f"median {percentile(values_ms, 50):.1f} ms, p99 {percentile(values_ms, 99):.1f} ms"
