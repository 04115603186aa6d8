"""A worker group in session: its scheduler, its credit, and the requests placed on it."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from baton_wire.hello import WorkerHello
from scheduler_svc.core.credit import Credit
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.core.step import Limits


def limits_of(hello: WorkerHello) -> Limits:
    """What the worker said it can hold."""
    return Limits(
        max_slots=hello.max_slots,
        num_blocks=hello.num_blocks,
        block_size=hello.block_size,
        max_model_len=hello.max_model_len,
        max_tokens_per_step=hello.max_tokens_per_step,
        row_multiple=hello.row_multiple,
    )


# The largest number of each that a hello may name. They become columns of plans and sizes of tables here.
_MOST = {
    "block_size": 4096,
    "num_blocks": 1 << 24,
    "max_slots": (1 << 16) - 1,
    "max_model_len": (1 << 31) - 1,
    "max_tokens_per_step": 1 << 20,  # plans in flight, 8 at most, must fit what a link keeps
    "vocab_size": (1 << 31) - 1,
    "row_multiple": 4096,
}


def flaw(hello: WorkerHello) -> str | None:
    """What is wrong with the numbers of a hello, or None."""
    for name, most in _MOST.items():
        if not 1 <= getattr(hello, name) <= most:
            return f"{name} is {getattr(hello, name)}, must be from 1 to {most}"
    if hello.max_slots + hello.row_multiple > 1 << 16:
        return f"max_slots is {hello.max_slots}, a plan addresses fewer than 65,536 rows"
    if hello.max_tokens_per_step < hello.max_slots:
        return f"max_tokens_per_step is {hello.max_tokens_per_step}, below max_slots {hello.max_slots}"
    return None


@dataclass(slots=True, eq=False)
class Group:
    """One copy of the model, ready to compute, known by the transport identity of its rank 0."""

    peer: bytes
    hello: WorkerHello
    scheduler: Scheduler
    credit: Credit = field(default_factory=Credit)

    @staticmethod
    def of(peer: bytes, hello: WorkerHello) -> "Group":
        """A group without requests; the hello must have no flaw."""
        return Group(peer, hello, Scheduler(limits_of(hello), hello.fingerprint.encode()))


def least_loaded(groups: Iterable[Group], length: int) -> Group | None:
    """The group with the lowest share of its slots asked for, among those that can hold `length` tokens."""
    fits = [group for group in groups if length <= group.scheduler.limits.max_sequence]
    return min(fits, key=lambda g: g.scheduler.load / g.scheduler.limits.max_slots, default=None)
