"""Says in the log that nobody answers a worker, or does no more: after a while, then ever more rarely."""

import logging
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

_FIRST_S = 5.0
_LONGEST_S = 60.0  # from one line to the next


class Dialling:
    """How a worker's calls to `endpoint` are answered, across its sessions."""

    def __init__(self, endpoint: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._endpoint = endpoint
        self._clock = clock
        self._since_s: float | None = None  # since when nobody has answered; None while somebody does
        self._due_s = 0.0  # when the log says so next

    def note(self, answered: bool) -> None:
        """Whether somebody answers at this moment; to be called again and again."""
        if answered:
            self._since_s = None
            return
        now_s = self._clock()
        if self._since_s is None:
            self._since_s, self._due_s = now_s, now_s + _FIRST_S
        elif now_s >= self._due_s:
            silent_s = now_s - self._since_s
            self._due_s = now_s + min(silent_s, _LONGEST_S)
            log.warning(
                "nobody has answered at %s for %.0f s: does a scheduler run there (--run-dir, --connect)?",
                *(self._endpoint, silent_s),
            )
