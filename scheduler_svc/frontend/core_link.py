"""The link to the core on the event loop: requests go down, tokens come up and find their streams.

One frame per step serves all streams, so that work per token is a look-up and an append. The cost of a stream
follows its messages, not its tokens: writers of one stream each are woken so often that all together send no
more than MESSAGES_PER_S. Where steps are slower than that, every token goes out as it comes. Streams that
share a writer tell it themselves.
"""

import asyncio
import itertools
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from baton_wire import frontend as wire
from baton_wire.columns import Column
from baton_wire.errors import WireError
from baton_wire.frontend import Service, Step, Submit, Verdict, Withdraw
from baton_wire.hello import FrontendHello
from baton_wire.link import Dialer, LinkOverflow, NoSessionError
from baton_wire.transport import DealerSocket
from scheduler_svc.frontend.errors import Reason, RequestError
from scheduler_svc.frontend.stream import Inbox, Stream

HANDLES = 1 << 32  # then they begin again; a request as old as that is over
MESSAGES_PER_S = 10_000  # a third of what one process can send
_SHORTEST_PACE_S = 0.002
_TICK_S = 0.02
_SILENT_S = 0.9  # the core says something every 0.1 s
S = TypeVar("S", bound=Inbox)
logger = logging.getLogger(__name__)


def _nonce() -> int:
    return int.from_bytes(os.urandom(8), "little") | 1


class CoreLink:
    """A session with the core, renewed for ever. To be used on one event loop only.

    `service`: what the core said last; None without a session that can be relied on. `on_change` is called
    when it changes.
    """

    def __init__(self, endpoint: str, name: str, on_change: Callable[[], None]) -> None:
        self.service: Service | None = None
        self._on_change = on_change
        self._connected = asyncio.Event()
        self._dialer = Dialer(FrontendHello(name).encode(), _nonce)
        self._socket = DealerSocket(endpoint)
        self._streams: dict[int, Inbox] = {}  # by handle
        self._paced: dict[int, Stream] = {}  # those of them that have a writer each
        self._handles = itertools.count(1)
        self._last_service: Service | None = None
        self._reading = False
        self._closed = False
        self._timer: asyncio.TimerHandle | None = None
        self._wake_timer: asyncio.TimerHandle | None = None
        self._woken_s = float("-inf")

    def start(self) -> None:
        """Begins to dial; returns at once."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.fileno(), self._read)
        self._tick()

    def close(self) -> None:
        """Says goodbye; open streams end with CORE_LOST."""
        for timer in (self._timer, self._wake_timer):
            if timer is not None:
                timer.cancel()
        self._closed = True
        self._loop.remove_reader(self._socket.fileno())
        for frame in self._dialer.leave():
            self._socket.send(frame)
        self._lose("this server stops")
        self._socket.close(flush=True)

    async def wait_connected(self) -> None:
        """Until the core has said for the first time what it can do."""
        await self._connected.wait()

    @property
    def open_streams(self) -> int:
        """Requests that the core works on for this front-end."""
        return len(self._streams)

    def open(
        self,
        kind: Callable[[int], S],
        prompt: Column,
        *,
        max_tokens: int,
        min_tokens: int,
        sampling: Any,
        stop_ids: tuple[int, ...],
    ) -> S:
        """A request for tokens (see `Submit`): its stream, made by `kind` from a handle, to be released.

        Raises `RequestError` where the core cannot be asked.
        """
        stream = kind(next(self._handles) % HANDLES)
        submit = Submit(stream.handle, prompt, max_tokens, min_tokens, sampling, stop_ids)
        try:
            self._send(submit.encode())
        except NoSessionError:
            raise RequestError(Reason.CORE_LOST, "the scheduler core is not connected") from None
        except LinkOverflow:
            raise RequestError(Reason.QUEUE_FULL, "the scheduler core is behind") from None
        self._streams[stream.handle] = stream
        if isinstance(stream, Stream):
            self._paced[stream.handle] = stream
        return stream

    def release(self, stream: Inbox) -> None:
        """Nobody reads the stream any more; before its end that withdraws the request. Twice is fine."""
        if self._streams.pop(stream.handle, None) is None:
            return
        self._paced.pop(stream.handle, None)
        if not stream.is_over:
            self._withdraw(stream.handle)

    def fail_streams(self, error: RequestError) -> None:
        """Ends all open streams with `error`; they withdraw from the core as their writers leave."""
        for stream in list(self._streams.values()):
            if not stream.is_over:
                self._withdraw(stream.handle)
            stream.end(error)

    def _withdraw(self, handle: int) -> None:
        with suppress(NoSessionError):  # the core has forgotten it with the session
            try:
                self._send(Withdraw(handle).encode())
            except LinkOverflow:
                logger.error("the core takes nothing any more: a new session is tried")
                for frame in self._dialer.leave():
                    self._socket.send(frame)
                self._lose("the scheduler core did not answer")

    def _send(self, payload: bytes) -> None:
        for frame in self._dialer.send(payload):
            self._socket.send(frame)  # what is dropped here is sent again by the link
        self._read_soon()

    def _read_soon(self) -> None:
        """The descriptor is edge-triggered: a send may have swallowed the edge of an arrival."""
        if not self._reading:
            self._reading = True
            self._loop.call_soon(self._read)

    def _read(self) -> None:
        self._reading = False
        while not self._closed and self._socket.readable():
            for data in self._socket.receive_all():
                received = self._dialer.receive(data, self._loop.time())
                for frame in received.replies:
                    self._socket.send(frame)
                for payload in received.payloads:
                    self._take(payload)
                if received.closed:
                    self._lose("the scheduler core closed the session")
                elif self.service is None:  # heard again: no need to wait for the next tick
                    self._settle()

    def _take(self, payload: bytes | memoryview) -> None:
        try:
            message = wire.decode(payload)
        except WireError as error:
            logger.error("the core sent what is no message: %s", error)
            return
        if isinstance(message, Step):
            self._step(message)
        elif isinstance(message, Service):
            self._last_service = message
            self._settle()
            self._connected.set()

    def _step(self, step: Step) -> None:
        """Hands out one frame. Handles without a stream were withdrawn while it was on its way."""
        streams = self._streams
        for handle, cached in step.started.tolist():
            if handle in streams:
                streams[handle].cached_tokens = cached
        for handle, token in zip(step.handles.tolist(), step.tokens.tolist(), strict=True):
            stream = streams.get(handle)
            if stream is not None:
                stream.put(token)
        for handle, verdict in step.over.tolist():
            if handle in streams:
                streams[handle].end(Verdict(verdict))
        if self._paced and self._wake_timer is None:
            pace_s = len(self._paced) / MESSAGES_PER_S
            wait_s = self._woken_s + pace_s - self._loop.time()
            if pace_s < _SHORTEST_PACE_S or wait_s <= 0:
                self._wake()
            else:
                self._wake_timer = self._loop.call_later(wait_s, self._wake)

    def _wake(self) -> None:
        """All writers whose streams have something."""
        self._wake_timer = None
        self._woken_s = self._loop.time()
        for stream in self._paced.values():
            stream.wake()

    def _tick(self) -> None:
        self._timer = self._loop.call_later(_TICK_S, self._tick)
        self._read()
        for frame in self._dialer.tick(self._loop.time()):
            self._socket.send(frame)
        self._settle()
        self._read_soon()

    def _settle(self) -> None:
        """The service is what the core said last, unless it has fallen silent."""
        link = self._dialer.link
        heard = link is not None and self._loop.time() - link.last_heard < _SILENT_S
        service = self._last_service if heard else None
        if service != self.service:
            self.service = service
            self._on_change()

    def _lose(self, why: str) -> None:
        """The session is over and its requests with it."""
        self._last_service = None
        for stream in self._streams.values():
            stream.end(RequestError(Reason.CORE_LOST, why))
        self._settle()
