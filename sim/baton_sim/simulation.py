"""Plays an incident: the whole stack under virtual time, mishaps and all, and judges how it ended.

What must hold, whatever happened: every request ends once, with exactly the expected tokens, gapless and in
order (`clients` checks them as they arrive); all end within a bound after the faults stop; and nothing is
left behind: no block, no slot, no request.
"""

import traceback
from dataclasses import dataclass, replace

import numpy as np

from baton_sim.clients import Client, Frontend
from baton_sim.incident import FAULTS_END_S, FINGERPRINT, Fault, Incident, Mishap, draw
from baton_sim.processes import NOTICE_S, Connection, Core, Worker
from baton_sim.world import World
from scheduler_svc.core.engine import EngineConfig

RETRY_S = 0.1
ECHO_WITHIN_S = 0.15
DONE_WITHIN_S = 30.0  # after the faults stop, all requests have ended …
IDLE_WITHIN_S = 5.0  # … and so long after that, nothing is left


@dataclass(frozen=True, slots=True)
class Report:
    """How a seed went. `error` is None, or what was violated, with where."""

    seed: int
    error: str | None
    events: int
    faults: int
    tokens: int
    virtual_s: float
    trace: list[str]


class Simulation:
    """One incident in play."""

    def __init__(self, incident: Incident, tracing: bool = False) -> None:
        self.incident = incident
        self.world = World(incident.seed, incident.weather, tracing)
        self.mishaps = 0
        self.core = self._new_core(1)
        self.workers = [self._new_worker(i, 0) for i in range(len(incident.hellos))]
        self.frontends = [self._new_frontend(i, 0) for i in range(incident.frontends)]
        self.clients = [Client(i, request, self._ended) for i, request in enumerate(incident.requests)]
        self.open = len(self.clients)
        self._lives = 0
        for client in self.clients:
            self.world.after(client.request.at_s, self._submit, client)
        for mishap in incident.mishaps:
            self.world.after(mishap.at_s, self._mishap, mishap)
        self.world.after(FAULTS_END_S, self.world.calm)

    def play(self) -> None:
        """To the end. Raises whatever was violated."""
        done = self.world.run(lambda: self.open == 0, FAULTS_END_S + DONE_WITHIN_S)
        assert done, f"liveness: {self.open} requests have not ended: {self._unfinished()}"
        self.world.calm()
        start_s = self.world.now
        while left := self._left():
            assert self.world.now < start_s + IDLE_WITHIN_S, f"left behind: {left}"
            self.world.run(lambda: False, self.world.now + 0.05)
            self.world.now += 0.05
        self.core.engine.check_integrity()
        self._check_slots()

    # ---- processes --------------------------------------------------------------------------------------

    def _new_core(self, first_epoch: int) -> Core:
        config = EngineConfig(
            fingerprint=FINGERPRINT,
            max_queue=self.incident.max_queue,
            worker_wait_s=self.incident.worker_wait_s,
            silence_s=1.0,
            worker_silence_s=1.0,
            step_s=1.0,
            max_losses=1 << 30,  # workers fail here without any request's fault
        )
        core = Core(self.world, config, first_epoch)
        core.observers.append(self._observe)
        return core

    def _new_worker(self, i: int, life: int) -> Worker:
        hello = replace(self.incident.hellos[i], group=f"group-{i}.{life}")
        peer = hello.group.encode()
        worker = Worker(self.world, hello, self.incident.model, self.incident.step_us, peer)
        self.core.connect(worker.connection)
        return worker

    def _new_frontend(self, i: int, life: int) -> Frontend:
        frontend = Frontend(self.world, b"frontend-%d.%d" % (i, life), self._retry)
        self.core.connect(frontend.connection)
        return frontend

    def _submit(self, client: Client) -> None:
        self.frontends[client.request.frontend].submit(client)

    def _retry(self, client: Client) -> None:
        self.world.after(RETRY_S, self._submit, client)

    def _ended(self) -> None:
        self.open -= 1

    def _observe(self) -> None:
        for frontend in self.frontends:
            frontend.observe(self.core)

    # ---- mishaps ----------------------------------------------------------------------------------------

    def _mishap(self, mishap: Mishap) -> None:
        self.mishaps += 1
        self.world.say("fate", f"{mishap.fault.name} {mishap.target} for {mishap.for_s:.3f} s")
        fault, for_s = mishap.fault, mishap.for_s
        if fault is Fault.STALL:
            self.core.stalled_until_s = self.world.now + for_s
        elif fault is Fault.CORE:
            self._kill_core(for_s)
        elif fault is Fault.FRONTEND:
            self._kill_frontend(mishap.target, for_s)
        elif fault is Fault.HANG:
            self.workers[mishap.target].hang(for_s)
        elif fault is Fault.CUT:
            self.workers[mishap.target].connection.cut_until_s = self.world.now + for_s
        elif fault is Fault.BREAK:
            connection = self.workers[mishap.target].connection
            self.core.lost(connection)
            self.world.after(for_s, self._reconnect, connection)
        else:
            self._end_worker(mishap.target, fault, for_s)

    def _end_worker(self, i: int, fault: Fault, for_s: float) -> None:
        worker = self.workers[i]
        if not worker.alive:
            return
        if fault is Fault.LEAVE and not worker.hung:
            worker.leave()
        else:
            worker.die()
        if fault is not Fault.VANISH:
            self.world.after(NOTICE_S, self._notice, worker.connection)
        self.world.after(for_s, self._restart_worker, i)

    def _restart_worker(self, i: int) -> None:
        self._lives += 1
        self.workers[i] = self._new_worker(i, self._lives)

    def _kill_frontend(self, i: int, for_s: float) -> None:
        frontend = self.frontends[i]
        if not frontend.alive:
            return
        broken = frontend.die()
        self.world.after(NOTICE_S, self._notice, frontend.connection)
        self.world.after(for_s, self._restart_frontend, i, broken)

    def _restart_frontend(self, i: int, broken: list[Client]) -> None:
        self._lives += 1
        self.frontends[i] = self._new_frontend(i, self._lives)
        for client in broken:
            self._submit(client)

    def _kill_core(self, for_s: float) -> None:
        if not self.core.alive:
            return
        self.core.alive = False
        for connection in self.core.connections.values():
            connection.core = None
        self.world.after(for_s, self._restart_core)

    def _restart_core(self) -> None:
        self.core = self._new_core(self.core.engine.workers._next_epoch + 1000)
        processes: list[Worker | Frontend] = [*self.workers, *self.frontends]
        for process in processes:
            if process.alive:
                self.core.connect(process.connection)
                self._echo(process.connection)

    def _notice(self, connection: Connection) -> None:
        if connection.core is self.core:
            self.core.lost(connection)

    def _reconnect(self, connection: Connection) -> None:
        connection.gone = False
        self._echo(connection)

    def _echo(self, connection: Connection) -> None:
        """Frames of the old session turn up in the new one."""
        for _ in range(2):
            self.world.after(self.world.random.random() * ECHO_WITHIN_S, connection.echo)

    # ---- judgement --------------------------------------------------------------------------------------

    def _unfinished(self) -> str:
        open_clients = [client for client in self.clients if not client.ends]
        return ", ".join(
            f"{c.number} ({len(c.tokens)}/{len(c.request.expected.tokens)} tokens, {c.tries} tries)"
            for c in open_clients[:5]
        )

    def _left(self) -> str:
        """What keeps the stack from being idle with everybody in session; empty where nothing does."""
        engine = self.core.engine
        groups = engine.groups
        sessions = {worker.connection.peer for worker in self.workers if worker.alive}
        if set(groups) != sessions:
            return f"groups {sorted(groups)}, workers {sorted(sessions)}"
        for worker in self.workers:
            link = engine.workers.link(worker.connection.peer)
            mine = worker.link.dialer.link
            if mine is None or link is None or mine.epoch != link.epoch or mine.unacknowledged:
                return f"{worker.hello.group} is not in session"
        for name, value in engine.state().items():
            if name in ("requests", "lobby") and value:
                return f"{name}: {value}"
        for group in groups.values():
            scheduler = group.scheduler
            counts = (scheduler.pool.referenced, scheduler.load, scheduler.in_flight)
            if any(counts):
                return f"{group.hello.group}: {counts} blocks referenced, sequences, plans in flight"
        return ""

    def _check_slots(self) -> None:
        """A slot in use at a worker is one whose release waits for the next plan."""
        for worker in self.workers:
            scheduler = self.core.engine.groups[worker.connection.peer].scheduler
            used = set(np.flatnonzero(worker.table.occupancy).tolist())
            assert used <= set(scheduler._releases), f"{worker.hello.group}: slots {used} are left in use"


def play(seed: int, tracing: bool = False) -> Report:
    """Plays the incident of a seed."""
    simulation = Simulation(draw(seed), tracing)
    error = None
    try:
        simulation.play()
    except Exception as failure:  # any exception of production code is a finding
        where = traceback.extract_tb(failure.__traceback__)[-1]
        error = f"{type(failure).__name__}: {failure} ({where.name}, line {where.lineno})"
    world = simulation.world
    return Report(
        seed=seed,
        error=error,
        events=world.events,
        faults=world.faults + simulation.mishaps,
        tokens=sum(len(client.tokens) for client in simulation.clients),
        virtual_s=world.now,
        trace=world.trace or [],
    )
