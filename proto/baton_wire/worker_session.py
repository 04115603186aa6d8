"""The worker's end of a session with the core: plans in step order in, results out, one epoch at a time.

Shared by every kind of worker. Knows nothing of how a plan is executed; plans may pile up in the worker (the
core sends ahead within its credit) as long as their results are replied in step order.
"""

import secrets
import time
from collections.abc import Callable

from baton_wire.errors import WireError
from baton_wire.hello import WorkerHello
from baton_wire.link import BEAT_S, Counters, Dialer
from baton_wire.plan import Plan
from baton_wire.result import Result
from baton_wire.transport import CurveKeys, DealerSocket, wait


class Refused(RuntimeError):  # noqa: N818 - what the core did, not what went wrong
    """The core does not take this worker, and asking again will not help."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message


class OutOfStepError(WireError):
    """A plan came whose step is not the next one: the core and this build do not mean the same."""


class WorkerSession:
    """Dials the core for ever and takes its plans.

    Use: `for plan in session.poll(timeout_s): session.reply(execute(plan))`. Call `poll` at least every 0.1 s
    while there is nothing to execute: the beats that keep the session alive leave from there. A worker that
    is busy need not: silence while plans are outstanding is for the core to judge.

    Whenever a session is lost, `reset` is called (from within `poll`): every slot and block is free again,
    and plans handed out before are not to be replied to. `epoch` is then 0 until the next welcome.
    """

    def __init__(
        self,
        endpoint: str,
        hello: WorkerHello,
        reset: Callable[[], None],
        *,
        beat_s: float = BEAT_S,
        curve: CurveKeys | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts to dial; nobody need be there yet. `EndpointError` for an impossible `endpoint`."""
        self._reset = reset
        self._clock = clock
        self._socket = DealerSocket(endpoint, curve=curve)
        self._dialer = Dialer(hello.encode(), lambda: secrets.randbits(64) | 1, beat_s=beat_s)
        self._delivered = 0  # steps of this epoch: handed out …
        self._replied = 0  # … and answered, in [0, _delivered]

    @property
    def epoch(self) -> int:
        """Number of the session, 0 while there is none."""
        return 0 if self._dialer.link is None else self._dialer.link.epoch

    @property
    def lost(self) -> bool:
        """Whether there is no session now: not welcomed yet, or lost and dialling again."""
        return self._dialer.link is None

    @property
    def outstanding(self) -> int:
        """Plans handed out and not replied."""
        return self._delivered - self._replied

    @property
    def counters(self) -> Counters:
        """What happened on the link so far."""
        return self._dialer.counters()

    @property
    def silent_s(self) -> float:
        """Seconds since the core was heard; 0 without a session."""
        return 0.0 if self._dialer.link is None else self._clock() - self._dialer.link.last_heard

    def poll(self, timeout_s: float) -> list[Plan]:
        """Plans that have come, in step order, all of `epoch`; waits up to `timeout_s` for the first.

        Raises `Refused`; `WireError` (`OutOfStepError`) where the core speaks another contract: give up then.
        """
        deadline_s = self._clock() + timeout_s
        while True:
            plans = self._receive()
            now = self._clock()
            for data in self._dialer.tick(now):
                self._socket.send(data)
            if plans or now >= deadline_s:
                return plans
            wait([self._socket], min(deadline_s, self._dialer.due_s) - now)

    def reply(self, result: Result) -> None:
        """Sends the result of the oldest plan not replied yet."""
        if self._dialer.link is None:
            raise AssertionError("a reply after the session was lost: reset() was to forget its plans")
        assert result.step == self._replied + 1 <= self._delivered, "results are replied in step order, once"
        self._replied = result.step
        for data in self._dialer.send(result.encode()):
            self._socket.send(data)

    def leave(self) -> None:
        """Ends the session in order and closes. The core takes back what this worker was doing."""
        for data in self._dialer.leave():
            self._socket.send(data)
        self._socket.close(flush=True)

    def _receive(self) -> list[Plan]:
        """Takes in all that waits on the socket; the plans of the session as it is after that."""
        plans: list[Plan] = []
        for data in self._socket.receive_all():
            received = self._dialer.receive(data, self._clock())
            for reply in received.replies:
                self._socket.send(reply)
            if received.closed:
                plans.clear()
                self._delivered = self._replied = 0
                self._reset()
            plans.extend(self._plan(payload) for payload in received.payloads)
            if self._dialer.refused is not None:
                raise Refused(self._dialer.refused.reason, self._dialer.refused.message)
        return plans

    def _plan(self, payload: bytes | memoryview) -> Plan:
        plan = Plan.decode(payload)
        if plan.step != self._delivered + 1:
            raise OutOfStepError(f"plan of step {plan.step}, expected {self._delivered + 1}")
        self._delivered = plan.step
        return plan
