"""Both ends of a link and the frames between them, for tests."""

import itertools

import pytest

from baton_wire.link import Dialer, Link, Listener, NoSessionError

PEER = b"peer"


class Pair:
    """A dialer, a listener whose owner takes everybody, and the frames that fly between them."""

    def __init__(self):
        self.now = 0.0
        self.nonces = itertools.count(1)
        self.lives = itertools.count()
        self.numbers = itertools.count()
        self.up: list[bytes] = []  # to the listener
        self.down: list[bytes] = []  # to the dialer
        self.sent: dict[tuple[str, int], list[bytes]] = {}  # by direction and epoch
        self.got: dict[tuple[str, int], list[bytes]] = {}
        self.start_dialer()
        self.start_listener()

    def start_dialer(self):
        self.dialer = Dialer(b"hello", lambda: next(self.nonces))

    def start_listener(self):
        self.listener = Listener(1 + 1000 * next(self.lives))

    def link(self) -> Link:
        """The listener's end of the session."""
        link = self.listener.link(PEER)
        assert link is not None
        return link

    def payload(self) -> bytes:
        return b"payload %d" % next(self.numbers)

    def send_up(self):
        if self.dialer.link is None:
            with pytest.raises(NoSessionError):
                self.dialer.send(b"")
            return
        payload = self.payload()
        self.sent.setdefault(("up", self.dialer.link.epoch), []).append(payload)
        self.up += self.dialer.send(payload)

    def send_down(self):
        link = self.listener.link(PEER)
        if link is None:
            with pytest.raises(NoSessionError):
                self.listener.send(PEER, b"")
            return
        payload = self.payload()
        self.sent.setdefault(("down", link.epoch), []).append(payload)
        self.down.append(self.listener.send(PEER, payload))

    def deliver_up(self, data: bytes):
        event = self.listener.receive(PEER, data, self.now)
        if event.hello is not None:
            assert event.hello == b"hello"
            self.down += self.listener.accept(PEER, self.now)
        if event.payloads:
            epoch = self.link().epoch
            self.got.setdefault(("up", epoch), []).extend(map(bytes, event.payloads))
        self.down += event.replies

    def deliver_down(self, data: bytes):
        received = self.dialer.receive(data, self.now)
        if received.payloads:
            assert self.dialer.link is not None
            self.got.setdefault(("down", self.dialer.link.epoch), []).extend(map(bytes, received.payloads))
        self.up += received.replies

    def tick(self, seconds: float):
        self.now += seconds
        self.up += self.dialer.tick(self.now)
        self.down += [data for _, data in self.listener.tick(self.now)]

    def exchange(self):
        """Delivers all that flies, and the answers, in order."""
        for _ in range(1000):
            if not self.up and not self.down:
                return
            up, self.up, down, self.down = self.up, [], self.down, []
            for data in up:
                self.deliver_up(data)
            for data in down:
                self.deliver_down(data)
        raise AssertionError("the two ends never stop answering each other")

    def settle(self, seconds: float = 1.0):
        """A healthy network for a while."""
        self.exchange()
        for _ in range(round(seconds / 0.02)):
            self.tick(0.02)
            self.exchange()

    def check_order(self):
        for key, got in self.got.items():
            assert got == self.sent.get(key, [])[: len(got)], key

    def check_complete(self):
        """One session at both ends, with everything delivered."""
        link = self.listener.link(PEER)
        assert self.dialer.link is not None
        assert link is not None
        epoch = self.dialer.link.epoch
        assert link.epoch == epoch
        for direction in ("up", "down"):
            assert self.got.get((direction, epoch), []) == self.sent.get((direction, epoch), [])
        assert self.dialer.link.unacknowledged == link.unacknowledged == 0
