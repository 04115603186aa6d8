"""Deadlines for phases that may hang without raising: the process ends, and says in which phase it was."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_EXIT_CODE = 70


class Watchdog:
    """Watches one phase at a time from a thread of its own."""

    def __init__(self) -> None:
        self._phase: tuple[str, float, float] | None = None  # name, limit, when it ends
        self._changed = threading.Condition()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextmanager
    def phase(self, name: str, limit_s: float) -> Iterator[None]:
        """Ends the process unless the body is over within `limit_s` seconds."""
        self._set((name, limit_s, time.monotonic() + limit_s))
        try:
            yield
        finally:
            self._set(None)

    def _set(self, phase: tuple[str, float, float] | None) -> None:
        with self._changed:
            wake = phase is not None and self._phase is None
            self._phase = phase
            if wake:
                self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while True:
                if self._phase is None:
                    self._changed.wait()
                    continue
                name, limit_s, ends = self._phase
                left_s = ends - time.monotonic()
                if left_s <= 0:
                    print(f"gpu_worker: {name} took longer than {limit_s:g} s", file=sys.stderr, flush=True)
                    os._exit(_EXIT_CODE)
                self._changed.wait(left_s)
