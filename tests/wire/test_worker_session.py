"""A worker's session with a small core over real sockets: order, reset, refusal, farewell."""

import time

import numpy as np
import pytest

from baton_wire.errors import WireError
from baton_wire.hello import Refusal, WorkerHello
from baton_wire.link import Listener
from baton_wire.plan import Plan
from baton_wire.result import Result
from baton_wire.transport import RouterSocket, ipc_endpoint, private_ipc_dir
from baton_wire.worker_session import OutOfStepError, Refused, WorkerSession

HELLO = WorkerHello("group", 0, 1, "fingerprint", 16, 100, 8, 1000, 256, 1000, 8)


class Core:
    """Takes every worker, or refuses; sends plans; gathers results."""

    def __init__(self, endpoint, first_epoch=1):
        self.router, self.listener = RouterSocket(endpoint), Listener(first_epoch)
        self.refusal: Refusal | None = None
        self.hellos: list[WorkerHello] = []
        self.results: list[Result] = []
        self.closed = 0

    def turn(self):
        now = time.monotonic()
        for peer, data in self.router.receive_all():
            event = self.listener.receive(peer, data, now)
            self.closed += event.closed
            replies = event.replies
            if event.hello is not None:
                self.hellos.append(WorkerHello.decode(event.hello))
                replies = (
                    self.listener.accept(peer, now)
                    if self.refusal is None
                    else self.listener.refuse(peer, self.refusal)
                )
            self.results += [Result.decode(payload) for payload in event.payloads]
            for data in replies:
                self.router.send(peer, data)
        for peer, data in self.listener.tick(now):
            self.router.send(peer, data)

    def send(self, payload):
        (peer,) = self.listener.peers()
        self.router.send(peer, self.listener.send(peer, payload))


@pytest.fixture
def setup():
    """(core, session, number of resets as a list)."""
    run_dir = private_ipc_dir()
    endpoint = ipc_endpoint(run_dir / "workers.ipc")
    core, resets = Core(endpoint), []
    session = WorkerSession(endpoint, HELLO, lambda: resets.append(session.epoch))
    yield core, session, resets
    core.router.close()
    session._socket.close()
    for file in run_dir.iterdir():
        file.unlink()
    run_dir.rmdir()


def run(core, session, condition, timeout_s=5.0):
    """Turns both until `condition`; returns the plans that came."""
    plans, deadline = [], time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        core.turn()
        plans += session.poll(0.002)
    return plans


def test_plans_in_order_results_later(setup):
    core, session, resets = setup
    assert session.lost and session.epoch == 0
    run(core, session, lambda: not session.lost)
    assert core.hellos == [HELLO] and session.epoch == 1
    for step in (1, 2, 3):
        core.send(Plan(step).encode())
    plans = run(core, session, lambda: session.outstanding == 3)
    assert [plan.step for plan in plans] == [1, 2, 3]
    with pytest.raises(AssertionError, match="step order"):
        session.reply(Result(2, 0))
    for plan in plans:
        session.reply(Result(plan.step, 42, tokens=np.array([plan.step], "<i4")))
    with pytest.raises(AssertionError, match="step order"):
        session.reply(Result(3, 0))
    run(core, session, lambda: len(core.results) == 3)
    assert [r.step for r in core.results] == [1, 2, 3] and session.outstanding == 0
    assert resets == []


def test_a_lost_session_resets_and_starts_over(setup):
    core, session, resets = setup
    run(core, session, lambda: not session.lost)
    core.send(Plan(1).encode())
    run(core, session, lambda: session.outstanding == 1)
    core.listener.drop(core.listener.peers()[0])
    run(core, session, lambda: resets)
    assert session.outstanding == 0 and session.lost
    with pytest.raises(AssertionError, match="session was lost"):
        session.reply(Result(1, 0))
    run(core, session, lambda: not session.lost)
    assert session.epoch == 2
    core.send(Plan(1).encode())
    (plan,) = run(core, session, lambda: session.outstanding == 1)
    session.reply(Result(plan.step, 0))
    run(core, session, lambda: core.results)


def test_a_restarted_core_gets_its_worker_back(setup):
    core, session, resets = setup
    run(core, session, lambda: not session.lost)
    endpoint = core.router.endpoint
    core.router.close()
    assert session.poll(0.05) == []
    again = Core(endpoint, first_epoch=1000)
    run(again, session, lambda: session.epoch >= 1000)
    assert len(resets) == 1
    again.router.close()


def test_refused(setup):
    core, session, _ = setup
    core.refusal = Refusal("FINGERPRINT_MISMATCH", "another checkpoint")
    with pytest.raises(Refused, match="another checkpoint") as caught:
        run(core, session, lambda: False)
    assert caught.value.reason == "FINGERPRINT_MISMATCH"


def test_plans_out_of_step_and_nonsense_end_the_worker(setup):
    core, session, _ = setup
    run(core, session, lambda: not session.lost)
    core.send(Plan(2).encode())
    with pytest.raises(OutOfStepError, match="step 2, expected 1"):
        run(core, session, lambda: False)
    core.send(b"no plan")
    with pytest.raises(WireError, match="plan"):
        run(core, session, lambda: False)


def test_leaving_is_told(setup):
    core, session, _ = setup
    run(core, session, lambda: not session.lost)
    session.leave()
    deadline = time.monotonic() + 5
    while not core.closed:
        assert time.monotonic() < deadline
        core.turn()
    assert core.listener.peers() == []


def test_idle_beats_keep_the_session(setup):
    core, session, resets = setup
    run(core, session, lambda: not session.lost)
    end = time.monotonic() + 0.6
    while time.monotonic() < end:
        core.turn()
        assert session.poll(0.05) == []
        assert core.listener.silent(time.monotonic(), 0.4) == []
    assert session.silent_s < 0.4 and resets == []


def test_a_poll_waits_no_longer_than_told_and_no_less(setup):
    core, session, _ = setup
    run(core, session, lambda: not session.lost)
    start = time.monotonic()
    assert session.poll(0.25) == []
    assert 0.2 < time.monotonic() - start < 1.0
