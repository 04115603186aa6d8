"""The side of a link that takes peers: the core. Sans-IO, like `session`."""

from collections import OrderedDict
from dataclasses import dataclass, field

from baton_wire.errors import VersionError
from baton_wire.frame import Frame, FrameKind
from baton_wire.hello import Refusal
from baton_wire.session import BEAT_S, RESEND_AFTER_S, Counters, Link, NoSessionError, decode_frame

_MAX_EPOCH = (1 << 32) - 1
_REMEMBERED_NONCES = 1024


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
    """Peers and their sessions. Peers are told apart by opaque transport identities."""

    def __init__(self, first_epoch: int, *, beat_s: float = BEAT_S) -> None:
        """`first_epoch`, in [1, 2^32): none that an earlier life of this process gave, so by the clock."""
        self._next_epoch = first_epoch
        self._beat_s = beat_s
        self._sessions: dict[bytes, _Session] = {}
        self._asking: dict[bytes, int] = {}  # nonce of a hello that the owner has not answered
        self._spent: OrderedDict[tuple[bytes, int], None] = OrderedDict()  # nonces of sessions, oldest first
        self._told_s: dict[bytes, float] = {}
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
        frame = decode_frame(data, self._counters)
        if isinstance(frame, VersionError):
            return Event(replies=self._seldom(peer, Frame(FrameKind.REFUSE, 0, 0, 0), now))
        if frame is None:
            return Event()
        if frame.kind is FrameKind.HELLO:
            return self._hello(peer, frame, now)
        session = self._sessions.get(peer)
        if session is None or frame.epoch != session.link.epoch:
            self._counters.fenced += 1
            reset = Frame(FrameKind.RESET, frame.epoch, 0, 0)
            return Event(replies=self._seldom(peer, reset, now) if frame.epoch else [])
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
            reset = Frame(FrameKind.RESET, 0, frame.sequence, 0)
            return Event(replies=self._seldom(peer, reset, now))
        self.drop(peer)
        self._asking[peer] = frame.sequence
        return Event(closed=session is not None, hello=bytes(frame.payload))

    def _seldom(self, peer: bytes, answer: Frame, now: float) -> list[bytes]:
        """What a peer without session is told, RESET or REFUSE: at most once in `RESEND_AFTER_S`."""
        if now - self._told_s.get(peer, float("-inf")) < RESEND_AFTER_S:
            return []
        if len(self._told_s) >= _REMEMBERED_NONCES:
            self._told_s.clear()
        self._told_s[peer] = now
        self._counters.resets += answer.kind is FrameKind.RESET
        return [answer.encode()]


def _welcome(session: _Session) -> bytes:
    return Frame(FrameKind.WELCOME, session.link.epoch, session.nonce, 0).encode()
