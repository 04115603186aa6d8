"""Waiting for a server to take requests: for how long, and what to say when it was in vain.

Knows no clock and makes no calls: times are handed in, in seconds, and answers as they come.
"""

from baton_client.errors import BatonError, UnavailableError
from baton_client.results import HealthStatus

HEALTH_TIMEOUT_S = 5.0
READY_POLL_S = 0.05


class Wait:
    """A wait for the server at `address`: `timeout_s` in all, at most `absent_s` on end with nobody there.

    Nobody is there where calls are refused at once; where they vanish, only `timeout_s` ends the wait.
    """

    def __init__(self, address: str, timeout_s: float, absent_s: float | None, now_s: float) -> None:
        self._address = address
        self._timeout_s, self._absent_s = timeout_s, absent_s
        self._started_s = self._there_s = now_s  # when the wait began; when it last was not refused

    def call_timeout_s(self, now_s: float) -> float:
        """How long the next question about the server's health may take."""
        return max(0.1, min(HEALTH_TIMEOUT_S, self._started_s + self._timeout_s - now_s))

    def is_over(self, answer: HealthStatus | BatonError, now_s: float) -> bool:
        """Whether requests are taken. Raises UnavailableError once it is no use to ask again."""
        if answer is HealthStatus.SERVING:
            return True
        if not isinstance(answer, UnavailableError):  # a server that is silent is there
            self._there_s = now_s
        elif self._absent_s is not None and now_s - self._there_s >= self._absent_s:
            absent = f"no server answers at {self._address}, tried for {self._absent_s:g} s"
            raise UnavailableError(f"{absent}: {answer.message}", code=answer.code)
        if now_s - self._started_s >= self._timeout_s:
            state = (
                answer.message if isinstance(answer, BatonError) else answer.name.lower().replace("_", " ")
            )
            raise UnavailableError(f"{self._address} is not ready after {self._timeout_s:g} s: {state}")
        return False
