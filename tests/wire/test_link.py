"""The link, rule by rule: handshake, fence, acknowledgement, re-send."""

import hypothesis.strategies as st
import pytest
import xxhash
from hypothesis import given

from baton_wire.frame import VERSION, Frame, FrameKind
from baton_wire.hello import Refusal
from baton_wire.link import BEAT_S, RESEND_AFTER_S, Dialer, Link, LinkOverflow, Listener
from tests.wire.pair import PEER, Pair


@pytest.fixture
def pair():
    """In session."""
    pair = Pair()
    pair.settle(0.0)
    pair.tick(0.0)
    pair.exchange()
    assert pair.dialer.link is not None
    return pair


def kinds(frames):
    return [Frame.decode(data).kind for data in frames]


# ---- handshake --------------------------------------------------------------------------------------------


def test_a_lost_hello_is_said_again():
    pair = Pair()
    pair.tick(0)
    assert kinds(pair.up) == [FrameKind.HELLO]
    pair.up.clear()
    pair.tick(0.05)
    assert pair.up == []
    pair.tick(0.06)
    assert kinds(pair.up) == [FrameKind.HELLO]
    pair.settle(0.1)
    assert pair.dialer.sessions == 1


def test_a_lost_welcome_is_answered_by_the_same_epoch():
    pair = Pair()
    pair.tick(0)
    pair.deliver_up(pair.up.pop())
    assert kinds(pair.down) == [FrameKind.WELCOME]
    pair.send_down()  # the owner does not wait for the welcome to arrive
    pair.down.clear()
    epoch = pair.link().epoch
    pair.settle(0.5)
    assert pair.dialer.link is not None and pair.dialer.link.epoch == epoch
    pair.check_complete()


def test_a_doubled_welcome_keeps_the_session(pair):
    pair.send_up()
    pair.exchange()
    session = pair.listener._sessions[PEER]
    welcome = Frame(FrameKind.WELCOME, session.link.epoch, session.nonce, 0).encode()
    pair.deliver_down(welcome)
    pair.send_up()
    pair.settle(0.2)
    pair.check_complete()
    assert pair.dialer.sessions == 1


def test_a_late_hello_does_not_end_a_live_session():
    pair = Pair()
    pair.tick(0)
    late = pair.up[0]
    pair.settle(0.2)
    pair.listener.drop(PEER)
    pair.settle(0.5)
    assert pair.dialer.sessions == 2
    pair.deliver_up(late)
    pair.settle(0.5)
    assert pair.dialer.sessions == 2
    pair.check_complete()


def test_a_dialer_whose_session_died_before_its_welcome_tries_another_nonce():
    pair = Pair()
    pair.tick(0)
    pair.deliver_up(pair.up.pop())
    pair.down.clear()
    pair.listener.drop(PEER)
    pair.settle(0.5)
    pair.check_complete()


def test_a_new_hello_ends_the_old_session(pair):
    pair.start_dialer()
    pair.tick(0)
    event = pair.listener.receive(PEER, pair.up.pop(), pair.now)
    assert event.closed and event.hello == b"hello"
    assert pair.listener.peers() == []


def test_an_unanswered_hello_is_reported_once():
    listener, dialer = Listener(1), Dialer(b"hello", lambda: 7)
    hello = dialer.tick(0)[0]
    assert listener.receive(PEER, hello, 0).hello == b"hello"
    assert listener.receive(PEER, hello, 0.1).hello is None


def test_refusal():
    listener, dialer = Listener(1), Dialer(b"hello", lambda: 7)
    refusal = Refusal("FINGERPRINT_MISMATCH", "another model")
    for _ in range(2):  # the first answer is lost
        listener.receive(PEER, dialer.tick(1)[0], 1)
        answer = listener.refuse(PEER, refusal)
        dialer._due_s = 0
    dialer.receive(answer[0], 1)
    assert dialer.refused == refusal
    assert dialer.tick(100) == [] and dialer.link is None and listener.peers() == []


def test_another_wire_version_is_refused_by_name():
    """Neither end can read the other, but both see why."""
    listener, dialer, newer = Listener(1), Dialer(b"hello", lambda: 7), VERSION + 1
    answers = listener.receive(PEER, of_version(newer, dialer.tick(0)[0]), 0).replies
    assert listener.peers() == [] and kinds(answers) == [FrameKind.REFUSE]
    dialer.receive(of_version(newer, answers[0]), 0)
    assert dialer.refused is not None and dialer.refused.reason == "WIRE_VERSION"
    assert f"wire version {newer}, this build speaks {VERSION}" in dialer.refused.message
    assert listener.counters().versions == dialer.counters().versions == 1


def of_version(version, data):
    """The frame as another build would seal it."""
    body = data[:4] + bytes((version,)) + data[5:-8]
    return body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")


def test_epochs_grow_and_wrap_past_zero():
    listener = Listener((1 << 32) - 1)
    epochs = []
    for i in range(3):
        peer = b"%d" % i
        listener.receive(peer, Frame(FrameKind.HELLO, 0, 7, 0).encode(), 0)
        (answer,) = listener.accept(peer, 0)
        epochs.append(Frame.decode(answer).epoch)
    assert epochs == [(1 << 32) - 1, 1, 2]


# ---- fence ------------------------------------------------------------------------------------------------


def test_frames_of_an_old_session_are_fenced(pair):
    pair.send_up()
    pair.send_down()
    up, down = pair.up[:], pair.down[:]
    pair.exchange()
    pair.listener.drop(PEER)
    pair.settle(0.5)
    got = dict(pair.got)
    assert pair.dialer.sessions == 2
    for data in up:
        pair.deliver_up(data)
    for data in down:
        pair.deliver_down(data)
    pair.settle(0.5)
    assert pair.got == got and pair.dialer.sessions == 2
    assert pair.dialer.counters().fenced >= 1 and pair.listener.counters().fenced >= 1


def test_a_restarted_listener_resets_its_dialers(pair):
    pair.start_listener()
    pair.settle(0.5)
    assert pair.dialer.sessions == 2
    pair.check_complete()


def test_resets_are_rare():
    listener = Listener(1)
    stray = Frame(FrameKind.DATA, 99, 1, 0, b"x").encode()
    answers = [listener.receive(PEER, stray, i / 1000).replies for i in range(100)]
    assert sum(map(len, answers)) == 2
    assert kinds(answers[0]) == [FrameKind.RESET] and Frame.decode(answers[0][0]).epoch == 99


def test_bye_closes(pair):
    event = None
    for data in pair.dialer.leave():
        event = pair.listener.receive(PEER, data, pair.now)
    assert event is not None and event.closed and pair.listener.peers() == []


# ---- acknowledgement and re-send --------------------------------------------------------------------------


def test_a_gap_is_answered_once_and_filled():
    a, b = Link(1, 0.0), Link(1, 0.0)
    frames = [a.send(b"%d" % i) for i in range(5)]
    replies = []
    for data in frames[1:]:
        replies += b.receive(Frame.decode(data), 0.001).replies
    assert kinds(replies) == [FrameKind.NACK] and Frame.decode(replies[0]).sequence == 1
    again = a.receive(Frame.decode(replies[0]), 0.002).replies
    got = [bytes(p) for data in again for p in b.receive(Frame.decode(data), 0.003).payloads]
    assert got == [b"0", b"1", b"2", b"3", b"4"]
    late = a.receive(Frame.decode(replies[0]), 0.01)  # the same NACK once more
    assert len(late.replies) == 5
    a.receive(Frame.decode(b.beat(0.02)), 0.02)
    assert a.unacknowledged == 0
    assert a.receive(Frame.decode(replies[0]), 0.03).replies == []  # overtaken by the acknowledgement


def test_a_lost_tail_is_found_by_the_beat():
    a, b = Link(1, 0.0), Link(1, 0.0)
    a.send(b"lost")
    assert a.receive(Frame.decode(b.beat(0.01)), 0.01).replies == []  # too fresh to be lost
    (again,) = a.receive(Frame.decode(b.beat(0.1)), 0.1).replies
    assert bytes(b.receive(Frame.decode(again), 0.1).payloads[0]) == b"lost"
    assert a.receive(Frame.decode(b.beat(0.11)), 0.11).replies == []


def test_a_duplicate_is_answered_by_what_it_led_to():
    core, worker = Link(1, 0.0), Link(1, 0.0)
    plan = Frame.decode(core.send(b"plan"))
    worker.receive(plan, 0.0)
    worker.send(b"result")  # lost
    (answer,) = worker.receive(plan, RESEND_AFTER_S).replies
    assert bytes(Frame.decode(answer).payload) == b"result"
    (answer,) = worker.receive(plan, RESEND_AFTER_S + 0.001).replies
    assert Frame.decode(answer).kind is FrameKind.BEAT
    assert worker.counters.duplicates == 2


def test_a_silent_peer_is_not_sent_anything_twice():
    """A worker in a long step neither beats nor acknowledges: nothing is sent again, however long."""
    listener, dialer = Listener(1), Dialer(b"", lambda: 7)
    listener.receive(PEER, dialer.tick(0)[0], 0)
    dialer.receive(listener.accept(PEER, 0)[0], 0)
    listener.send(PEER, b"plan")
    for i in range(1000):
        assert set(kinds(data for _, data in listener.tick(i * 0.01))) <= {FrameKind.BEAT}
    assert listener.counters().resent == 0
    assert listener.silent(10.0, 5.0) == [PEER]


def test_doubled_frames_do_not_multiply():
    """Every frame arrives three times at both ends: what is sent stays proportional."""
    pair = Pair()
    pair.settle(0.2)
    for _ in range(50):
        pair.send_up()
        pair.send_down()
        pair.now += 0.07
        for _ in range(6):
            up, pair.up, down, pair.down = pair.up * 3, [], pair.down * 3, []
            for data in up:
                pair.deliver_up(data)
            for data in down:
                pair.deliver_down(data)
            assert len(pair.up) + len(pair.down) < 2000
        pair.exchange()
    pair.settle(0.2)
    pair.check_complete()
    assert pair.dialer.counters().resent + pair.listener.counters().resent < 2000


def test_overflow():
    link = Link(1, 0.0, max_frames=3)
    for _ in range(3):
        link.send(b"x")
    with pytest.raises(LinkOverflow):
        link.send(b"x")
    assert link.unacknowledged == 3
    link.receive(Frame(FrameKind.BEAT, 1, 2, 1), 0.0)
    link.send(b"x")
    small = Link(1, 0.0, max_bytes=10)
    small.send(b"x" * 10)
    with pytest.raises(LinkOverflow):
        small.send(b"x")


def test_an_acknowledgement_of_what_was_never_sent_is_ignored():
    link = Link(1, 0.0)
    link.send(b"x")
    link.receive(Frame(FrameKind.BEAT, 1, 9, 8), 0.0)
    assert link.unacknowledged == 1 and link.counters.malformed == 1


@given(st.binary(max_size=100))
def test_garbage_moves_nothing(garbage):
    pair = Pair()
    pair.settle(0.2)
    pair.deliver_up(garbage)
    pair.deliver_down(garbage)
    assert pair.up == pair.down == []
    assert pair.dialer.counters().malformed == pair.listener.counters().malformed == 1


@given(st.sampled_from(FrameKind), st.integers(0, 3), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_no_well_formed_frame_raises(kind, epoch, sequence, acknowledged):
    """Whatever a peer of another mind sends."""
    pair = Pair()
    pair.settle(0.2)
    data = Frame(kind, epoch, sequence, acknowledged, b"{}").encode()
    pair.listener.receive(PEER, data, pair.now)
    pair.listener.receive(b"stranger", data, pair.now)
    pair.dialer.receive(data, pair.now)
    Dialer(b"", lambda: 7).receive(data, pair.now)


def test_beats_keep_time(pair):
    pair.settle(0.5)
    start = pair.link().last_heard
    pair.settle(1.0)
    assert pair.link().last_heard > start + 0.8
    assert pair.listener.silent(pair.now, 2 * BEAT_S) == []
