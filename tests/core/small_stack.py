"""The engine with workers and a front-end at hand: real links and slot tables, no sockets, time by hand."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from baton_sim.fake_model import FakeModel
from baton_sim.slot_table import SlotTable
from baton_wire import frontend as messages
from baton_wire.columns import TOKEN
from baton_wire.frontend import Step, Submit, Verdict, Withdraw
from baton_wire.hello import FrontendHello, WorkerHello
from baton_wire.link import Dialer
from baton_wire.plan import SAMPLING
from baton_wire.result import Result
from baton_wire.worker_session import Refused, WorkerLink
from scheduler_svc.core.engine import Engine, EngineConfig, Hop

FINGERPRINT = "f"
MODEL = FakeModel(vocab_size=60)
FRONTEND = b"frontend"
Falsify = Callable[[Result], Result]


def hello(group: str, **limits: int) -> WorkerHello:
    """A small worker, with other limits where given."""
    small = WorkerHello(group, 0, 1, FINGERPRINT, 4, 64, 4, 200, 32, MODEL.vocab_size, 1)
    return replace(small, **limits)  # type: ignore[arg-type]


class Worker:
    """A slot table behind a session. `falsify` changes results on their way out."""

    def __init__(
        self, offer: WorkerHello, falsify: Falsify = lambda result: result, peer: bytes = b""
    ) -> None:
        nonces = itertools.count(1)
        self.peer = peer or offer.group.encode()
        self.offer, self.falsify = offer, falsify
        self.refused: Refused | None = None
        self.link = WorkerLink(offer, self._reset, lambda: next(nonces))
        self._reset()

    def _reset(self) -> None:
        self.table: SlotTable | None = None  # made with the first plan: an offer may be impossible

    def turn(self, inbox: list[bytes], now: float) -> list[bytes]:
        """Takes frames, executes what came, returns frames."""
        try:
            plans = self.link.receive(inbox, now)
        except Refused as refused:
            self.refused = refused
            return []
        self.link.tick(now)
        for plan in plans:
            self.table = self.table or SlotTable(self.offer, MODEL)
            self.link.reply(self.falsify(self.table.execute(plan)))
        outgoing, self.link.outgoing = self.link.outgoing, []
        return outgoing


class SmallStack:
    """One engine, one front-end, any workers. `got` and `ends`: what the front-end was told, by handle."""

    def __init__(self, *workers: Worker, **config: float) -> None:
        self.engine = Engine(EngineConfig(FINGERPRINT, **config), first_epoch=1)  # type: ignore[arg-type]
        self.workers = {worker.peer: worker for worker in workers}
        self.now = 0.0
        self.got: dict[int, list[int]] = {}
        self.ends: dict[int, Verdict] = {}
        self.log: list[str] = []
        nonces = itertools.count(1)
        self._dialer = Dialer(FrontendHello("test").encode(), lambda: next(nonces))
        self._inboxes: dict[bytes, list[bytes]] = {peer: [] for peer in (*self.workers, FRONTEND)}
        self.turn(5)

    def submit(self, handle: int, prompt: list[int], max_tokens: int) -> Submit:
        """A greedy request."""
        sampling = np.array((handle, 0, 1, 0, 0), SAMPLING)
        submit = Submit(handle, np.array(prompt, TOKEN), max_tokens, 0, sampling)
        self.got[handle] = []
        self.send(submit.encode())
        return submit

    def withdraw(self, handle: int) -> None:
        """Takes it back."""
        self.send(Withdraw(handle).encode())

    def send(self, payload: bytes) -> None:
        """The front-end says something."""
        for frame in self._dialer.send(payload):
            self.engine.on_frontend(FRONTEND, frame, self.now)

    def turn(self, count: int = 1) -> None:
        """So many rounds of everybody, a millisecond each."""
        for _ in range(count):
            self.now += 0.001
            for peer, worker in self.workers.items():
                inbox, self._inboxes[peer] = self._inboxes[peer], []
                for frame in worker.turn(inbox, self.now):
                    self.engine.on_worker(peer, frame, self.now)
            self._turn_frontend()
            self.engine.tick(self.now)
            self.engine.pump()
            self._carry()

    def pause(self, seconds: float) -> None:
        """The engine runs on while nobody says anything."""
        for _ in range(round(seconds / 0.02)):
            self.now += 0.02
            self.engine.tick(self.now)

    def run(self, done: Callable[[], bool] | None = None, turns: int = 2000) -> None:
        """Until `done`, or every request has ended."""
        for _ in range(turns):
            if done() if done is not None else self.ends.keys() == self.got.keys():
                return
            self.turn()
        raise AssertionError(f"requests {self.got.keys() - self.ends.keys()} never end; {self.log}")

    def _turn_frontend(self) -> None:
        inbox, self._inboxes[FRONTEND] = self._inboxes[FRONTEND], []
        frames = []
        for data in inbox:
            received = self._dialer.receive(data, self.now)
            frames += received.replies
            for payload in received.payloads:
                self._take(messages.decode(payload))
        for frame in frames + self._dialer.tick(self.now):
            self.engine.on_frontend(FRONTEND, frame, self.now)

    def _take(self, message: messages.Message) -> None:
        if not isinstance(message, Step):
            return
        for handle, token in zip(message.handles.tolist(), message.tokens.tolist(), strict=True):
            assert handle not in self.ends, "a token after the end"
            self.got[handle].append(token)
        for handle, verdict in message.over.tolist():
            assert handle not in self.ends, "ended twice"
            self.ends[handle] = Verdict(verdict)

    def _carry(self) -> None:
        outbox, self.engine.outbox = self.engine.outbox, []
        for _hop, peer, frame in outbox:
            if peer in self._inboxes:
                self._inboxes[peer].append(frame)
        self.log += self.engine.log
        self.engine.log.clear()


__all__ = ["FRONTEND", "MODEL", "Hop", "SmallStack", "Worker", "hello"]
