"""Virtual time and a network in it: events in order, frames that come late, twice, damaged or never.

One random generator decides everything, so a seed plays the same each time. Knows nothing of what is sent.
"""

import heapq
from collections.abc import Callable
from random import Random
from typing import Any

from baton_sim.incident import CALM, Weather


class World:
    """The clock `now` (seconds) and what happens next. `trace` gathers lines where asked to."""

    def __init__(self, seed: int, weather: Weather, tracing: bool = False) -> None:
        self.now = 0.0
        self.random = Random(f"play {seed}")
        self.weather = weather
        self.trace: list[str] | None = [] if tracing else None
        self.events = 0
        self.faults = 0
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0

    def after(self, delay_s: float, act: Callable[..., None], *arguments: Any) -> None:
        """Calls `act` so much later."""
        self._number += 1
        heapq.heappush(self._queue, (self.now + delay_s, self._number, act, arguments))

    def run(self, done: Callable[[], bool], until_s: float) -> bool:
        """Lets things happen until `done`; False where it is not by `until_s`."""
        queue = self._queue
        while not done():
            if not queue or queue[0][0] > until_s:
                return False
            self.now, _, act, arguments = heapq.heappop(queue)
            self.events += 1
            act(*arguments)
        return True

    def calm(self) -> None:
        """From now on the network is healthy."""
        self.weather = CALM

    def say(self, who: str, what: str) -> None:
        """A line of the trace."""
        if self.trace is not None:
            self.trace.append(f"{self.now:10.6f}  {who:<12} {what}")

    def carry(self, data: bytes, arrive: Callable[[bytes], None]) -> None:
        """Takes a frame to `arrive`, as the weather has it."""
        weather, random = self.weather, self.random
        delay = weather.base_s
        if weather is not CALM:
            if random.random() < weather.drop:
                self.faults += 1
                return
            if random.random() < weather.delay:
                self.faults += 1
                delay += random.random() * weather.late_s
            if random.random() < weather.damage:
                self.faults += 1
                data = self._damaged(data)
            if random.random() < weather.garbage:
                self.faults += 1
                self.after(delay, arrive, random.randbytes(random.randrange(100)))
            if random.random() < weather.double:
                self.faults += 1
                self.after(delay + random.random() * weather.late_s, arrive, data)
        self.after(delay, arrive, data)

    def _damaged(self, data: bytes) -> bytes:
        if not data or self.random.random() < 0.5:
            return data[: self.random.randrange(len(data) + 1)] if data else data
        altered = bytearray(data)
        altered[self.random.randrange(len(altered))] ^= self.random.randrange(1, 256)
        return bytes(altered)
