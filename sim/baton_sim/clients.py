"""A front-end process with its clients: submits, cancels, and checks every token as it arrives.

Clients retry what a front-end or the core could not serve; every try is checked on its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from baton_sim.incident import Request, Trigger
from baton_sim.processes import TICK_S, Connection, Core
from baton_sim.world import World
from baton_wire import frontend
from baton_wire.frontend import Service, Step, Submit, Verdict, Withdraw
from baton_wire.hello import FrontendHello
from baton_wire.link import Dialer
from scheduler_svc.core.engine import Hop

RETRIED = (Verdict.NO_WORKER, Verdict.QUEUE_FULL)


@dataclass(slots=True, eq=False)
class Client:
    """One request on its way to its one end, and what its present try has brought."""

    number: int
    request: Request
    on_end: Callable[[], None]
    tokens: list[int] = field(default_factory=list)
    started: int = 0
    tries: int = 0
    ends: list[str] = field(default_factory=list)

    def end(self, how: str) -> None:
        """Exactly once."""
        self.ends.append(how)
        assert len(self.ends) == 1, f"request {self.number} ended twice: {self.ends}"
        self.on_end()


@dataclass(slots=True)
class Withdrawal:
    """Its number among the payloads sent, and from which payload of the core on nothing may concern it."""

    sequence: int
    silent_from: int | None = None


class Frontend:
    """One life of a front-end process."""

    def __init__(self, world: World, peer: bytes, retry: Callable[[Client], None]) -> None:
        """`retry` hands a client whose try was in vain to whichever front-end is alive by then."""
        self.world = world
        self.name = peer.decode()
        self.alive = True
        self.connection = Connection(world, Hop.FRONTEND, peer, self.arrive)
        self.dialer = Dialer(FrontendHello(self.name).encode(), lambda: world.random.getrandbits(64) | 1)
        self.streams: dict[int, Client] = {}  # by handle: open
        self.withdrawn: dict[int, Withdrawal] = {}  # by handle
        self.waiting: list[Client] = []
        self._next_handle = 1
        self._delivered = 0  # payloads of this session
        self._ready = False
        self._retry = retry
        self._tick()

    def submit(self, client: Client) -> None:
        """Takes a client's request, now or as soon as there is a session with a ready group."""
        if not self.alive:
            self._retry(client)
            return
        self.waiting.append(client)
        self._drain()

    def die(self) -> list[Client]:
        """Now; the clients whose streams broke."""
        self.alive = False
        self.world.say(self.name, "dies")
        return [*self.streams.values(), *self.waiting]

    def arrive(self, data: bytes) -> None:
        """A frame is there."""
        if not self.alive:
            return
        received = self.dialer.receive(data, self.world.now)
        self._send(received.replies)
        if received.closed:
            self._lose_session()
        for payload in received.payloads:
            self._delivered += 1
            message = frontend.decode(payload)
            if isinstance(message, Service):
                self._ready = message.ready_groups > 0
            else:
                assert isinstance(message, Step)
                self._step(message)
        self._drain()

    def observe(self, core: Core) -> None:
        """After a turn of the core: which withdrawals has it seen? From then on it must be silent on them."""
        link = core.engine.frontends.link(self.connection.peer)
        if link is None or self.dialer.link is None or link.epoch != self.dialer.link.epoch:
            return
        for withdrawal in self.withdrawn.values():
            if withdrawal.silent_from is None and link._expected > withdrawal.sequence:
                withdrawal.silent_from = link._next

    # ---- down -------------------------------------------------------------------------------------------

    def _step(self, step: Step) -> None:
        for handle, cached in step.started.tolist():
            client = self._of(handle)
            if client is not None:
                client.started += 1
                assert client.started == 1 and cached <= len(client.request.prompt)
                self._cancel_if(handle, client, Trigger.STARTED)
        for handle, token in zip(step.handles.tolist(), step.tokens.tolist(), strict=True):
            client = self._of(handle)
            if client is not None:
                self._token(handle, client, token)
        for handle, verdict in step.over.tolist():
            client = self._of(handle)
            if client is not None:
                self._over(handle, client, Verdict(verdict))

    def _of(self, handle: int) -> Client | None:
        """Whose news this is; None where it was cancelled and the news was on its way."""
        client = self.streams.get(handle)
        if client is None:
            assert handle in self.withdrawn, f"{self.name}: news for handle {handle}, which is over"
            silent_from = self.withdrawn[handle].silent_from
            assert silent_from is None or self._delivered < silent_from, f"news for withdrawn handle {handle}"
        return client

    def _token(self, handle: int, client: Client, token: int) -> None:
        expected, i = client.request.expected.tokens, len(client.tokens)
        assert client.started, f"request {client.number}: a token before its start"
        assert i < len(expected), f"request {client.number}: token {token} beyond its end"
        assert token == expected[i], f"request {client.number}: token {i} is {token}, expected {expected[i]}"
        client.tokens.append(token)
        if len(client.tokens) == client.request.cancel_value:
            self._cancel_if(handle, client, Trigger.TOKEN)

    def _over(self, handle: int, client: Client, verdict: Verdict) -> None:
        if client.request.cancel is Trigger.OVER:
            self._cancel(handle, client)
            return
        del self.streams[handle]
        self.world.say(self.name, f"request {client.number} over: {verdict.name}")
        if verdict in RETRIED:
            self._retry(client)
        elif verdict is Verdict.TOO_LONG:
            assert client.request.too_long and not client.tokens
            client.end("too long")
        else:
            expected = client.request.expected
            assert client.tokens == expected.tokens, f"request {client.number}: tokens are missing at its end"
            assert int(verdict) == expected.end, (
                f"request {client.number}: {verdict.name}, {expected.end.name}"
            )
            client.end("done")

    # ---- up ---------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Submits what waits, once that makes sense."""
        if not self.waiting or self.dialer.link is None or not self._ready:
            return
        waiting, self.waiting = self.waiting, []
        for client in waiting:
            handle, self._next_handle = self._next_handle, self._next_handle + 1
            client.tokens.clear()
            client.started = 0
            client.tries += 1
            self.streams[handle] = client
            request = client.request
            submit = Submit(
                *(handle, request.prompt, request.max_tokens, request.min_tokens),
                *(request.sampling, request.stop_ids),
            )
            self._send(self.dialer.send(submit.encode()))
            self.world.say(self.name, f"submits request {client.number} as {handle}")
            if request.cancel is Trigger.AFTER_S:
                self.world.after(request.cancel_value, self._cancel_later, handle, client)

    def _cancel_later(self, handle: int, client: Client) -> None:
        if self.alive and self.streams.get(handle) is client:
            self._cancel(handle, client)

    def _cancel_if(self, handle: int, client: Client, trigger: Trigger) -> None:
        if client.request.cancel is trigger:
            self._cancel(handle, client)

    def _cancel(self, handle: int, client: Client) -> None:
        self.world.say(self.name, f"withdraws request {client.number}, {handle}")
        del self.streams[handle]
        self._send(self.dialer.send(Withdraw(handle).encode()))
        assert self.dialer.link is not None
        self.withdrawn[handle] = Withdrawal(self.dialer.link._next - 1)
        client.end("cancelled")

    def _lose_session(self) -> None:
        self.world.say(self.name, "session lost")
        self._ready = False
        self._delivered = 0
        self.withdrawn.clear()
        clients = list(self.streams.values())
        self.streams.clear()
        for client in clients:
            self._retry(client)

    def _tick(self) -> None:
        if self.alive:
            self._send(self.dialer.tick(self.world.now))
            self.world.after(TICK_S, self._tick)

    def _send(self, frames: list[bytes]) -> None:
        for data in frames:
            self.connection.up(data)
