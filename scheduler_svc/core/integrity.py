"""Every invariant of a scheduler, asserted whole. For tests and simulation: cost grows with everything.

A friend of `Scheduler`: reads its private state, changes nothing.
"""

from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.core.sequence import Sequence, Status


def check_integrity(scheduler: Scheduler) -> None:
    """Asserts that blocks, slots, ring and sequences of the planned view agree."""
    _check_blocks(scheduler)
    _check_slots(scheduler)
    for sequence in scheduler.waiting:
        assert sequence.status is Status.WAITING and not sequence.blocks and sequence.slot < 0
    for sequence in scheduler.running:
        _check_running(scheduler, sequence)


def _check_blocks(scheduler: Scheduler) -> None:
    owned: dict[int, int] = {}
    for sequence in scheduler.running:
        assert len(sequence.blocks) == len(set(sequence.blocks)), "a block twice in one sequence"
        for block in sequence.blocks:
            owned[block] = owned.get(block, 0) + 1
    scheduler.pool.check_integrity(owned, scheduler.index.blocks())
    scheduler.index.check_integrity()


def _check_slots(scheduler: Scheduler) -> None:
    held = {slot for slot, holder in enumerate(scheduler._holder) if holder is not None}
    assert held == {s.slot for s in scheduler.running} and len(held) == len(scheduler.running)
    free = [slot for slot in range(scheduler.limits.max_slots) if slot not in held]
    assert sorted(scheduler._free_slots) == free, "free slots and holders disagree"
    assert scheduler._bound == max(held, default=-1) + 1
    for slot, holder in enumerate(scheduler._holder):
        advances = (
            holder is not None and holder.status is Status.DECODE and holder.last_step > scheduler._step
        )
        assert (slot in scheduler._ring) == advances, f"slot {slot}: in the ring {not advances}"


def _check_running(scheduler: Scheduler, sequence: Sequence) -> None:
    assert sequence.status in (Status.PREFILL, Status.DECODE)
    assert scheduler._holder[sequence.slot] is sequence, f"slot {sequence.slot} has another holder"
    assert (sequence in scheduler._prefilling) == (sequence.status is Status.PREFILL)
    if sequence.status is Status.PREFILL:
        written = len(sequence.tokens)  # its blocks are reserved at admission
    else:
        first = sequence.last_step - (sequence.max_length - sequence.planned - 1)
        written = sequence.planned + min(scheduler._step, sequence.last_step) - first
    need = -(-written // scheduler.limits.block_size)
    assert len(sequence.blocks) == need, f"{len(sequence.blocks)} blocks for {written} positions"
