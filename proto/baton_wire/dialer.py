"""The side of a link that says hello: a worker or a front-end. Sans-IO, like `session`."""

from collections.abc import Callable

from baton_wire.errors import VersionError, WireError
from baton_wire.frame import Frame, FrameKind
from baton_wire.hello import Refusal
from baton_wire.session import BEAT_S, Counters, Link, NoSessionError, Received, decode_frame

HELLO_S = 0.1


class Dialer:
    """Dials for ever, unless refused.

    `link` is None while there is no session; `sessions` counts those established, so that an owner sees that
    one was lost even when the next is there already. State that belongs to a session dies with it.
    """

    def __init__(self, hello: bytes, nonce: Callable[[], int], *, beat_s: float = BEAT_S) -> None:
        """`hello`: payload of HELLO. `nonce` draws a random number in [1, 2^64) for each attempt."""
        self.link: Link | None = None
        self.refused: Refusal | None = None
        self.sessions = 0
        self._hello = hello
        self._draw = nonce
        self._nonce = nonce()
        self._beat_s = beat_s
        self._due_s = float("-inf")  # when HELLO or BEAT is sent next
        self._counters = Counters()

    def counters(self) -> Counters:
        """Totals of all sessions."""
        total = Counters()
        total.add(self._counters)
        if self.link is not None:
            total.add(self.link.counters)
        return total

    def tick(self, now: float) -> list[bytes]:
        """Frames that are due: HELLO until welcomed, then BEATs. Call it often, never with input unread."""
        if now < self._due_s or self.refused is not None:
            return []
        if self.link is None:
            self._due_s = now + HELLO_S
            return [Frame(FrameKind.HELLO, 0, self._nonce, 0, self._hello).encode()]
        self._due_s = now + self._beat_s
        return [self.link.beat(now)]

    @property
    def due_s(self) -> float:
        """When `tick` has something to send."""
        return self._due_s

    def receive(self, data: bytes | memoryview, now: float) -> Received:
        """Takes bytes of the listener. Never raises."""
        frame = decode_frame(data, self._counters)
        if isinstance(frame, VersionError):
            if self.link is None:
                self.refused = Refusal("WIRE_VERSION", str(frame))
            return Received()
        if frame is None:
            return Received()
        if frame.kind is FrameKind.WELCOME or frame.kind is FrameKind.REFUSE:
            return self._answered(frame, now)
        if frame.kind is FrameKind.RESET:
            return self._reset(frame)
        if self.link is None:
            self._counters.fenced += 1
            return Received()
        received = self.link.receive(frame, now)
        if received.closed:
            self._forget()
        return received

    def send(self, payload: bytes) -> list[bytes]:
        """Frames that carry `payload`. Raises `NoSessionError` without one, `LinkOverflow` as `Link.send`."""
        if self.link is None:
            raise NoSessionError("no session with the core")
        return [self.link.send(payload)]

    def leave(self) -> list[bytes]:
        """Ends the session in order: frames to send."""
        if self.link is None:
            return []
        farewell = self.link.bye()
        self._forget()
        return [farewell]

    def _answered(self, frame: Frame, now: float) -> Received:
        """WELCOME or REFUSE of the attempt in progress; of any other they are late and mean nothing."""
        if self.link is not None or frame.sequence != self._nonce or self.refused is not None:
            self._counters.fenced += 1
            return Received()
        if frame.kind is FrameKind.REFUSE:
            try:
                self.refused = Refusal.decode(frame.payload)
            except WireError:
                self._counters.malformed += 1
            return Received()
        self.link = Link(frame.epoch, now)
        self.sessions += 1
        self._due_s = now + self._beat_s
        return Received(replies=[self.link.beat(now)])  # what was sent before this is sent again soon

    def _reset(self, frame: Frame) -> Received:
        if self.link is not None and frame.epoch == self.link.epoch:
            self._counters.resets += 1
            self._forget()
            return Received(closed=True)
        if self.link is None and frame.epoch == 0 and frame.sequence == self._nonce:
            self._counters.resets += 1
            self._forget()  # the listener had a session by this nonce and dropped it: try another
        else:
            self._counters.fenced += 1
        return Received()

    def _forget(self) -> None:
        if self.link is not None:
            self._counters.add(self.link.counters)
        self.link = None
        self._nonce = self._draw()
        self._due_s = float("-inf")
