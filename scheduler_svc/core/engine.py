"""The engine: sessions, requests and groups. All that the core process does, without its sockets and clock.

Bytes from peers and the time go in; frames to send collect in `outbox`. One engine serves any number of
worker groups and front-ends. A request lives from its Submit to a verdict or a Withdraw; in between it sits
in the scheduler of one group, or in the lobby while a lost group leaves none to take it.
"""

from collections import OrderedDict
from dataclasses import dataclass, replace
from enum import IntEnum

from baton_wire import frontend as messages
from baton_wire.errors import WireError
from baton_wire.frontend import Service, Submit, Verdict, Withdraw
from baton_wire.hello import FrontendHello, Refusal, WorkerHello
from baton_wire.link import LinkOverflow, Listener
from baton_wire.result import Result
from scheduler_svc.core.group import Group, flaw, least_loaded
from scheduler_svc.core.integrity import check_integrity
from scheduler_svc.core.mailbox import HANDLE_BITS, Mailbox
from scheduler_svc.core.sequence import Sequence, Status
from scheduler_svc.core.step import DesyncError, Outcome

_NAMESAKE_S = 1.0  # a worker that does nothing is heard ten times a second
_GAP_S = 0.5  # between two ticks: this process was stopped, or starved


class Hop(IntEnum):
    """Which socket a frame leaves by."""

    WORKER = 0
    FRONTEND = 1


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """`fingerprint`: of the served checkpoint. `max_queue`: requests that may wait for a slot.

    `worker_wait_s`: how long a request whose group was lost waits for another; `max_losses`: how often the
    group that runs it may fail until it is not tried again. `silence_s`: how long a
    front-end may be silent, `worker_silence_s` a worker with nothing to do, before its session is given up;
    `step_s`: the same for a worker that has plans to execute; longer than the deadline that a worker sets
    itself, or a slow but sound step would be repeated elsewhere for ever.
    """

    fingerprint: str
    max_queue: int = 1024
    worker_wait_s: float = 30.0
    silence_s: float = 5.0
    worker_silence_s: float = 5.0
    step_s: float = 360.0
    max_losses: int = 3


@dataclass(slots=True)
class _Request:
    """A sequence and where it is; `group` is None in the lobby, since `lost_s`."""

    sequence: Sequence
    group: Group | None = None
    lost_s: float = 0.0
    losses: int = 0  # groups that failed, not left, while they ran it


class Engine:
    """See the module. No method may be called from another thread; none blocks."""

    def __init__(self, config: EngineConfig, first_epoch: int) -> None:
        self.config = config
        self.outbox: list[tuple[Hop, bytes, bytes]] = []
        self.log: list[str] = []  # lines worth telling an operator; drained by the owner
        self.workers = Listener(first_epoch)
        self.frontends = Listener(first_epoch)
        self.groups: dict[bytes, Group] = {}
        self._requests: dict[int, _Request] = {}  # by owner
        self._lobby: OrderedDict[int, None] = OrderedDict()
        self._numbers: dict[bytes, int] = {}  # front-end peer: its number, the high half of an owner
        self._peers: dict[int, bytes] = {}
        self._next_number = 1
        self._mailbox = Mailbox()
        self._announced = Service(0)
        self._ticked_s = self._awake_s = float("-inf")  # the last tick; since when they came without a gap
        self._told: dict[bytes, Service] = {}  # by front-end: what it was told last

    # ---- input ------------------------------------------------------------------------------------------

    def on_worker(self, peer: bytes, data: bytes | memoryview, now: float) -> None:
        """Bytes arrived from a worker."""
        event = self.workers.receive(peer, data, now)
        if event.closed:
            self._lose_group(peer, now, "left", failed=False)
        if event.hello is not None:
            self._hello_worker(peer, event.hello, now)
        for payload in event.payloads:
            self._result(peer, payload, now)
        self._send(Hop.WORKER, peer, event.replies)

    def on_frontend(self, peer: bytes, data: bytes | memoryview, now: float) -> None:
        """Bytes arrived from a front-end."""
        event = self.frontends.receive(peer, data, now)
        if event.closed:
            self._lose_frontend(peer)
        if event.hello is not None:
            self._hello_frontend(peer, event.hello, now)
        for payload in event.payloads:
            self._message(peer, payload)
        self._send(Hop.FRONTEND, peer, event.replies)

    def worker_gone(self, peer: bytes, now: float) -> None:
        """The transport says that a worker is no longer there."""
        self.workers.drop(peer)
        self._lose_group(peer, now, "is gone")

    def frontend_gone(self, peer: bytes) -> None:
        """The transport says that a front-end is no longer there."""
        self.frontends.drop(peer)
        self._lose_frontend(peer)

    def tick(self, now: float) -> None:
        """Time passed: beats, silent peers, requests that waited too long for a worker."""
        if now - self._ticked_s > _GAP_S:
            self._awake_s = now  # while this process stood still, what peers said could not arrive
        self._ticked_s = now
        for peer, group in list(self.groups.items()):
            busy = group.scheduler.in_flight > 0
            link = self.workers.link(peer)
            patience_s = self.config.step_s if busy else self.config.worker_silence_s
            if link is None or now - max(link.last_heard, self._awake_s) > patience_s:
                self.workers.drop(peer)
                self._lose_group(peer, now, f"said nothing for {patience_s:g} s")
        if now - self._awake_s > self.config.silence_s:
            for peer in self.frontends.silent(now, self.config.silence_s):
                self.frontend_gone(peer)
        for owner in list(self._lobby):
            if now - self._requests[owner].lost_s < self.config.worker_wait_s:
                break
            self._over(owner, Verdict.NO_WORKER)
        for peer, frame in self.workers.tick(now):
            self._send(Hop.WORKER, peer, [frame])
        for peer, frame in self.frontends.tick(now):
            self._send(Hop.FRONTEND, peer, [frame])

    def probe(self, hop: Hop, now: float) -> None:
        """A beat to every peer of a hop: the transport will say which of them are gone."""
        listener = self.workers if hop is Hop.WORKER else self.frontends
        for peer in listener.peers():
            link = listener.link(peer)
            assert link is not None
            self._send(hop, peer, [link.beat(now)])

    def pump(self) -> None:
        """Does what the input made possible: plans to groups, one frame to each front-end."""
        for group in list(self.groups.values()):
            self._feed(group)
        for number, step in self._mailbox.empty():
            self._tell(self._peers[number], step.encode())
        self._announce()

    # ---- workers ----------------------------------------------------------------------------------------

    def _feed(self, group: Group) -> None:
        """Plans to a group, as far as its credit goes."""
        while group.scheduler.in_flight < group.credit.plans:
            plan = group.scheduler.schedule()
            if plan is None:
                return
            try:
                self._send(Hop.WORKER, group.peer, [self.workers.send(group.peer, plan.encode())])
            except LinkOverflow as overflow:  # it answers plans, but never says that it has them
                link = self.workers.link(group.peer)
                assert link is not None
                self.workers.drop(group.peer)
                self._lose_group(group.peer, link.last_heard, f"acknowledges nothing: {overflow}")
                return

    def _hello_worker(self, peer: bytes, payload: bytes, now: float) -> None:
        refusal = self._judge(payload)
        if isinstance(refusal, WorkerHello):
            refusal = self._make_way(refusal, now) or refusal
        if isinstance(refusal, Refusal):
            self.log.append(f"worker refused: {refusal.reason}: {refusal.message}")
            self._send(Hop.WORKER, peer, self.workers.refuse(peer, refusal))
            return
        self._send(Hop.WORKER, peer, self.workers.accept(peer, now))
        group = self.groups[peer] = Group.of(peer, refusal)
        self.log.append(f"group {group.hello.group} is ready: {group.scheduler.limits}")
        for owner in list(self._lobby):
            self._place(owner)

    def _judge(self, payload: bytes) -> WorkerHello | Refusal:
        """The hello, where the worker can be taken; else why not."""
        try:
            hello = WorkerHello.decode(payload)
        except WireError as error:
            return Refusal("MALFORMED_HELLO", str(error))
        if hello.fingerprint != self.config.fingerprint:
            ours, theirs = self.config.fingerprint, hello.fingerprint
            return Refusal(
                "FINGERPRINT_MISMATCH",
                f"the worker's checkpoint (fingerprint {theirs}) is not the served one ({ours}): "
                "configuration, tokenizer or weight index differ",
            )
        if hello.ranks != 1 or hello.rank != 0:
            return Refusal("RANKS_UNSUPPORTED", f"a group of {hello.ranks} ranks; a group has one so far")
        if problem := flaw(hello):
            return Refusal("BAD_LIMITS", problem)
        return hello

    def _make_way(self, hello: WorkerHello, now: float) -> Refusal | None:
        """Refused while a group of that name works or was heard just now; else that one is gone."""
        for peer, group in list(self.groups.items()):
            if group.hello.group == hello.group:
                link = self.workers.link(peer)
                silent = link is None or now - link.last_heard >= _NAMESAKE_S
                if group.scheduler.in_flight or not silent:
                    return Refusal("GROUP_EXISTS", f"a group named {hello.group} is in session already")
                self.workers.drop(peer)
                self._lose_group(peer, now, "fell silent, and another of its name is here")
        return None

    def _result(self, peer: bytes, payload: bytes | memoryview, now: float) -> None:
        group = self.groups.get(peer)
        if group is None:
            return
        try:
            result = Result.decode(payload)
            if len(result.tokens) and result.tokens.max() >= group.hello.vocab_size:
                raise WireError("result: a token beyond the vocabulary")
            outcome = group.scheduler.apply(result)
        except (WireError, DesyncError) as error:
            self.workers.drop(peer)  # its next frame is answered by RESET: it dials again, slots free
            self._lose_group(peer, now, f"is out of step: {error}")
            return
        group.credit.observe(result.exec_us)
        self._deliver(outcome)

    def _lose_group(self, peer: bytes, now: float, why: str, failed: bool = True) -> None:
        """Moves the requests of a group that is lost to others, or to the lobby.

        One that was running whenever a group failed may be the reason: after some times it is given up.
        """
        group = self.groups.pop(peer, None)
        if group is None:
            return
        suspects = set(group.scheduler.running) if failed else set()
        moved = group.scheduler.evacuate()
        self.log.append(f"group {group.hello.group} {why}: {len(moved)} requests move")
        for sequence in moved:
            request = self._requests[sequence.owner]
            request.group, request.lost_s = None, now
            request.losses += sequence in suspects
            self._lobby[sequence.owner] = None
        for sequence in moved:
            if self._requests[sequence.owner].losses >= self.config.max_losses:
                self._over(sequence.owner, Verdict.QUARANTINED)
            else:
                self._place(sequence.owner)

    # ---- requests ---------------------------------------------------------------------------------------

    def _hello_frontend(self, peer: bytes, payload: bytes, now: float) -> None:
        try:
            FrontendHello.decode(payload)
        except WireError as error:
            refusal = Refusal("MALFORMED_HELLO", str(error))
            self._send(Hop.FRONTEND, peer, self.frontends.refuse(peer, refusal))
            return
        self._lose_frontend(peer)
        self._numbers[peer], self._peers[self._next_number] = self._next_number, peer
        self._next_number += 1
        self._send(Hop.FRONTEND, peer, self.frontends.accept(peer, now))

    def _message(self, peer: bytes, payload: bytes | memoryview) -> None:
        number = self._numbers.get(peer)
        if number is None:
            return
        try:
            message = messages.decode(payload)
        except WireError as error:
            self.log.append(f"a front-end sent what is no message: {error}")
            return
        if isinstance(message, Submit):
            self._submit(number, message)
        elif isinstance(message, Withdraw):
            self._withdraw(number << HANDLE_BITS | message.handle)
        else:
            self.log.append(f"a front-end sent a {type(message).__name__}")

    def _submit(self, number: int, submit: Submit) -> None:
        """Takes a request, or ends it at once with the verdict that it cannot be served."""
        owner = number << HANDLE_BITS | submit.handle
        if owner in self._requests:
            self.log.append(f"request {owner:#x} was submitted twice; the second is ignored")
            return
        refusal = self._refuse(submit)
        if refusal is not None:
            self._mailbox.over(owner, refusal)
            return
        self._requests[owner] = _Request(Sequence.of(owner, submit))
        self._lobby[owner] = None
        self._place(owner)

    def _refuse(self, submit: Submit) -> Verdict | None:
        """Why a request cannot be served now, or None."""
        if not self.groups:
            return Verdict.NO_WORKER
        longest = max(group.scheduler.limits.max_sequence for group in self.groups.values())
        if len(submit.prompt) + submit.max_tokens > longest:
            return Verdict.TOO_LONG
        if self._waiting() >= self.config.max_queue:
            return Verdict.QUEUE_FULL
        return None

    def _place(self, owner: int) -> None:
        """Moves a request from the lobby to the least loaded group that can hold it, if there is one."""
        request = self._requests[owner]
        group = least_loaded(self.groups.values(), request.sequence.max_length)
        if group is not None:
            del self._lobby[owner]
            request.group = group
            group.scheduler.add(request.sequence)

    def _withdraw(self, owner: int) -> None:
        request = self._requests.pop(owner, None)
        if request is None:
            return  # it ended while the message was on its way
        if request.group is not None:
            request.group.scheduler.withdraw(request.sequence)
        else:
            del self._lobby[owner]
            request.sequence.status = Status.OVER

    def _lose_frontend(self, peer: bytes) -> None:
        """Nobody waits for its requests any more."""
        number = self._numbers.pop(peer, None)
        if number is None:
            return
        del self._peers[number]
        self._told.pop(peer, None)
        self._mailbox.forget(number)
        for owner in [owner for owner in self._requests if owner >> HANDLE_BITS == number]:
            self._withdraw(owner)

    def _over(self, owner: int, verdict: Verdict) -> None:
        """Ends a request that sits in the lobby."""
        self._withdraw(owner)
        self._mailbox.over(owner, verdict)

    def _waiting(self) -> int:
        return len(self._lobby) + sum(group.scheduler.backlog for group in self.groups.values())

    # ---- output -----------------------------------------------------------------------------------------

    def _deliver(self, outcome: Outcome) -> None:
        """Hands an outcome to the front-ends whose requests it is about."""
        self._mailbox.tokens(outcome.owners, outcome.tokens)
        for sequence in outcome.started:
            self._mailbox.started(sequence.owner, sequence.cached)
        for sequence, end in outcome.ended:
            del self._requests[sequence.owner]
            self._mailbox.over(sequence.owner, Verdict(end))

    def _service(self) -> Service:
        """What front-ends are told of this engine now."""
        hellos = [group.hello for group in self.groups.values()]
        limits = [group.scheduler.limits for group in self.groups.values()]
        if not hellos:
            return replace(self._announced, ready_groups=0)  # the limits last known
        return Service(
            ready_groups=len(hellos),
            max_model_len=min(h.max_model_len for h in hellos),
            max_sequence=min(limit.max_sequence for limit in limits),
            vocab_size=min(h.vocab_size for h in hellos),
            block_size=min(h.block_size for h in hellos),
            max_slots=sum(h.max_slots for h in hellos),
        )

    def _announce(self) -> None:
        """Tells every front-end that has not heard it yet, new ones too, what the core can do now."""
        service = self._announced = self._service()
        for peer in list(self._numbers):
            if self._told.get(peer) != service:
                self._told[peer] = service
                self._tell(peer, service.encode())

    def _tell(self, peer: bytes, payload: bytes) -> None:
        try:
            self._send(Hop.FRONTEND, peer, [self.frontends.send(peer, payload)])
        except LinkOverflow:
            self.log.append("a front-end takes nothing any more: its session is given up")
            self.frontend_gone(peer)

    def _send(self, hop: Hop, peer: bytes, frames: list[bytes]) -> None:
        self.outbox += [(hop, peer, frame) for frame in frames]

    # ---- inspection -------------------------------------------------------------------------------------

    def state(self) -> dict[str, object]:
        """Counts for operators and tests."""
        return {
            "requests": len(self._requests),
            "lobby": len(self._lobby),
            "frontends": len(self._numbers),
            "groups": {
                group.hello.group: {
                    "blocks": group.scheduler.pool.num_blocks,
                    "cached": group.scheduler.pool.cached,
                    "referenced": group.scheduler.pool.referenced,
                    "running": len(group.scheduler.running),
                    "waiting": len(group.scheduler.waiting),
                    "in_flight": group.scheduler.in_flight,
                }
                for group in self.groups.values()
            },
        }

    def check_integrity(self) -> None:
        """Asserts that every request is in exactly one place, and every scheduler's invariants."""
        seen: set[int] = set(self._lobby)
        for group in self.groups.values():
            check_integrity(group.scheduler)
            for sequence in (*group.scheduler.running, *group.scheduler.waiting):
                assert sequence.owner not in seen, "a request is in two places"
                assert self._requests[sequence.owner].sequence is sequence
                seen.add(sequence.owner)
        assert seen == set(self._requests), "a request is nowhere"
