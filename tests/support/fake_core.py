"""The core's end of the front-end link, played by a test: says what it is told to, records what it hears."""

import asyncio
import itertools
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from baton_wire import frontend as wire
from baton_wire.frontend import HANDLE, OVER, STARTED, Message, Service, Step, Submit, Verdict
from baton_wire.link import Listener
from baton_wire.transport import RouterSocket, ipc_endpoint

READY = Service(
    ready_groups=1, max_model_len=100, max_sequence=90, vocab_size=1280, block_size=16, max_slots=8
)
_epochs = itertools.count(int(time.time()))


class FakeCore:
    """Listens in `folder` while its `async with` lasts. `pump` is called every few milliseconds."""

    def __init__(self, folder: Path, service: Service = READY) -> None:
        self.service = service
        self.heard: list[Message] = []
        self.deaf = False  # neither hears nor says anything
        self._listener = Listener(next(_epochs))
        self._socket = RouterSocket(ipc_endpoint(folder / "frontends.ipc"))

    async def __aenter__(self) -> "FakeCore":
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        self._socket.close()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(0.002)
            if not self.deaf:
                self.pump(time.monotonic())

    def pump(self, now: float) -> None:
        """One turn of a core's loop."""
        for peer, data in self._socket.receive_all():
            event = self._listener.receive(peer, data, now)
            frames = event.replies
            if event.hello is not None:
                frames = [*frames, *self._listener.accept(peer, now)]
                frames.append(self._listener.send(peer, self.service.encode()))
            for frame in frames:
                self._socket.send(peer, frame)
            self.heard += [wire.decode(payload) for payload in event.payloads]
        for peer, frame in self._listener.tick(now):
            self._socket.send(peer, frame)

    def say(self, message: Message) -> None:
        """To every front-end."""
        for peer in self._listener.peers():
            self._socket.send(peer, self._listener.send(peer, message.encode()))

    def forget(self) -> None:
        """Loses every session, as a core that was restarted has."""
        for peer in self._listener.peers():
            self._listener.drop(peer)

    async def hear(self, kind: type[Message] = Submit, count: int = 1) -> list[Message]:
        """The messages of that kind, once there are so many."""
        await until(lambda: sum(isinstance(message, kind) for message in self.heard) >= count)
        return [message for message in self.heard if isinstance(message, kind)]


async def until(what: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Waits until `what` is true; fails where that takes too long."""
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "timed out"
        await asyncio.sleep(0.005)


def step(
    tokens: list[tuple[int, int]] | None = None,
    over: list[tuple[int, Verdict]] | None = None,
    started: list[tuple[int, int]] | None = None,
) -> Step:
    """A frame of (handle, token), (handle, verdict) and (handle, cached)."""
    pairs = tokens or []
    return Step(
        handles=np.array([handle for handle, _ in pairs], HANDLE),
        tokens=np.array([token for _, token in pairs], np.int32),
        over=np.array(over or [], OVER),
        started=np.array(started or [], STARTED),
    )
