"""What the simulator found once, in its smallest form."""

import numpy as np

from baton_sim.fake_model import FakeModel, expected_tokens
from baton_sim.slot_table import SlotTable
from baton_wire.frontend import Service, Submit, decode
from baton_wire.hello import FrontendHello, WorkerHello
from baton_wire.link import Dialer
from baton_wire.plan import SAMPLING
from scheduler_svc.core.engine import Engine, EngineConfig, Hop
from scheduler_svc.core.group import limits_of
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.core.sequence import Sequence


def test_a_sequence_preempted_and_readmitted_to_its_slot_keeps_its_tokens_when_the_session_is_lost():
    """Its old admission was taken for the new one, which nobody had confirmed: all but its tail was lost."""
    hello = WorkerHello("g", 0, 1, "f", 2, 40, 2, 40, 40, 100, 1)
    sampling = np.array((3, 1, 1, 0, 0), SAMPLING)[()]
    scheduler, table = Scheduler(limits_of(hello)), SlotTable(hello, FakeModel(100))
    sequence = Sequence.of(0, Submit(0, np.array([5, 6, 7], "<i4"), 20, 0, sampling))
    scheduler.add(sequence)
    for _ in range(4):
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.apply(table.execute(plan))
    scheduler._preempt(sequence)
    assert scheduler.schedule() is not None and sequence.slot == 0  # admitted again, not confirmed
    (moved,) = scheduler.evacuate()
    want = expected_tokens([5, 6, 7], sampling, 20, model=FakeModel(100)).tokens
    assert moved.tokens.tolist() == [5, 6, 7, *want[:4]]


def test_a_front_end_that_comes_while_groups_change_places_hears_how_it_ended():
    """A group left, a front-end came, a like group came, all in one turn: the new front-end was told that no
    group was ready, and never again anything else."""
    engine = Engine(EngineConfig("f"), 1)

    def hello(peer: bytes, hop: Hop) -> Dialer:
        payload = (
            WorkerHello(peer.decode(), 0, 1, "f", 2, 40, 2, 40, 40, 100, 1)
            if hop is Hop.WORKER
            else FrontendHello(peer.decode())
        )
        dialer = Dialer(payload.encode(), lambda: 7)
        receive = engine.on_worker if hop is Hop.WORKER else engine.on_frontend
        receive(peer, dialer.tick(0)[0], 0)
        return dialer

    hello(b"old group", Hop.WORKER)
    hello(b"old front-end", Hop.FRONTEND)
    engine.pump()
    engine.outbox.clear()
    engine.worker_gone(b"old group", 1)
    front_end = hello(b"new front-end", Hop.FRONTEND)
    hello(b"new group", Hop.WORKER)
    engine.pump()
    heard = [
        decode(payload)
        for _, peer, data in engine.outbox
        if peer == b"new front-end"
        for payload in front_end.receive(data, 1).payloads
    ]
    assert isinstance(heard[-1], Service) and heard[-1].ready_groups == 1
