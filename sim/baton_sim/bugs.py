"""Planted bugs: each breaks one rule that the design rests on, and the simulator must notice.

A bug is a patch of production code that holds while a `with` block runs; production code knows nothing of it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np

from baton_wire.columns import Column
from baton_wire.frame import Frame, FrameKind
from baton_wire.link import Counters, Dialer, Event, Link, Listener, Received
from baton_wire.plan import Plan
from baton_wire.session import decode_frame
from scheduler_svc.core.block_pool import BlockPool
from scheduler_svc.core.decode_ring import DecodeRing
from scheduler_svc.core.engine import Engine
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.core.sequence import Sequence
from scheduler_svc.core.slots import Slots
from scheduler_svc.core.step import Changes, Flight, Outcome

Bug = Callable[[], Any]
BUGS: dict[str, Bug] = {}


def bug(function: Callable[[], Iterator[None]]) -> Bug:
    """Registers a context manager under the function's name."""
    manager = contextmanager(function)
    BUGS[function.__name__] = manager
    return manager


# ---- the link ---------------------------------------------------------------------------------------------


@bug
def no_fence() -> Iterator[None]:
    """Frames of an earlier session count as the present one's."""
    receive, listen = Link.receive, Listener.receive

    def link_receive(self: Link, frame: Frame, now: float) -> Received:
        return receive(self, replace(frame, epoch=self.epoch), now)

    def listener_receive(self: Listener, peer: bytes, data: bytes | memoryview, now: float) -> Event:
        session, frame = self.link(peer), decode_frame(data, Counters())
        if session is not None and isinstance(frame, Frame) and frame.kind is not FrameKind.HELLO:
            data = replace(frame, epoch=session.epoch).encode()
        return listen(self, peer, data, now)

    with patch.object(Link, "receive", link_receive), patch.object(Listener, "receive", listener_receive):
        yield


@bug
def no_dedup() -> Iterator[None]:
    """A payload that comes twice is delivered twice."""
    receive = Link._receive_data

    def receive_data(self: Link, frame: Frame, received: Received) -> None:
        if 0 < frame.sequence < self._expected:
            received.payloads.append(frame.payload)
        receive(self, frame, received)

    with patch.object(Link, "_receive_data", receive_data):
        yield


@bug
def no_order() -> Iterator[None]:
    """A payload that overtook another is delivered at once, and the other never."""
    receive = Link._receive_data

    def receive_data(self: Link, frame: Frame, received: Received) -> None:
        self._expected = max(self._expected, frame.sequence)
        receive(self, frame, received)

    with patch.object(Link, "_receive_data", receive_data):
        yield


@bug
def lost_hello() -> Iterator[None]:
    """HELLO is said once, whether it arrives or not."""
    tick = Dialer.tick

    def once(self: Dialer, now: float) -> list[bytes]:
        frames = tick(self, now)
        if self.link is None and frames:
            self._due_s = float("inf")
        return frames

    with patch.object(Dialer, "tick", once):
        yield


@bug
def lost_welcome() -> Iterator[None]:
    """A HELLO that comes again is taken for one that was answered."""
    hello = Listener._hello

    def unanswered(self: Listener, peer: bytes, frame: Frame, now: float) -> Event:
        event = hello(self, peer, frame, now)
        return event if event.hello is not None else Event()

    with patch.object(Listener, "_hello", unanswered):
        yield


@bug
def no_resend() -> Iterator[None]:
    """What is lost stays lost."""
    with patch.object(Link, "_resend", lambda *_: None):
        yield


@bug
def same_epochs() -> Iterator[None]:
    """A core that restarts gives the epochs of its earlier life again."""
    make = Listener.__init__
    with patch.object(Listener, "__init__", lambda self, _, **options: make(self, 1, **options)):
        yield


@bug
def no_reset() -> Iterator[None]:
    """Nobody tells a peer that its session is gone."""
    with patch.object(Listener, "_seldom", lambda *_: []):
        yield


# ---- slots and blocks -------------------------------------------------------------------------------------


@bug
def double_release() -> Iterator[None]:
    """A request withdrawn while it runs gives its blocks back twice."""
    disown = Scheduler._disown

    def release_too(self: Scheduler, sequence: Sequence) -> None:
        disown(self, sequence)
        self.pool.release(sequence.blocks)

    with patch.object(Scheduler, "_disown", release_too):
        yield


@bug
def leaked_blocks() -> Iterator[None]:
    """A request withdrawn while it runs keeps its last block."""
    vacate = Scheduler._vacate

    def keep_one(self: Scheduler, sequence: Sequence, release: bool = True) -> None:
        if release and len(sequence.blocks) > 1:
            sequence.blocks.pop()
        vacate(self, sequence, release)

    with patch.object(Scheduler, "_vacate", keep_one):
        yield


@bug
def no_release() -> Iterator[None]:
    """The worker is not told that a slot was withdrawn."""
    vacate = Scheduler._vacate

    def silently(self: Scheduler, sequence: Sequence, release: bool = True) -> None:
        vacate(self, sequence, release=False)

    with patch.object(Scheduler, "_vacate", silently):
        yield


@bug
def late_append() -> Iterator[None]:
    """A slot gets its next block one step after it needs it."""
    due = DecodeRing.due
    with patch.object(DecodeRing, "due", lambda self, step: due(self, step - 1)):
        yield


@bug
def wrong_attribution() -> Iterator[None]:
    """Tokens go to whoever has the slot when the result comes, not to whose admission the plan knew."""
    apply = Scheduler.apply

    def attribute_late(self: Scheduler, result: Any) -> Outcome:
        for slot, holder in enumerate(self._holder):
            if holder is not None:
                self.slots.owner[slot] = holder.owner
        return apply(self, result)

    with patch.object(Scheduler, "apply", attribute_late):
        yield


@bug
def stale_tokens() -> Iterator[None]:
    """Tokens computed after a cancel still go out."""
    with patch.object(Scheduler, "_disown", lambda *_: None):
        yield


@bug
def admission_revives() -> Iterator[None]:
    """A request withdrawn before its admission was confirmed gets its tokens all the same."""
    repeat = Scheduler._repeat

    def all_live(self: Scheduler, flight: Flight) -> list[Sequence]:
        started = repeat(self, flight)
        for slot, sequence, _ in flight.admissions:
            self.slots.owner[slot] = sequence.owner
        return started

    with patch.object(Scheduler, "_repeat", all_live):
        yield


@bug
def forgotten_tokens() -> Iterator[None]:
    """Preempted or moved, a request starts over from its prompt."""
    rewind = Scheduler._rewind

    def from_the_prompt(self: Scheduler, sequence: Sequence) -> None:
        tokens = sequence.tokens
        rewind(self, sequence)
        sequence.tokens, sequence.keys = tokens, []

    with patch.object(Scheduler, "_rewind", from_the_prompt):
        yield


@bug
def half_states() -> Iterator[None]:
    """Preemption does not wait until nothing is in flight."""

    def make_room(self: Scheduler, due: set[int]) -> bool:
        while len(due) > self.pool.available:
            self._preempt(next(reversed(self.running)))
        return True

    with patch.object(Scheduler, "_make_room", make_room):
        yield


@bug
def over_budget() -> Iterator[None]:
    """A step takes more tokens than the worker can hold."""
    admit = Scheduler._admit

    def generous(self: Scheduler, step: int, budget: int, changes: Changes) -> None:
        admit(self, step, budget + 2, changes)

    with patch.object(Scheduler, "_admit", generous):
        yield


@bug
def short_bound() -> Iterator[None]:
    """The row bound leaves the last slot out."""
    seal = Scheduler._seal

    def shorter(self: Scheduler, step: int, decoding: int, changes: Changes) -> Plan:
        return replace(seal(self, step, decoding, changes), row_bound=max(0, self._bound - 1))

    with patch.object(Scheduler, "_seal", shorter):
        yield


@bug
def short_bucket() -> Iterator[None]:
    """The pass over decoding slots has no row for the last of them."""
    seal = Scheduler._seal

    def shorter(self: Scheduler, step: int, decoding: int, changes: Changes) -> Plan:
        return seal(self, step, max(0, decoding - self.limits.row_multiple), changes)

    with patch.object(Scheduler, "_seal", shorter):
        yield


# ---- the prefix index -------------------------------------------------------------------------------------


@bug
def early_index() -> Iterator[None]:
    """A prompt's blocks can be hit as soon as it is admitted, before anything is computed."""
    chunk = Scheduler._chunk

    def index_too(self: Scheduler, sequence: Sequence, step: int, budget: int, changes: Changes) -> int:
        size = self.limits.block_size
        if sequence.chain is None:
            for number, key in enumerate(sequence.keys):
                tokens = sequence.tokens[number * size : (number + 1) * size].tobytes()
                self._index(sequence, key, tokens, number)
            sequence.chain = None
        return chunk(self, sequence, step, budget, changes)

    with patch.object(Scheduler, "_chunk", index_too):
        yield


@bug
def stale_index() -> Iterator[None]:
    """A block that is taken for something else can still be hit by its old content."""
    make = BlockPool.__init__

    def deaf(self: BlockPool, num_blocks: int, _on_evict: Callable[[int], None]) -> None:
        make(self, num_blocks, lambda _: None)

    with patch.object(BlockPool, "__init__", deaf):
        yield


@bug
def wrong_block_indexed() -> Iterator[None]:
    """A block filled by decoding is indexed one token early: its last token is another."""
    completed = Slots.completed

    def shifted(self: Slots, rows: Column) -> bytes:
        tail = self.tail[rows].copy()
        tail[:, -1] = np.where(tail[:, -1] > 0, tail[:, -1] - 1, 1)
        return tail.tobytes() if len(rows) % 2 else completed(self, rows)

    with patch.object(Slots, "completed", shifted):
        yield


@bug
def last_position_of_another() -> Iterator[None]:
    """The last position of a prompt that is cached whole is asked for by another token."""
    chunk = Scheduler._chunk

    def mistaken(self: Scheduler, sequence: Sequence, step: int, budget: int, changes: Changes) -> int:
        count = chunk(self, sequence, step, budget, changes)
        if sequence.indexed * self.limits.block_size == len(sequence.tokens):
            changes.tokens[-1] = (changes.tokens[-1] + 1) % 30
        return count

    with patch.object(Scheduler, "_chunk", mistaken):
        yield


# ---- the engine -------------------------------------------------------------------------------------------


@bug
def lost_group_forgets() -> Iterator[None]:
    """Requests of a lost group are not moved to another."""
    lose = Engine._lose_group

    def forget(self: Engine, peer: bytes, now: float, why: str) -> None:
        group = self.groups.get(peer)
        lose(self, peer, now, why)
        if group is not None:
            for owner in list(self._lobby)[:1]:
                del self._lobby[owner]
                del self._requests[owner]

    with patch.object(Engine, "_lose_group", forget):
        yield


@bug
def orphans() -> Iterator[None]:
    """Requests of a lost front-end run on for nobody."""

    def keep_requests(self: Engine, peer: bytes) -> None:
        number = self._numbers.pop(peer, None)
        if number is not None:
            self._mailbox.forget(number)

    with patch.object(Engine, "_lose_frontend", keep_requests):
        yield


@bug
def patience_without_end() -> Iterator[None]:
    """A peer that died without a sign is waited for, for ever."""
    tick = Engine.tick

    def hear_everybody(self: Engine, now: float) -> None:
        for listener in (self.workers, self.frontends):
            for peer in listener.peers():
                session = listener.link(peer)
                if session is not None:
                    session.last_heard = now
        tick(self, now)

    with patch.object(Engine, "tick", hear_everybody):
        yield


@bug
def submitted_twice() -> Iterator[None]:
    """A request whose group is lost is placed on two groups."""
    place = Engine._place

    def place_again(self: Engine, owner: int) -> None:
        place(self, owner)
        request = self._requests[owner]
        for group in self.groups.values():
            if request.group is not None and group is not request.group and request.lost_s:
                group.scheduler.add(request.sequence)

    with patch.object(Engine, "_place", place_again):
        yield
