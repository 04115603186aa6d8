"""The processes of a stack under virtual time: the production engine, link and sessions, with fake edges.

Each does what its real counterpart does around the same production code: `scheduler_svc.core_process` for the
core, `fake_worker` for a worker. The front-end stands for the gRPC one and its clients: see `clients`.
"""

from collections import deque
from collections.abc import Callable

from baton_sim.fake_model import FakeModel
from baton_sim.slot_table import SlotTable
from baton_sim.world import World
from baton_wire.hello import WorkerHello
from baton_wire.plan import Plan
from baton_wire.result import Result
from baton_wire.worker_session import WorkerLink
from scheduler_svc.core.engine import Engine, EngineConfig, Hop

TICK_S = 0.02
NOTICE_S = 0.002  # until the transport tells that a peer is gone
INTEGRITY_TURNS = 40
ECHOES = 40  # frames that a connection remembers in each direction


class Connection:
    """Between the core and one process. `gone`: the transport at the core knows that nobody is there.

    Remembers some of the first frames, so that they can come back much later (`echo`).
    """

    def __init__(self, world: World, hop: Hop, peer: bytes, arrive: Callable[[bytes], None]) -> None:
        self.world = world
        self.hop = hop
        self.peer = peer
        self.arrive = arrive
        self.core: Core | None = None
        self.gone = False
        self.cut_until_s = 0.0
        self._ups: list[bytes] = []
        self._downs: list[bytes] = []

    def up(self, data: bytes) -> None:
        """A frame to the core, whichever life of it is there on arrival."""
        if len(self._ups) < ECHOES:
            self._ups.append(data)
        if self.world.now >= self.cut_until_s:
            self.world.carry(data, self._arrive_up)

    def down(self, data: bytes) -> None:
        """A frame from the core."""
        if len(self._downs) < ECHOES:
            self._downs.append(data)
        if self.world.now >= self.cut_until_s:
            self.world.carry(data, self.arrive)

    def echo(self) -> None:
        """The network coughs up old frames, in order."""
        for data in self._ups:
            if self.world.random.random() < 0.5:
                self.world.carry(data, self._arrive_up)
        for data in self._downs:
            if self.world.random.random() < 0.5:
                self.world.carry(data, self.arrive)

    def _arrive_up(self, data: bytes) -> None:
        if self.core is not None:
            self.core.arrive(self, data)


class Core:
    """Engine, inbox and outbox: one turn takes in what waits and sends what comes of it."""

    def __init__(self, world: World, config: EngineConfig, first_epoch: int) -> None:
        self.world = world
        self.engine = Engine(config, first_epoch)
        self.alive = True
        self.turns = 0
        self.stalled_until_s = 0.0
        self.connections: dict[tuple[Hop, bytes], Connection] = {}
        self.observers: list[Callable[[], None]] = []  # called after each turn
        self._inbox: list[tuple[Connection, bytes]] = []
        self._awake = False
        self._next_tick_s = 0.0
        self._tick()

    def connect(self, connection: Connection) -> None:
        """A process dials; its frames arrive from now on."""
        connection.core = self
        connection.gone = False
        self.connections[connection.hop, connection.peer] = connection

    def arrive(self, connection: Connection, data: bytes) -> None:
        """A frame is there."""
        if self.alive and not connection.gone:
            self._inbox.append((connection, data))
            self._wake(0.00005)

    def lost(self, connection: Connection) -> None:
        """The transport notices that a peer went: the next send to it fails."""
        if not self.alive:
            return
        connection.gone = True
        self.engine.probe(connection.hop, self.world.now)
        self._wake(0.0)

    def _wake(self, delay_s: float) -> None:
        if not self._awake:
            self._awake = True
            self.world.after(max(delay_s, self.stalled_until_s - self.world.now), self._turn)

    def _tick(self) -> None:
        if self.alive:
            self._wake(0.0)
            self.world.after(TICK_S, self._tick)

    def _turn(self) -> None:
        self._awake = False
        if not self.alive:
            return
        engine, now = self.engine, self.world.now
        inbox, self._inbox = self._inbox, []
        for connection, data in inbox:
            if connection.hop is Hop.WORKER:
                engine.on_worker(connection.peer, data, now)
            else:
                engine.on_frontend(connection.peer, data, now)
        if now >= self._next_tick_s:
            self._next_tick_s = now + TICK_S
            engine.tick(now)
        engine.pump()
        self._flush()
        self.turns += 1
        if self.turns % INTEGRITY_TURNS == 0:
            engine.check_integrity()
        for observe in self.observers:
            observe()

    def _flush(self) -> None:
        engine = self.engine
        while engine.outbox:
            outbox, engine.outbox = engine.outbox, []
            for hop, peer, data in outbox:
                connection = self.connections[hop, peer]
                if not connection.gone:
                    connection.down(data)
                elif hop is Hop.WORKER:
                    engine.worker_gone(peer, self.world.now)
                else:
                    engine.frontend_gone(peer)
            engine.pump()
        for line in engine.log:
            self.world.say("core", line)
            assert not any(word in line for word in SUSPICIOUS), line
        engine.log.clear()


# What the engine survives in production, but nothing in a simulation should ever cause.
SUSPICIOUS = ("out of step", "twice", "no message", "sent a", "refused", "takes nothing")


class Worker:
    """One life of a worker process: a session, a slot table, and a device that takes its time."""

    def __init__(
        self, world: World, hello: WorkerHello, model: FakeModel, step_us: tuple[int, int], peer: bytes
    ) -> None:
        self.world = world
        self.hello = hello
        self.alive = True
        self.hung = False
        self.table = SlotTable(hello, model)
        self.connection = Connection(world, Hop.WORKER, peer, self.arrive)
        self.link = WorkerLink(hello, self._reset, lambda: world.random.getrandbits(64) | 1)
        self._model = model
        self._step_us = step_us
        self._inbox: list[bytes] = []
        self._queue: deque[Plan] = deque()
        self._busy = False
        self._tick()

    def arrive(self, data: bytes) -> None:
        """A frame is there; it is read between steps."""
        if self.alive:
            self._inbox.append(data)
            if not self._busy and not self.hung:
                self._poll()

    def die(self) -> None:
        """Now, whatever it was doing."""
        self.alive = False
        self.world.say(self.hello.group, "dies")

    def leave(self) -> None:
        """In order."""
        self.link.outgoing += self.link.dialer.leave()
        self._send()
        self.die()

    def hang(self, for_s: float) -> None:
        """Does nothing for a while."""
        self.hung = True
        self.world.say(self.hello.group, f"hangs for {for_s:.3f} s")
        self.world.after(for_s, self._resume)

    def _resume(self) -> None:
        self.hung = False
        if self.alive and not self._busy:
            self._poll()

    def _reset(self) -> None:
        self.table = SlotTable(self.hello, self._model)
        self._queue.clear()
        self.world.say(self.hello.group, "session lost")

    def _tick(self) -> None:
        """Beats leave here while it is idle."""
        if self.alive:
            if not self._busy and not self.hung:
                self._poll()
            self.world.after(0.04, self._tick)

    def _poll(self) -> None:
        """What `WorkerSession.poll` does, then the next step."""
        inbox, self._inbox = self._inbox, []
        self._queue += self.link.receive(inbox, self.world.now)
        self.link.tick(self.world.now)
        self._send()
        self._step()

    def _step(self) -> None:
        if not self._queue:
            return
        self._busy = True
        exec_us = self.world.random.randint(*self._step_us)
        result = self.table.execute(self._queue.popleft(), exec_us)
        self.world.after(exec_us * 1e-6, self._finish, result)

    def _finish(self, result: Result) -> None:
        """A step is done. The next may start at once, or after a look at what has come."""
        if self.hung:
            self.world.after(0.01, self._finish, result)
            return
        self._busy = False
        if not self.alive:
            return
        self.link.reply(result)
        self._send()
        if self._queue and self.world.random.random() < 0.5:
            self._step()
        else:
            self._poll()

    def _send(self) -> None:
        for data in self.link.outgoing:
            self.connection.up(data)
        self.link.outgoing.clear()
