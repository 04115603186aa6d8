"""The link under every way in which a network can misbehave, with restarts of either side."""

import hypothesis.strategies as st
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.wire.pair import PEER, Pair


class Network(RuleBasedStateMachine):
    """Any order of sends, deliveries, losses and restarts: always a prefix in order; all, once it heals."""

    def __init__(self):
        super().__init__()
        self.pair = Pair()

    def flying(self, upwards: bool) -> list[bytes]:
        return self.pair.up if upwards else self.pair.down

    def deliver_to(self, upwards: bool, data: bytes):
        (self.pair.deliver_up if upwards else self.pair.deliver_down)(data)

    @rule(count=st.integers(1, 5))
    def send_up(self, count):
        for _ in range(count):
            self.pair.send_up()

    @rule(count=st.integers(1, 5))
    def send_down(self, count):
        for _ in range(count):
            self.pair.send_down()

    @rule(upwards=st.booleans(), index=st.integers(0, 100), again=st.booleans())
    def deliver_one(self, upwards, index, again):
        """Any frame next: reordering; with `again` it stays and may come once more: duplication."""
        flying = self.flying(upwards)
        if flying:
            i = index % len(flying)
            self.deliver_to(upwards, flying[i] if again else flying.pop(i))

    @rule(upwards=st.booleans())
    def deliver_all(self, upwards):
        flying = self.flying(upwards)
        frames = flying[:]
        flying.clear()
        for data in frames:
            self.deliver_to(upwards, data)

    @rule(upwards=st.booleans(), index=st.integers(0, 100))
    def lose(self, upwards, index):
        flying = self.flying(upwards)
        if flying:
            flying.pop(index % len(flying))

    @rule(upwards=st.booleans(), index=st.integers(0, 100), at=st.integers(0, 1000), flip=st.integers(0, 255))
    def damage(self, upwards, index, at, flip):
        """Truncates (flip 0) or alters a frame on its way."""
        flying = self.flying(upwards)
        if flying:
            i = index % len(flying)
            data = bytearray(flying[i])
            at %= max(1, len(data))
            if flip and data:
                data[at] ^= flip
            else:
                del data[at:]
            flying[i] = bytes(data)

    @rule(seconds=st.sampled_from([0.001, 0.03, 0.06, 0.1, 0.3]))
    def time_passes(self, seconds):
        self.pair.tick(seconds)

    @rule()
    def dialer_restarts(self):
        self.pair.start_dialer()

    @rule()
    def listener_restarts(self):
        self.pair.start_listener()

    @rule()
    def listener_drops(self):
        self.pair.listener.drop(PEER)

    @precondition(lambda self: self.pair.dialer.link is not None)
    @rule()
    def dialer_leaves(self):
        self.pair.up += self.pair.dialer.leave()

    @invariant()
    def in_order_and_once(self):
        self.pair.check_order()

    def teardown(self):
        self.pair.settle(2.0)
        self.pair.send_up()
        self.pair.send_down()
        self.pair.settle(1.0)
        self.pair.check_order()
        self.pair.check_complete()


TestNetwork = Network.TestCase
TestNetwork.settings = settings(max_examples=300, stateful_step_count=60)


@given(st.lists(st.booleans(), max_size=400), st.integers(1, 40))
def test_heavy_loss_delays_but_loses_nothing(losses, count):
    """A fixed session over a network that loses as told, then no more."""
    pair = Pair()
    pair.settle(0.2)
    for _ in range(count):
        pair.send_up()
        pair.send_down()
    lost = iter(losses)
    for _ in range(30):
        pair.tick(0.05)
        pair.up = [data for data in pair.up if not next(lost, False)]
        pair.down = [data for data in pair.down if not next(lost, False)]
        up, pair.up, down, pair.down = pair.up, [], pair.down, []
        for data in up:
            pair.deliver_up(data)
        for data in down:
            pair.deliver_down(data)
    pair.settle(1.0)
    pair.check_complete()
    assert pair.dialer.sessions == 1
