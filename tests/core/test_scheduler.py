"""The scheduler against the strict slot table: any order of arrivals, withdrawals, plans and results.

The slot table raises on whatever a real worker could not survive, and its tokens depend on every position of
the cache, so wrong bookkeeping shows as a wrong token. Integrity is checked after every operation.
"""

from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton_sim.fake_model import FakeModel, expected_tokens
from baton_sim.slot_table import SlotTable
from baton_wire.columns import TOKEN
from baton_wire.frontend import Submit
from baton_wire.hello import WorkerHello
from baton_wire.plan import SAMPLING, Plan
from baton_wire.result import End, Result
from scheduler_svc.core.group import limits_of
from scheduler_svc.core.integrity import check_integrity
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.core.sequence import Sequence, Status
from scheduler_svc.core.step import DesyncError

MODEL = FakeModel(vocab_size=60, stop_id=7, stop_every=20, numerical_every=150)


def hello(
    slots: int = 4, blocks: int = 24, block_size: int = 4, budget: int = 16, multiple: int = 1
) -> WorkerHello:
    """Limits of a small worker."""
    return WorkerHello("g", 0, 1, "f", block_size, blocks, slots, 4096, max(budget, slots), 60, multiple)


class Bench:
    """A scheduler, a slot table, and the plans between them."""

    def __init__(self, limits: WorkerHello) -> None:
        self.scheduler = Scheduler(limits_of(limits))
        self.worker = SlotTable(limits, MODEL)
        self.results: deque[Result] = deque()
        self.sequences: dict[int, Sequence] = {}
        self.submits: dict[int, Submit] = {}
        self.got: dict[int, list[int]] = {}
        self.ends: dict[int, End] = {}
        self.withdrawn: set[int] = set()

    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        min_tokens: int = 0,
        stops: tuple[int, ...] = (),
        seed: int | None = None,
    ) -> int:
        """Submits a request; returns its owner, which is its seed too where none is given."""
        owner = len(self.submits)
        sampling = np.array((owner if seed is None else seed, 1, 1, 0, 0), SAMPLING)
        self.submits[owner] = Submit(owner, np.array(prompt, TOKEN), max_tokens, min_tokens, sampling, stops)
        self.sequences[owner] = Sequence.of(owner, self.submits[owner])
        self.got[owner] = []
        self.scheduler.add(self.sequences[owner])
        return owner

    def plan(self) -> Plan | None:
        """Makes one plan and has it executed; its result waits."""
        plan = self.scheduler.schedule()
        if plan is not None:
            self.results.append(self.worker.execute(Plan.decode(plan.encode())))
        return plan

    def apply(self) -> None:
        """Applies the oldest result."""
        outcome = self.scheduler.apply(Result.decode(self.results.popleft().encode()))
        for owner, token in zip(outcome.owners.tolist(), outcome.tokens.tolist(), strict=True):
            assert owner not in self.ends and owner not in self.withdrawn, "a token after the end"
            self.got[owner].append(token)
        for sequence, end in outcome.ended:
            assert sequence.owner not in self.ends, "a request ended twice"
            self.ends[sequence.owner] = end

    def withdraw(self, owner: int) -> None:
        """Takes a request back, unless it is over."""
        if self.sequences[owner].status is not Status.OVER:
            self.scheduler.withdraw(self.sequences[owner])
            self.withdrawn.add(owner)

    def finish(self, ahead: int = 3) -> None:
        """Runs until nothing is left to do."""
        for _ in range(20_000):
            while len(self.results) < ahead and self.plan() is not None:
                pass
            if not self.results:
                assert self.scheduler.load == 0, "nothing to do, yet requests are left"
                return
            self.apply()
        raise AssertionError("requests starve")

    def check(self) -> None:
        """Every request's tokens are those it must get, so far or to the end."""
        for owner, submit in self.submits.items():
            want = expected_tokens(
                submit.prompt, submit.sampling, submit.max_tokens,
                min_tokens=submit.min_tokens, stop_ids=submit.stop_ids, model=MODEL,
            )  # fmt: skip
            got = self.got[owner]
            assert got == want.tokens[: len(got)], f"request {owner}: wrong tokens"
            if owner in self.ends:
                assert (got, self.ends[owner]) == (want.tokens, want.end)


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of operations, any small limits."""

    @initialize(
        slots=st.integers(1, 5),
        blocks=st.integers(3, 30),
        block_size=st.sampled_from([1, 2, 4, 8]),
        budget=st.integers(1, 40),
        multiple=st.sampled_from([1, 8]),
    )
    def start(self, slots, blocks, block_size, budget, multiple) -> None:
        self.bench = Bench(hello(slots, blocks, block_size, budget, multiple))

    @rule(
        shared=st.integers(0, 30),
        own=st.lists(st.integers(0, 2), min_size=1, max_size=6),
        max_tokens=st.integers(1, 40),
        min_tokens=st.integers(0, 4),
        stops=st.sampled_from([(), (7,), (7, 3)]),
    )
    def add(self, shared, own, max_tokens, min_tokens, stops) -> None:
        prompt = [i % 5 for i in range(shared)] + own
        room = self.bench.scheduler.limits.max_sequence - len(prompt)
        if room >= 1:
            self.bench.add(prompt, min(max_tokens, room), min(min_tokens, max_tokens, room), stops)

    @precondition(lambda self: len(self.bench.results) < 6)
    @rule()
    def plan(self) -> None:
        self.bench.plan()

    @precondition(lambda self: self.bench.results)
    @rule(count=st.integers(1, 8))
    def apply(self, count) -> None:
        for _ in range(min(count, len(self.bench.results))):
            self.bench.apply()

    @precondition(lambda self: self.bench.submits)
    @rule(data=st.data())
    def withdraw(self, data) -> None:
        self.bench.withdraw(data.draw(st.sampled_from(sorted(self.bench.submits))))

    @rule(steps=st.integers(1, 10), ahead=st.integers(1, 4))
    def run_a_while(self, steps, ahead) -> None:
        for _ in range(steps):
            while len(self.bench.results) < ahead and self.bench.plan() is not None:
                pass
            if self.bench.results:
                self.bench.apply()

    @invariant()
    def is_sound(self) -> None:
        if hasattr(self, "bench"):
            check_integrity(self.bench.scheduler)

    def teardown(self) -> None:
        if hasattr(self, "bench"):
            self.bench.finish()
            check_integrity(self.bench.scheduler)
            self.bench.check()
            assert self.bench.scheduler.pool.referenced == 0
            over = self.bench.ends.keys() | self.bench.withdrawn
            assert over == self.bench.submits.keys(), "every request ends once, or was withdrawn"


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 30)), min_size=2, max_size=12),
    ahead=st.integers(1, 5),
    budget=st.integers(4, 64),
)
def test_small_cache_preempts_and_loses_nothing(prompts, ahead, budget) -> None:
    bench = Bench(hello(slots=4, blocks=18, block_size=4, budget=budget))
    for shared, max_tokens in prompts:
        bench.add([i % 7 for i in range(shared)] + [len(bench.submits) % 50], max_tokens)
    bench.finish(ahead)
    bench.check()
    assert len(bench.ends) == len(prompts)
    assert bench.scheduler.pool.referenced == 0


def test_preemption_happens_and_resumes_where_it_was() -> None:
    bench = Bench(hello(slots=3, blocks=12, block_size=4))
    for first in (1, 2, 3):
        bench.add([first] * 7, 24)
    bench.finish()
    bench.check()
    assert sum(s.preemptions for s in bench.sequences.values()) > 0, "the test must see a preemption"
    assert bench.sequences[0].preemptions == 0, "the oldest is never the victim"


def test_a_prefix_hit_computes_only_the_rest() -> None:
    bench = Bench(hello(blocks=40, budget=64))
    prompt = [i % 11 for i in range(21)]
    bench.add(prompt, 3)
    bench.finish()
    again = bench.add(prompt, 3)
    plan = bench.plan()
    assert plan is not None and plan.admissions["cached"].tolist() == [20]
    assert plan.chunks["count"].tolist() == [1]
    bench.finish()
    assert bench.sequences[again].cached == 20
    bench.check()


def test_a_prompt_known_in_full_computes_its_last_position_alone() -> None:
    """Beside the sequence that computed it and goes on; the answer goes on in a block of its own."""
    bench = Bench(hello(blocks=40, budget=64))
    first = bench.add(list(range(16)), 20)
    for _ in range(3):
        bench.plan()
        bench.apply()
    again = bench.add(list(range(16)), 20)
    plan = bench.plan()
    assert plan is not None and plan.admissions["cached"].tolist() == [16]
    slot, blocks = bench.sequences[again].slot, bench.sequences[first].blocks[:4]
    assert plan.chunks.tolist() == [(slot, 1, 15, 1)] and plan.chunk_tokens.tolist() == [15]
    assert plan.appends.tolist() == [(slot, block) for block in blocks], "shared, and none beside them"
    plan = bench.plan()
    assert plan is not None and plan.appends["slot"].tolist() == [slot]
    assert plan.appends["block"][0] not in bench.sequences[first].blocks
    bench.finish()
    assert bench.sequences[again].cached == 16
    bench.check()


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("max_tokens", [1, 2, 9])
def test_prompts_known_in_full_end_as_others_do(block_size, max_tokens) -> None:
    bench = Bench(hello(slots=2, blocks=64, block_size=block_size, budget=64))
    prompt = list(range(8))
    for _ in range(5):
        bench.add(prompt, max_tokens)
        bench.finish()
    assert [s.cached for s in bench.sequences.values()] == [0, 8, 8, 8, 8]
    bench.check()
    assert bench.scheduler.pool.referenced == 0


def known_in_full(bench: Bench, answered: int) -> Sequence:
    """A sequence whose prompt of 4 blocks was known in full, with so many tokens of its answer confirmed."""
    bench.add(list(range(16)), 2)
    bench.finish()
    sequence = bench.sequences[bench.add(list(range(16)), 12)]
    for _ in range(answered):
        bench.plan()
        bench.apply()
    return sequence


@pytest.mark.parametrize("answered", range(1, 9))
def test_a_sequence_known_in_full_is_preempted_and_comes_back(answered) -> None:
    bench = Bench(hello(blocks=40, budget=64))
    sequence = known_in_full(bench, answered)
    assert sequence.cached == 16
    bench.scheduler._preempt(sequence)
    check_integrity(bench.scheduler)
    plan = bench.plan()
    assert plan is not None and plan.admissions["cached"] >= 16
    assert len(sequence.tokens) == 16 + answered
    bench.finish()
    bench.check()


def test_a_preempted_sequence_may_come_back_known_in_full() -> None:
    """Another with the same tokens went on and completed the block."""
    bench = Bench(hello(blocks=40, budget=64))
    for _ in range(2):
        bench.add(list(range(14)), 12, seed=5)
    for _ in range(2):
        bench.plan()
        bench.apply()
    behind = bench.sequences[1]
    bench.scheduler._preempt(behind)
    bench.scheduler.waiting.clear()
    for _ in range(3):
        bench.plan()
        bench.apply()
    assert len(behind.tokens) == 16
    bench.scheduler.waiting[behind] = None
    plan = bench.plan()
    assert plan is not None and plan.admissions["cached"].tolist() == [16]
    assert plan.chunks["start"].tolist() == [15]
    bench.finish()
    bench.check()
    assert len(bench.ends) == 2


@pytest.mark.parametrize("confirmed", [False, True])
def test_a_sequence_known_in_full_moves_to_another_group(confirmed) -> None:
    bench = Bench(hello(blocks=40, budget=64))
    sequence = known_in_full(bench, answered=0)
    for _ in range(3):
        bench.plan()
    assert sequence.cached == 16
    if confirmed:
        bench.apply()
    assert bench.scheduler.evacuate() == [sequence] and len(sequence.tokens) == 16 + confirmed
    bench.results.clear()
    limits = hello(blocks=40, block_size=2)
    bench.scheduler, bench.worker = Scheduler(limits_of(limits)), SlotTable(limits, MODEL)
    bench.scheduler.add(sequence)
    bench.finish()
    bench.check()
    assert len(bench.ends) == 2


def test_what_follows_a_prefix_from_the_cache_is_found_too() -> None:
    bench = Bench(hello(blocks=40, budget=64))
    known = list(range(12))
    for tail, cached in (([1] * 9, 0), ([2] * 9, 12), ([2] * 9, 20), ([1] * 9, 20)):
        number = bench.add(known + tail, 2)
        bench.finish()
        assert bench.sequences[number].cached == cached
    bench.check()


def test_a_prompt_is_not_indexed_before_its_first_token_is_confirmed() -> None:
    bench = Bench(hello(blocks=40, budget=64))
    bench.add(list(range(20)), 3)
    bench.plan()
    bench.add(list(range(20)), 3)
    plan = bench.plan()
    assert plan is not None and plan.admissions["cached"].tolist() == [0]
    bench.finish()
    bench.check()


def test_decodes_go_on_while_a_long_prompt_is_chunked() -> None:
    bench = Bench(hello(blocks=200, budget=8))
    bench.add([1], 30)
    bench.plan()
    bench.apply()
    bench.add([i % 13 for i in range(60)], 2)
    for _ in range(8):
        plan = bench.plan()
        assert plan is not None and len(plan.chunk_tokens) <= 7, "one row of the budget is the decode's"
        before = len(bench.got[0])
        bench.apply()
        assert len(bench.got[0]) == before + 1
    bench.finish()
    bench.check()


def test_first_come_first_served() -> None:
    bench = Bench(hello(slots=2, blocks=100))
    for i in range(6):
        bench.add([i + 1] * 5, 4)
    order: list[int] = []
    while bench.scheduler.load:
        if bench.plan() is None and not bench.results:
            break
        bench.apply()
        order += [s.owner for s in bench.scheduler.running if s.owner not in order]
    assert order == sorted(order)


@pytest.mark.parametrize("stage", range(6))
@pytest.mark.parametrize("ahead", [1, 3])
def test_withdrawing_at_any_stage_frees_everything(stage, ahead) -> None:
    bench = Bench(hello(blocks=60, budget=8))
    kept = bench.add([5] * 3, 12)
    gone = bench.add([i % 9 for i in range(20)], 10)
    for _ in range(stage):
        while len(bench.results) < ahead and bench.plan() is not None:
            pass
        bench.apply()
    bench.withdraw(gone)
    check_integrity(bench.scheduler)
    assert bench.scheduler.pool.referenced == len(bench.sequences[kept].blocks)
    bench.add([8] * 9, 6)  # may take over the slot while results of its former holder are on their way
    bench.finish(ahead)
    bench.check()
    assert bench.scheduler.pool.referenced == 0


def test_steady_decode_says_nothing_but_new_blocks() -> None:
    bench = Bench(hello(slots=4, blocks=100, block_size=4, budget=64))
    for i in range(4):
        bench.add([i + 1] * (i + 2), 60)
    bench.plan()
    bench.apply()
    for _ in range(12):
        plan = bench.plan()
        assert plan is not None
        assert not len(plan.admissions) and not len(plan.chunks) and not len(plan.releases)
        assert len(plan.appends) == 1, "staggered lengths: one of four slots needs a block in each step"
        bench.apply()


def test_a_result_that_cannot_be_is_refused() -> None:
    bench = Bench(hello())
    bench.add([1, 2, 3], 5)
    bench.plan()
    good = bench.results.popleft()
    for bad in (
        Result(good.step + 1, good.state_hash, tokens=good.tokens),
        Result(good.step, good.state_hash, tokens=good.tokens[:0]),
    ):
        with pytest.raises(DesyncError, match="not asked for"):
            bench.scheduler.apply(bad)
    with pytest.raises(DesyncError, match="state hash"):
        bench.scheduler.apply(Result(good.step, good.state_hash ^ 1, tokens=good.tokens))


def test_evacuated_sequences_go_on_elsewhere_with_the_same_tokens() -> None:
    bench = Bench(hello(blocks=60, budget=8))
    for i in range(6):
        bench.add([i + 1] * 9, 14)
    for _ in range(6):
        bench.plan()
        bench.plan()
        bench.apply()
    moved = bench.scheduler.evacuate()
    assert [s.owner for s in moved] == sorted(s.owner for s in moved), "oldest first"
    bench.results.clear()
    limits = hello(slots=2, blocks=40, block_size=2)
    bench.scheduler, bench.worker = Scheduler(limits_of(limits)), SlotTable(limits, MODEL)
    for sequence in moved:
        bench.scheduler.add(sequence)
    bench.finish()
    bench.check()
    assert len(bench.ends) == 6
