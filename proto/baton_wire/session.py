"""A link in session: numbering, acknowledgement, re-send. The same at both ends of both hops.

Sans-IO: frames and the time (`now`, seconds, any origin, never going back) are handed in, bytes to send are
handed out. Knows nothing of how a session begins (`dialer`, `listener`) or of what payloads mean.

Rules (docs/wire.md has them at length):
- DATA are numbered 1, 2, 3 … in an epoch and kept until acknowledged. The receiver takes only the next one
  (go-back-N): one beyond it is dropped and answered by NACK, one below it by what is unacknowledged here.
- What is sent again is decided by what the peer says it has (NACK, BEAT), never by a guess at its speed.
  Whoever sends BEATs must have received all that waits on its transport before: else it asks for duplicates.
- Frames of another epoch are ignored and counted: the fence between sessions.
"""

from collections import deque
from dataclasses import dataclass, field, fields

from baton_wire.errors import VersionError, WireError
from baton_wire.frame import Frame, FrameKind

RESEND_AFTER_S = 0.05  # how long a payload may be on its way before a beat without it counts as its loss
BEAT_S = 0.1  # between statements of what has been received
MAX_STORED_FRAMES = 16_384
MAX_STORED_BYTES = 64 << 20


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


def decode_frame(data: bytes | memoryview, counters: Counters) -> Frame | VersionError | None:
    """The frame in `data`, or None where it is none; counted, since bytes may be damaged on their way."""
    try:
        return Frame.decode(data)
    except VersionError as error:
        counters.versions += 1
        return error
    except WireError:
        counters.malformed += 1
    return None
