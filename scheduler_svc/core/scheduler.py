"""The scheduler of one worker group: what it does next, and what its results mean.

    plan = scheduler.schedule()
    ...                                # any number of plans may be on their way
    outcome = scheduler.apply(result)

Two views of the slot table. The *planned* view (through the last plan made) lives in the sequences, the
decode ring and the block pool; the *confirmed* view (through the last result applied) in `Slots`. What is
not confirmed counts as live. Per step, work in Python grows with what changes (admissions, block
boundaries, ends); the rest is a few vector operations.

Policy: decodes first, then prefill chunks in order of arrival, first come first served; when blocks run
out, the latest arrival is preempted and recomputed later. Knows no clock, no worker and no client.
"""

import heapq
from collections import OrderedDict, deque

import numpy as np

from baton_wire.columns import TOKEN, Column
from baton_wire.plan import RELEASE, Plan
from baton_wire.result import NO_TOKEN, End, Result
from baton_wire.state import Occupancy
from scheduler_svc.core.block_pool import BlockPool
from scheduler_svc.core.decode_ring import DecodeRing
from scheduler_svc.core.prefix_index import PrefixIndex
from scheduler_svc.core.sequence import Sequence, Status
from scheduler_svc.core.slots import NOBODY, Slots
from scheduler_svc.core.step import Changes, DesyncError, Flight, Limits, Outcome

# Blocks that a plan may name before it admits no further sequence: those with a long prefix in the cache cost
# little else, and a plan must stay small.
MAX_APPENDS = 65_536


class Scheduler:
    """Schedules sequences on the slots and blocks of one group, for one session of its worker."""

    def __init__(self, limits: Limits, domain: bytes = b"") -> None:
        assert limits.max_tokens_per_step >= limits.max_slots, "a step must hold a decode of every slot"
        self.limits = limits
        self.waiting: OrderedDict[Sequence, None] = OrderedDict()
        self.running: OrderedDict[Sequence, None] = OrderedDict()  # slot held, in order of admission
        self._prefilling: OrderedDict[Sequence, None] = OrderedDict()
        self.index = PrefixIndex(limits.block_size, domain)
        self.pool = BlockPool(limits.num_blocks, self.index.evict)
        self.slots = Slots(limits.max_slots, limits.block_size)
        self._ring = DecodeRing(limits.block_size)
        self._last_steps: dict[int, set[int]] = {}  # step: slots that advance for the last time in it
        self._free_slots = list(range(limits.max_slots))  # a heap: low numbers first keep rows dense
        self._holder: list[Sequence | None] = [None] * limits.max_slots  # planned view of who has a slot
        self._bound = 0  # slots at and above it are free in the planned view
        self._releases: list[int] = []
        self._flights: deque[Flight] = deque()
        self._step = 0
        self._applied = 0
        self._hash = 0
        self._blocked_at = -1  # `pool.freed` when the head of the queue last found too few blocks

    @property
    def in_flight(self) -> int:
        """Plans made whose results are not applied."""
        return len(self._flights)

    @property
    def load(self) -> int:
        """Sequences here, waiting or running."""
        return len(self.waiting) + len(self.running)

    @property
    def backlog(self) -> int:
        """Sequences that wait although every slot will be taken: those beyond the slots that are free."""
        return max(0, len(self.waiting) - len(self._free_slots))

    # ---- what owners ask for ----------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queues a waiting sequence that fits the limits."""
        assert sequence.status is Status.WAITING
        assert sequence.max_length <= self.limits.max_sequence and len(sequence.tokens) < sequence.max_length
        self.waiting[sequence] = None

    def withdraw(self, sequence: Sequence) -> None:
        """Ends a sequence in whatever state: its slot and blocks are free from the next plan on.

        Results still on their way for it are dropped.
        """
        if sequence.status is Status.WAITING:
            del self.waiting[sequence]
            self._blocked_at = -1
        elif sequence.status is not Status.OVER:
            self._disown(sequence)
            self._vacate(sequence)
        sequence.status = Status.OVER

    def evacuate(self) -> list[Sequence]:
        """The session is lost: every sequence, oldest first, waiting again with its confirmed tokens.

        The scheduler must not be used afterwards.
        """
        moved = []
        for sequence in (*self.running, *self.waiting):
            if sequence.status is not Status.WAITING:
                self._rewind(sequence)
                sequence.blocks, sequence.slot, sequence.last_step = [], -1, 0
            sequence.keys = []  # of this group's block size
            moved.append(sequence)
        return moved

    # ---- planning ---------------------------------------------------------------------------------------

    def schedule(self) -> Plan | None:
        """The next plan, or None: nothing to compute, or results must come in first."""
        step = self._step + 1
        due = self._ring.due(step)
        if len(due) > self.pool.available and not self._make_room(due):
            return None
        changes = Changes()
        decoding = len(self._ring)  # in this step; prompts that it ends join in the next
        if due:
            self._append_blocks(due, changes)
        if self._prefilling or self.waiting:
            budget = self.limits.max_tokens_per_step - (len(self.running) - len(self._prefilling))
            budget = self._continue_prefills(step, budget, changes)
            self._admit(step, budget, changes)
        if not len(self._ring) and not changes.chunks:
            assert not changes.appends
            return None
        return self._seal(step, decoding, changes)

    def _make_room(self, due: set[int]) -> bool:
        """Preempts the latest sequences until every due slot can have its block.

        Only with nothing in flight: then planned and confirmed view agree, and the confirmed tokens are all
        there are. False: wait for the results.
        """
        if self._flights:
            return False
        while len(due) > self.pool.available:
            assert len(self.running) > 1, "one sequence alone outgrew the cache: max_sequence is wrong"
            self._preempt(next(reversed(self.running)))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Gives slot and blocks back; the sequence waits in front of the queue to be recomputed."""
        self._rewind(sequence)
        self._disown(sequence)
        # It may get this very slot again before the release is confirmed; its old admission must not be taken
        # for the new one then.
        self.slots.sequence[sequence.slot] = None
        self._vacate(sequence)
        sequence.status = Status.WAITING
        sequence.preemptions += 1
        self.waiting[sequence] = None
        self.waiting.move_to_end(sequence, last=False)
        self._blocked_at = -1

    def _append_blocks(self, due: set[int], changes: Changes) -> None:
        """A new block for every slot that crosses into one with this step."""
        take, holder, appends = self.pool.take, self._holder, changes.appends
        for slot in due:
            block = take()
            sequence = holder[slot]
            assert sequence is not None
            sequence.blocks.append(block)
            appends.append((slot, block))

    def _continue_prefills(self, step: int, budget: int, changes: Changes) -> int:
        """Chunks for sequences whose prompt is partly sent; returns the budget left."""
        for sequence in list(self._prefilling):
            if budget <= 0:
                break
            budget -= self._chunk(sequence, step, budget, changes)
        return budget

    def _admit(self, step: int, budget: int, changes: Changes) -> None:
        """Slots, blocks and first chunks for waiting sequences, oldest first, while everything suffices."""
        while budget > 0 and self.waiting and self._free_slots and self._blocked_at != self.pool.freed:
            if len(changes.appends) >= MAX_APPENDS:
                return
            sequence = next(iter(self.waiting))
            if not self._reserve(sequence):
                self._blocked_at = self.pool.freed
                return
            del self.waiting[sequence]
            slot = sequence.slot = heapq.heappop(self._free_slots)
            self._holder[slot] = sequence
            self._bound = max(self._bound, slot + 1)
            sequence.status = Status.PREFILL
            self.running[sequence] = self._prefilling[sequence] = None
            cached = sequence.indexed * self.limits.block_size
            changes.admissions.append((slot, sequence, cached))
            changes.appends += [(slot, block) for block in sequence.blocks]
            budget -= self._chunk(sequence, step, budget, changes)

    def _reserve(self, sequence: Sequence) -> bool:
        """Blocks for all of a sequence's tokens, cached ones first; False where there are too few.

        One block per running sequence stays in reserve, so that an admission is not paid for at once by a
        preemption. Where all of them are cached, the last position is left to compute, which is sampled from.
        """
        size, tokens = self.limits.block_size, sequence.tokens
        if not sequence.keys:
            sequence.keys = self.index.keys(tokens)
        found = self.index.match(sequence.keys, tokens)
        shared = [entry.block for entry in found]
        fresh = -(-len(tokens) // size) - len(shared)
        if fresh + self.pool.idle(shared) + len(self.running) > self.pool.available:
            return False
        for block in shared:
            self.pool.share(block)
        sequence.blocks = shared + [self.pool.take() for _ in range(fresh)]
        cached = len(shared) * size
        sequence.planned = min(cached, len(tokens) - 1)
        sequence.chain, sequence.indexed = (found[-1] if found else None), len(found)
        if sequence.cached < 0:
            sequence.cached = cached
        return True

    def _chunk(self, sequence: Sequence, step: int, budget: int, changes: Changes) -> int:
        """The next chunk of a prefill, at most `budget` tokens; returns its size."""
        start = sequence.planned
        count = min(budget, len(sequence.tokens) - start)
        sequence.planned = start + count
        last = sequence.planned == len(sequence.tokens)
        changes.chunks.append((sequence.slot, int(last), start, count))
        changes.tokens.append(sequence.tokens[start : start + count])
        if last:
            del self._prefilling[sequence]
            sequence.status = Status.DECODE
            sequence.last_step = step + sequence.max_length - sequence.planned - 1
            if sequence.last_step > step:
                self._ring.enter(sequence.slot, sequence.planned, step)
                self._last_steps.setdefault(sequence.last_step, set()).add(sequence.slot)
        return count

    def _seal(self, step: int, decoding: int, changes: Changes) -> Plan:
        """Makes the plan of what was decided and takes it into the planned view."""
        self._step = step
        for slot in self._last_steps.pop(step, ()):
            self._ring.leave(slot)
        releases, self._releases = self._releases, []
        self._flights.append(Flight(step, self._bound, releases, changes.admissions, changes.chunks))
        multiple = self.limits.row_multiple
        return Plan(
            step=step,
            applied=self._applied,
            state_hash=self._hash,
            row_bound=self._bound,
            bucket=-(-decoding // multiple) * multiple,
            releases=np.array(releases, RELEASE),
            **changes.columns(),
        )

    # ---- results ----------------------------------------------------------------------------------------

    def apply(self, result: Result) -> Outcome:
        """Takes the result of the oldest plan in flight into the confirmed view.

        Raises `DesyncError` where step, rows, ends or state hash cannot be those of that plan. Nothing of the
        result is kept then, so that `evacuate`, all that may follow, moves what owners have been given.
        """
        flight = self._flights[0] if self._flights else None
        if flight is None or result.step != flight.step or len(result.tokens) != flight.row_bound:
            raise DesyncError(f"result of step {result.step}, {len(result.tokens)} rows: not asked for")
        self._flights.popleft()
        started = self._repeat(flight)
        begun = [chunk for chunk in flight.chunks if chunk[1] and result.tokens[chunk[0]] != NO_TOKEN]
        rows = self._sampled(flight, result)
        state_hash = self.slots.hash_after(result.tokens, [c[0] for c in begun], result.ends["slot"])
        if state_hash != result.state_hash:
            raise DesyncError(f"step {result.step}: state hash differs")
        self._applied, self._hash = flight.step, state_hash
        for sequence in started:
            sequence.started = True
        decoded = rows[self.slots.occupancy[rows] == Occupancy.DECODE] if begun else rows
        self._advance(decoded, result.tokens[decoded])
        self._start_decodes(begun, result.tokens)
        owners, tokens = self.slots.owner[rows], result.tokens[rows]
        wanted = owners != NOBODY
        if not wanted.all():
            owners, tokens = owners[wanted], tokens[wanted]
        return Outcome(owners, tokens, self._end(result), started)

    def _repeat(self, flight: Flight) -> list[Sequence]:
        """Releases, admissions and chunks of a plan that the worker has now executed.

        Returns the sequences whose owners are to be told of their first admission.
        """
        slots, started = self.slots, []
        for slot in flight.releases:
            slots.free(slot)
        for slot, sequence, cached in flight.admissions:
            live = self._holder[slot] is sequence
            slots.admit(slot, sequence, flight.step, cached, sequence.owner if live else NOBODY)
            if live and not sequence.started:
                started.append(sequence)
        for slot, _, start, count in flight.chunks:
            slots.length[slot] = start + count
        return started

    def _sampled(self, flight: Flight, result: Result) -> Column:
        """Slots that took a token with this step, ascending: those that decode, and whose prompt ended.

        Changes nothing. Raises `DesyncError` where others did, or others ended.
        """
        due = self.slots.occupancy[: flight.row_bound] == Occupancy.DECODE
        if flight.chunks:
            due[[slot for slot, last, _, _ in flight.chunks if last]] = True
        ended = result.ends["slot"]
        if len(ended):
            if not due[ended].all() or len(set(ended.tolist())) != len(ended):
                raise DesyncError(f"step {result.step}: a slot ended that did not run, or ended twice")
            due[ended[result.ends["reason"] == End.NUMERICAL]] = False
        if (due != (result.tokens != NO_TOKEN)).any():
            raise DesyncError(f"step {result.step}: other rows sampled than should have")
        return np.flatnonzero(due)

    def _advance(self, rows: Column, sampled: Column) -> None:
        """Slots that decoded before take their tokens. Completed blocks are indexed."""
        crossing = self.slots.advance(rows, sampled)
        if len(crossing):
            self._complete(crossing)
        self.slots.write(rows, sampled)

    def _complete(self, rows: Column) -> None:
        """Each row's decode filled a block: its tokens go to history, the block into the index."""
        data, size = self.slots.completed(rows), self.limits.block_size * TOKEN.itemsize
        for i, slot in enumerate(rows.tolist()):
            sequence = self.slots.sequence[slot]
            assert sequence is not None
            if self._holder[slot] is not sequence:
                continue  # withdrawn: its blocks may belong to others
            tokens = data[i * size : (i + 1) * size]
            number = len(sequence.history) // size
            sequence.history += tokens
            self._index(sequence, self.index.next_key(sequence.chain, tokens), tokens, number)

    def _start_decodes(self, chunks: list[tuple[int, int, int, int]], tokens: Column) -> None:
        """These chunks ended a prompt, and a token came of it; its whole blocks go into the index."""
        size = self.limits.block_size
        for slot, _, start, count in chunks:
            token = int(tokens[slot])
            sequence, length = self.slots.sequence[slot], start + count
            assert sequence is not None and len(sequence.tokens) == length
            whole = length - length % size
            self.slots.start_decoding(slot, length, token, sequence.tokens[whole:])
            if self._holder[slot] is sequence:
                data = sequence.tokens[:whole].tobytes()
                sequence.history[:] = data
                step = size * TOKEN.itemsize
                for number in range(sequence.indexed, len(sequence.keys)):  # shared ones stay: they are held
                    block = data[number * step : (number + 1) * step]
                    self._index(sequence, sequence.keys[number], block, number)

    def _index(self, sequence: Sequence, key: bytes, tokens: bytes, number: int) -> None:
        """Block `number` of a sequence holds `tokens` after the sequence's chain so far: index it."""
        block = sequence.blocks[number]
        entry, replaced = self.index.insert(key, sequence.chain, tokens, block)
        sequence.chain = entry
        if replaced is not None:
            self.pool.unmark(replaced)
        if entry.block == block:
            self.pool.mark(block)

    def _end(self, result: Result) -> list[tuple[Sequence, End]]:
        """Slots that ended with this step give everything back, unless they were withdrawn before."""
        ended = []
        for slot, reason in result.ends.tolist():
            sequence = self.slots.sequence[slot]
            assert sequence is not None
            self.slots.free(slot)
            if self._holder[slot] is sequence:
                self._vacate(sequence, release=False)
                sequence.status = Status.OVER
                ended.append((sequence, End(reason)))
        return ended

    # ---- giving back ------------------------------------------------------------------------------------

    def _vacate(self, sequence: Sequence, release: bool = True) -> None:
        """Takes slot and blocks from a running sequence, in the planned view.

        `release`: the worker must be told, as it does not know that the slot has ended.
        """
        slot = sequence.slot
        self._ring.leave(slot)
        remaining = self._last_steps.get(sequence.last_step)
        if remaining is not None:
            remaining.discard(slot)
            if not remaining:
                del self._last_steps[sequence.last_step]
        self._prefilling.pop(sequence, None)
        del self.running[sequence]
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.slot = -1
        sequence.last_step = 0
        self._holder[slot] = None
        heapq.heappush(self._free_slots, slot)
        while self._bound and self._holder[self._bound - 1] is None:
            self._bound -= 1
        if release:
            self._releases.append(slot)

    def _disown(self, sequence: Sequence) -> None:
        """From now on, confirmed tokens of this sequence go to nobody."""
        slot = sequence.slot
        if self.slots.sequence[slot] is sequence:
            self.slots.owner[slot] = NOBODY

    def _rewind(self, sequence: Sequence) -> None:
        """Back to a waiting sequence whose prompt is all that is confirmed of it."""
        slot = sequence.slot
        confirmed = self.slots.sequence[slot] is sequence
        if confirmed and self.slots.last_token[slot] != NO_TOKEN:
            rest = int(self.slots.length[slot]) % self.limits.block_size + 1
            whole = np.frombuffer(bytes(sequence.history), TOKEN)
            sequence.tokens = np.concatenate((whole, self.slots.tail[slot, :rest]))
            sequence.keys = []
        sequence.status = Status.WAITING
        sequence.planned = 0
        sequence.history.clear()
        sequence.chain = None
