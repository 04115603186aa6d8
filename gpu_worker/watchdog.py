"""Deadlines for phases that may hang without raising: the process ends, and says in which phase it was."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_EXIT_CODE = 70
_LOOK_S = 0.1


class Watchdog:
    """Watches one phase at a time, by a thread that looks now and then: a phase costs nothing."""

    def __init__(self) -> None:
        self._phase: tuple[str, float, float] | None = None  # name, limit, when it ends; replaced as a whole
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def begin(self, name: str, limit_s: float) -> None:
        """Ends the process unless `end` or `begin` follows in `limit_s` seconds (noticed within a tenth)."""
        self.end()
        self._phase = (name, limit_s, time.monotonic() + limit_s)

    def end(self) -> None:
        """The phase is over; nothing happens where there is none."""
        phase, self._phase = self._phase, None
        if phase is not None:
            _check(phase)  # it may have been too long before anybody looked

    @contextmanager
    def phase(self, name: str, limit_s: float) -> Iterator[None]:
        """The body is a phase."""
        self.begin(name, limit_s)
        try:
            yield
        finally:
            self.end()

    def _watch(self) -> None:
        while True:
            time.sleep(_LOOK_S)
            phase = self._phase
            if phase is not None:
                _check(phase)


def _check(phase: tuple[str, float, float]) -> None:
    """Ends the process where the phase is past its end."""
    name, limit_s, end_s = phase
    if time.monotonic() > end_s:
        print(f"gpu_worker: {name} took longer than {limit_s:g} s", file=sys.stderr, flush=True)
        os._exit(_EXIT_CODE)
