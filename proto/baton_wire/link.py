"""A session between two peers over an unreliable transport: every payload once and in order, or session lost.

The same module serves both hops. It is sans-IO: bytes and the time (`now`, seconds, any origin, never going
back) are handed in, bytes to send are handed out. It knows nothing of sockets or of what payloads mean.

Rules (docs/wire.md has them at length):
- DATA are numbered 1, 2, 3 … in an epoch and kept until acknowledged. The receiver takes only the next one
  (go-back-N): one beyond it is dropped and answered by NACK, one below it by what is unacknowledged here.
- What is sent again is decided by what the peer says it has (NACK, BEAT), never by a guess at its speed.
  Whoever sends BEATs must have received all that waits on its transport before: else it asks for duplicates.
- Frames of another epoch are ignored and counted: the fence between sessions.
"""

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field, fields

from baton_wire.errors import VersionError, WireError
from baton_wire.frame import Frame, FrameKind
from baton_wire.hello import Refusal

RESEND_AFTER_S = 0.05  # how long a payload may be on its way before a beat without it counts as its loss
BEAT_S = 0.1
HELLO_S = 0.1
MAX_STORED_FRAMES = 16_384
MAX_STORED_BYTES = 64 << 20
_MAX_EPOCH = (1 << 32) - 1
_REMEMBERED_NONCES = 1024


class LinkOverflow(RuntimeError):  # noqa: N818 - a state of the link that its owner acts on
    """More is unacknowledged than a link keeps: the peer is as good as dead, drop it."""


class NoSessionError(RuntimeError):
    """A payload was offered while no session exists to carry it."""


@dataclass(slots=True)
class Counters:
    """What happened on a link, or on all of an endpoint's together; numbers since the start."""

    sent: int = 0  # DATA, first time
    resent: int = 0  # DATA, again
    delivered: int = 0  # payloads handed to the owner
    duplicates: int = 0  # DATA that had been delivered before
    gaps: int = 0  # DATA dropped since one before it is missing
    fenced: int = 0  # frames of another epoch
    malformed: int = 0  # bytes that are no frame, or a frame that makes no sense here
    versions: int = 0  # frames of another wire version
    sessions: int = 0  # established
    resets: int = 0  # RESET sent or obeyed

    def add(self, other: "Counters") -> None:
        """Adds `other` field by field."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


@dataclass(slots=True)
class Received:
    """What a frame brought: payloads in order (views of its bytes), frames to send back, end of session."""

    payloads: list[bytes | memoryview] = field(default_factory=list)
    replies: list[bytes] = field(default_factory=list)
    closed: bool = False


@dataclass(slots=True)
class _Stored:
    sequence: int
    payload: bytes
    sent_s: float


class Link:
    """An established session with one peer; the same at both ends.

    Holds sent payloads (`unacknowledged` of them) with sequences `(peer's acknowledgement, _next)`;
    `_expected` is the sequence of the next payload to deliver, so `_expected - 1` is acknowledged.
    """

    def __init__(
        self,
        epoch: int,
        now: float,
        *,
        resend_after_s: float = RESEND_AFTER_S,
        max_frames: int = MAX_STORED_FRAMES,
        max_bytes: int = MAX_STORED_BYTES,
    ) -> None:
        self.epoch = epoch
        self.last_heard = now
        self.counters = Counters(sessions=1)
        self._now = now  # the latest time told; may lie a little in the past when a payload is sent
        self._resend_after_s = resend_after_s
        self._max_frames = max_frames
        self._max_bytes = max_bytes
        self._stored: deque[_Stored] = deque()
        self._stored_bytes = 0
        self._next = 1
        self._expected = 1
        self._nacked = 0  # sequence that the last NACK asked for
        self._nacked_s = 0.0

    @property
    def unacknowledged(self) -> int:
        """Payloads sent that the peer has not acknowledged."""
        return len(self._stored)

    def send(self, payload: bytes) -> bytes:
        """The frame that carries `payload`, kept until acknowledged. Raises `LinkOverflow`."""
        size = self._stored_bytes + len(payload)
        if len(self._stored) >= self._max_frames or size > self._max_bytes:
            raise LinkOverflow(f"{len(self._stored)} frames, {self._stored_bytes} bytes unacknowledged")
        stored = _Stored(self._next, payload, self._now)
        self._stored.append(stored)
        self._stored_bytes = size
        self._next += 1
        self.counters.sent += 1
        return self._data(stored)

    def receive(self, frame: Frame, now: float) -> Received:
        """Takes a frame of the peer. Never raises: what makes no sense is counted and ignored."""
        received = Received()
        if frame.epoch != self.epoch:
            self.counters.fenced += 1
            return received
        if frame.acknowledged >= self._next:
            self.counters.malformed += 1
            return received
        self._now = self.last_heard = now
        self._release(frame.acknowledged)
        if frame.kind is FrameKind.DATA:
            self._receive_data(frame, received)
        elif frame.kind is FrameKind.BEAT:
            self._resend(frame, received, now - self._resend_after_s)
        elif frame.kind is FrameKind.NACK:
            self._resend(frame, received, now)
        elif frame.kind is FrameKind.BYE:
            received.closed = True
        else:
            self.counters.malformed += 1
        return received

    def beat(self, now: float) -> bytes:
        """A frame that says what has been received; to be sent when all that waited has been."""
        self._now = now
        return self._control(FrameKind.BEAT)

    def bye(self) -> bytes:
        """The frame that ends the session in order."""
        return self._control(FrameKind.BYE)

    def _receive_data(self, frame: Frame, received: Received) -> None:
        if frame.sequence == self._expected:
            self._expected += 1
            self.counters.delivered += 1
            received.payloads.append(frame.payload)
        elif frame.sequence > self._expected:
            self.counters.gaps += 1
            if self._nacked != self._expected or self._now - self._nacked_s >= self._resend_after_s:
                self._nacked, self._nacked_s = self._expected, self._now
                received.replies.append(self._control(FrameKind.NACK))
        else:
            self.counters.duplicates += 1
            self._resend(frame, received, self._now - self._resend_after_s)
            if not received.replies:
                received.replies.append(self._control(FrameKind.BEAT))

    def _release(self, acknowledged: int) -> None:
        stored = self._stored
        while stored and stored[0].sequence <= acknowledged:
            self._stored_bytes -= len(stored.popleft().payload)

    def _resend(self, frame: Frame, received: Received, sent_until_s: float) -> None:
        """Sends again what `frame` shows to be missing and was last sent at or before `sent_until_s`."""
        if self._stored and self._stored[0].sequence != frame.acknowledged + 1:
            return  # overtaken: a later frame has acknowledged more
        for stored in self._stored:
            if stored.sent_s > sent_until_s:
                break
            stored.sent_s = self._now
            self.counters.resent += 1
            received.replies.append(self._data(stored))

    def _data(self, stored: _Stored) -> bytes:
        return Frame(FrameKind.DATA, self.epoch, stored.sequence, self._expected - 1, stored.payload).encode()

    def _control(self, kind: FrameKind) -> bytes:
        return Frame(kind, self.epoch, self._expected, self._expected - 1).encode()


def _decode(data: bytes | memoryview, counters: Counters) -> Frame | None:
    """The frame in `data`, or None where it is none; counted, since bytes may be damaged on their way."""
    try:
        return Frame.decode(data)
    except VersionError:
        counters.versions += 1
    except WireError:
        counters.malformed += 1
    return None


class Dialer:
    """The side that says hello: a worker or a front-end. Redials for ever, unless refused.

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
        frame = _decode(data, self._counters)
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


@dataclass(slots=True)
class Event:
    """What bytes from a peer mean to the owner of a listener, to be taken in this order.

    `closed`: the session that the peer had is over. `hello`: it asks for one with this payload; answer by
    `accept` or `refuse`. `payloads`: in order, of its session. `replies`: frames to send to it.
    """

    closed: bool = False
    hello: bytes | None = None
    payloads: list[bytes | memoryview] = field(default_factory=list)
    replies: list[bytes] = field(default_factory=list)


@dataclass(slots=True)
class _Session:
    link: Link
    nonce: int
    due_s: float


class Listener:
    """The side that takes peers: the core. Peers are told apart by opaque transport identities."""

    def __init__(self, first_epoch: int, *, beat_s: float = BEAT_S) -> None:
        """`first_epoch`, in [1, 2^32): none that an earlier life of this process gave, so by the clock."""
        self._next_epoch = first_epoch
        self._beat_s = beat_s
        self._sessions: dict[bytes, _Session] = {}
        self._asking: dict[bytes, int] = {}  # nonce of a hello that the owner has not answered
        self._spent: OrderedDict[tuple[bytes, int], None] = OrderedDict()  # nonces of sessions, oldest first
        self._reset_s: dict[bytes, float] = {}
        self._counters = Counters()

    def counters(self) -> Counters:
        """Totals of all sessions."""
        total = Counters()
        total.add(self._counters)
        for session in self._sessions.values():
            total.add(session.link.counters)
        return total

    def peers(self) -> list[bytes]:
        """Peers that have a session."""
        return list(self._sessions)

    def link(self, peer: bytes) -> Link | None:
        """The session of `peer`, if it has one."""
        session = self._sessions.get(peer)
        return None if session is None else session.link

    def receive(self, peer: bytes, data: bytes | memoryview, now: float) -> Event:
        """Takes bytes of `peer`. Never raises."""
        frame = _decode(data, self._counters)
        if frame is None:
            return Event()
        if frame.kind is FrameKind.HELLO:
            return self._hello(peer, frame, now)
        session = self._sessions.get(peer)
        if session is None or frame.epoch != session.link.epoch:
            self._counters.fenced += 1
            return Event(replies=self._reset(peer, frame.epoch, 0, now) if frame.epoch else [])
        received = session.link.receive(frame, now)
        if received.closed:
            self.drop(peer)
        return Event(closed=received.closed, payloads=received.payloads, replies=received.replies)

    def accept(self, peer: bytes, now: float) -> list[bytes]:
        """Gives `peer`, which has said hello, a session of a new epoch: frames to send."""
        nonce = self._asking.pop(peer)
        link = Link(self._next_epoch, now)
        self._next_epoch = self._next_epoch % _MAX_EPOCH + 1
        self._sessions[peer] = _Session(link, nonce, now + self._beat_s)
        self._spent[peer, nonce] = None
        if len(self._spent) > _REMEMBERED_NONCES:
            self._spent.popitem(last=False)
        return [_welcome(self._sessions[peer])]

    def refuse(self, peer: bytes, refusal: Refusal) -> list[bytes]:
        """Tells `peer`, which has said hello, that it is not taken: frames to send."""
        return [Frame(FrameKind.REFUSE, 0, self._asking.pop(peer), 0, refusal.encode()).encode()]

    def send(self, peer: bytes, payload: bytes) -> bytes:
        """The frame that carries `payload`. Raises `NoSessionError`, and `LinkOverflow` as `Link.send`."""
        session = self._sessions.get(peer)
        if session is None:
            raise NoSessionError("the peer has no session")
        return session.link.send(payload)

    def tick(self, now: float) -> list[tuple[bytes, bytes]]:
        """Beats that are due, each with its peer. Call it often, but never with input unread."""
        beats = []
        for peer, session in self._sessions.items():
            if now >= session.due_s:
                session.due_s = now + self._beat_s
                beats.append((peer, session.link.beat(now)))
        return beats

    def silent(self, now: float, after_s: float) -> list[bytes]:
        """Peers with a session from which nothing came for longer than `after_s`."""
        return [p for p, session in self._sessions.items() if now - session.link.last_heard > after_s]

    def drop(self, peer: bytes) -> None:
        """Ends the session of `peer`, if it has one; should it speak again, it is told."""
        self._asking.pop(peer, None)
        session = self._sessions.pop(peer, None)
        if session is not None:
            self._counters.add(session.link.counters)

    def _hello(self, peer: bytes, frame: Frame, now: float) -> Event:
        session = self._sessions.get(peer)
        if session is not None and session.nonce == frame.sequence:  # its welcome was lost, or is on its way
            session.link.last_heard = now
            return Event(replies=[_welcome(session)])
        if self._asking.get(peer) == frame.sequence:
            return Event()
        if (peer, frame.sequence) in self._spent:  # late, of a session that is over
            return Event(replies=self._reset(peer, 0, frame.sequence, now))
        self.drop(peer)
        self._asking[peer] = frame.sequence
        return Event(closed=session is not None, hello=bytes(frame.payload))

    def _reset(self, peer: bytes, epoch: int, nonce: int, now: float) -> list[bytes]:
        """RESET, at most once per peer in `RESEND_AFTER_S`."""
        if now - self._reset_s.get(peer, float("-inf")) < RESEND_AFTER_S:
            return []
        if len(self._reset_s) >= _REMEMBERED_NONCES:
            self._reset_s.clear()
        self._reset_s[peer] = now
        self._counters.resets += 1
        return [Frame(FrameKind.RESET, epoch, nonce, 0).encode()]


def _welcome(session: _Session) -> bytes:
    return Frame(FrameKind.WELCOME, session.link.epoch, session.nonce, 0).encode()
