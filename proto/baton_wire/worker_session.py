"""The worker's end of a session with the core: plans in step order in, results out, one epoch at a time.

Shared by every kind of worker. Knows nothing of how a plan is executed; plans may pile up in the worker (the
core sends ahead within its credit) as long as their results are replied in step order.
"""

import secrets
import time
from collections.abc import Callable, Iterable

from baton_wire.errors import WireError
from baton_wire.hello import WorkerHello
from baton_wire.link import BEAT_S, Counters, Dialer
from baton_wire.plan import Plan
from baton_wire.result import Result
from baton_wire.transport import CurveKeys, DealerSocket, wait

_SILENT_S = 1.0  # a core that is there beats several times in it


class Refused(RuntimeError):  # noqa: N818 - what the core did, not what went wrong
    """The core does not take this worker, and asking again will not help."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message


class OutOfStepError(WireError):
    """A plan came whose step is not the next one: the core and this build do not mean the same."""


class WorkerLink:
    """The session without socket and clock: bytes and the time in, plans out; frames gather in `outgoing`.

    Whenever a session is lost, `reset` is called (from within `receive`): every slot and block is free again,
    and plans handed out before are not to be replied to.
    """

    def __init__(
        self,
        hello: WorkerHello,
        reset: Callable[[], None],
        nonce: Callable[[], int],
        *,
        beat_s: float = BEAT_S,
    ) -> None:
        self.dialer = Dialer(hello.encode(), nonce, beat_s=beat_s)
        self.outgoing: list[bytes] = []
        self._reset = reset
        self._delivered = 0  # steps of this epoch: handed out …
        self._replied = 0  # … and answered, in [0, _delivered]

    @property
    def outstanding(self) -> int:
        """Plans handed out and not replied."""
        return self._delivered - self._replied

    def receive(self, messages: Iterable[bytes], now: float) -> list[Plan]:
        """Takes in all that waits on the transport; the plans of the session as it is after that.

        Raises `Refused`; `WireError` (`OutOfStepError`) where the core speaks another contract.
        """
        plans: list[Plan] = []
        for data in messages:
            received = self.dialer.receive(data, now)
            self.outgoing += received.replies
            if received.closed:
                plans.clear()
                self._delivered = self._replied = 0
                self._reset()
            plans.extend(self._plan(payload) for payload in received.payloads)
            if self.dialer.refused is not None:
                raise Refused(self.dialer.refused.reason, self.dialer.refused.message)
        return plans

    def tick(self, now: float) -> None:
        """HELLO or BEAT, if due. Only with nothing left to receive."""
        self.outgoing += self.dialer.tick(now)

    def reply(self, result: Result) -> None:
        """The result of the oldest plan not replied yet."""
        if self.dialer.link is None:
            raise AssertionError("a reply after the session was lost: reset() was to forget its plans")
        assert result.step == self._replied + 1 <= self._delivered, "results are replied in step order, once"
        self._replied = result.step
        self.outgoing += self.dialer.send(result.encode())

    def _plan(self, payload: bytes | memoryview) -> Plan:
        plan = Plan.decode(payload)
        if plan.step != self._delivered + 1:
            raise OutOfStepError(f"plan of step {plan.step}, expected {self._delivered + 1}")
        self._delivered = plan.step
        return plan


class WorkerSession:
    """Dials the core for ever and takes its plans.

    Use: `for plan in session.poll(timeout_s): session.reply(execute(plan))`. Call `poll` at least every 0.1 s
    while there is nothing to execute: the beats that keep the session alive leave from there. A worker that
    is busy need not: silence while plans are outstanding is for the core to judge.

    `reset` is called (from within `poll`) whenever a session is lost: see `WorkerLink`. `epoch` is then 0
    until the next welcome.
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
        self._clock = clock
        self._socket = DealerSocket(endpoint, curve=curve)
        self._link = WorkerLink(hello, reset, lambda: secrets.randbits(64) | 1, beat_s=beat_s)

    @property
    def epoch(self) -> int:
        """Number of the session, 0 while there is none."""
        link = self._link.dialer.link
        return 0 if link is None else link.epoch

    @property
    def hears(self) -> bool:
        """Whether there is a session and the core has said something of late."""
        link = self._link.dialer.link
        return link is not None and self._clock() - link.last_heard < _SILENT_S

    @property
    def lost(self) -> bool:
        """Whether there is no session now: not welcomed yet, or lost and dialling again."""
        return self._link.dialer.link is None

    @property
    def outstanding(self) -> int:
        """Plans handed out and not replied."""
        return self._link.outstanding

    @property
    def counters(self) -> Counters:
        """What happened on the link so far."""
        return self._link.dialer.counters()

    @property
    def silent_s(self) -> float:
        """Seconds since the core was heard; 0 without a session."""
        link = self._link.dialer.link
        return 0.0 if link is None else self._clock() - link.last_heard

    def poll(self, timeout_s: float) -> list[Plan]:
        """Plans that have come, in step order, all of `epoch`; waits up to `timeout_s` for the first.

        Raises `Refused`; `WireError` (`OutOfStepError`) where the core speaks another contract: give up then.
        """
        deadline_s = self._clock() + timeout_s
        while True:
            plans = self._link.receive(self._socket.receive_all(), self._clock())
            now = self._clock()
            self._link.tick(now)
            self._flush()
            if plans or now >= deadline_s:
                return plans
            wait([self._socket], min(deadline_s, self._link.dialer.due_s) - now)

    def reply(self, result: Result) -> None:
        """Sends the result of the oldest plan not replied yet."""
        self._link.reply(result)
        self._flush()

    def leave(self) -> None:
        """Ends the session in order and closes. The core takes back what this worker was doing."""
        self._link.outgoing += self._link.dialer.leave()
        self._flush()
        self._socket.close(flush=True)

    def _flush(self) -> None:
        for data in self._link.outgoing:
            self._socket.send(data)
        self._link.outgoing.clear()
