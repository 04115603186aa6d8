"""The engine against peers that are wrong: no request loses a token or its end, and the engine lives on."""

from dataclasses import replace

import numpy as np
import pytest

from baton_sim.fake_model import expected_tokens
from baton_sim.slot_table import SlotTable
from baton_wire.columns import TOKEN
from baton_wire.frame import Frame
from baton_wire.frontend import Submit, Verdict
from baton_wire.plan import SAMPLING
from baton_wire.result import ENDED, End, Result
from gpu_worker.config import parse
from scheduler_svc.core.engine import EngineConfig
from scheduler_svc.core.group import limits_of
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.core.sequence import Sequence
from tests.core.small_stack import FRONTEND, MODEL, SmallStack, Worker, hello


class Liar:
    """Falsifies the result of one step, once."""

    def __init__(self, step: int, lie) -> None:
        self.step, self.lie, self.told = step, lie, False

    def __call__(self, result: Result) -> Result:
        if self.told or result.step != self.step:
            return result
        self.told = True
        falsified: Result = self.lie(result)
        return falsified


def _other_hash(result: Result) -> Result:
    return replace(result, state_hash=result.state_hash ^ 1)


def _other_tokens(result: Result) -> Result:
    return replace(result, tokens=np.where(result.tokens < 0, result.tokens, (result.tokens + 1) % 60))


def _token_beyond(result: Result) -> Result:
    return replace(result, tokens=np.where(result.tokens < 0, result.tokens, MODEL.vocab_size))


def _one_token_less(result: Result) -> Result:
    tokens = result.tokens.copy()
    tokens[np.flatnonzero(tokens >= 0)[0]] = -1
    return replace(result, tokens=tokens)


def _everything_ended(result: Result) -> Result:
    return replace(result, ends=np.array([(i, End.STOP) for i in range(len(result.tokens))], ENDED))


def _ended_twice(result: Result) -> Result:
    return replace(result, ends=np.array([(0, End.LENGTH), (0, End.LENGTH)], ENDED))


@pytest.mark.parametrize("step", [1, 2, 5, 9])
@pytest.mark.parametrize(
    "lie", [_other_hash, _other_tokens, _token_beyond, _one_token_less, _everything_ended, _ended_twice]
)
def test_a_result_that_cannot_be_costs_no_token_and_no_request(lie, step) -> None:
    """What such a result says is neither delivered nor kept: the streams go on where they were."""
    liar = Liar(step, lie)
    stack = SmallStack(Worker(hello("a"), liar))
    submits = [stack.submit(i, [i + 1] * (3 + 5 * i), 12) for i in range(3)]
    stack.run()
    assert liar.told
    assert any("out of step" in line for line in stack.log)
    for submit in submits:
        want = expected_tokens(submit.prompt, submit.sampling, submit.max_tokens, model=MODEL)
        assert stack.got[submit.handle] == want.tokens
        assert int(stack.ends[submit.handle]) == want.end
    stack.engine.check_integrity()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_blocks", 1 << 40),
        ("block_size", 1 << 40),
        ("max_slots", 1 << 16),
        ("max_model_len", 1 << 32),
        ("max_tokens_per_step", 1 << 40),
        ("vocab_size", 1 << 31),
        ("row_multiple", 1 << 16),
        ("num_blocks", 0),
        ("block_size", -1),
    ],
)
def test_limits_that_no_worker_has_are_refused_by_name(name, value) -> None:
    """They are the sizes of tables in the core, and must fit the columns of a plan."""
    strange = Worker(hello("strange", **{name: value}))
    stack = SmallStack(strange, Worker(hello("sound")))
    assert strange.refused is not None
    assert strange.refused.reason == "BAD_LIMITS"
    assert name in strange.refused.message
    stack.submit(1, [1, 2, 3], 5)
    stack.run()


def test_a_worker_that_acknowledges_nothing_is_given_up() -> None:
    """What it is sent would be kept for ever."""

    class Deaf(Worker):
        def turn(self, inbox: list[bytes], now: float) -> list[bytes]:
            return [self._deny(frame) for frame in super().turn(inbox, now)]

        def _deny(self, data: bytes) -> bytes:
            frame = Frame.decode(data)
            return replace(frame, acknowledged=0, payload=bytes(frame.payload)).encode()

    stack = SmallStack(Deaf(hello("deaf")))
    (peer,) = stack.engine.groups
    link = stack.engine.workers.link(peer)
    assert link is not None
    link._max_frames = 16
    submit = stack.submit(1, [1, 2, 3], 190)
    stack.workers[b"sound"] = Worker(hello("sound"))
    stack._inboxes[b"sound"] = []
    stack.run()
    want = expected_tokens(submit.prompt, submit.sampling, submit.max_tokens, model=MODEL)
    assert stack.got[1] == want.tokens
    assert any("deaf" in line for line in stack.log)


def test_a_plan_names_no_more_blocks_than_it_may(monkeypatch) -> None:
    """Many requests with one long cached prefix: each costs one token of a step, and all its blocks."""
    monkeypatch.setattr("scheduler_svc.core.scheduler.MAX_APPENDS", 100)
    limits = hello("a", max_slots=64, num_blocks=256, block_size=1, max_tokens_per_step=64)
    scheduler, table = Scheduler(limits_of(limits)), SlotTable(limits, MODEL)
    sampling = np.array((0, 0, 1, 0, 0), SAMPLING)
    prompt = np.arange(40, dtype=TOKEN)
    ended, appends = 0, []
    for owner in range(41):
        scheduler.add(Sequence.of(owner, Submit(owner, prompt, 1, 0, sampling)))
        while owner in (0, 40) and (plan := scheduler.schedule()) is not None:
            appends.append(len(plan.appends))
            ended += len(scheduler.apply(table.execute(plan)).ended)
    assert ended == 41
    assert max(appends) == 120  # the third sequence passes the bound, a fourth is not admitted


def test_withdrawn_requests_leave_no_trace_in_the_scheduler() -> None:
    """A long answer that was cancelled early was remembered until the step in which it would have ended."""
    limits = hello("a", num_blocks=400, max_model_len=1000)
    scheduler = Scheduler(limits_of(limits))
    table = SlotTable(limits, MODEL)
    sampling = np.array((0, 0, 1, 0, 0), SAMPLING)
    for owner in range(50):
        sequence = Sequence.of(owner, Submit(owner, np.array([owner], TOKEN), 900, 0, sampling))
        scheduler.add(sequence)
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.apply(table.execute(plan))
        scheduler.withdraw(sequence)
    assert not scheduler._last_steps


def test_a_worker_judges_its_own_step_before_the_core_does() -> None:
    """A step that the worker allows itself, yet the core does not, is repeated elsewhere for ever."""
    assert EngineConfig("").step_s > parse(["--model", "m"]).step_timeout_s


def test_a_long_step_is_waited_for_and_silence_without_one_is_not() -> None:
    """A first prompt may take a CPU a minute; a worker with nothing to do beats all the time."""
    stack = SmallStack(Worker(hello("a")))
    submit = stack.submit(1, [1, 2, 3], 5)
    stack.engine.pump()
    stack.now += EngineConfig("").step_s - 1
    link = stack.engine.frontends.link(FRONTEND)
    assert link is not None
    link.last_heard = stack.now
    stack.engine.tick(stack.now)
    stack.run()
    assert stack.got[1] == expected_tokens(submit.prompt, submit.sampling, 5, model=MODEL).tokens
    assert not any("said nothing" in line for line in stack.log)
    stack.pause(EngineConfig("").worker_silence_s + 0.1)
    assert not stack.engine.groups


def test_an_engine_that_stood_still_does_not_take_its_peers_for_silent() -> None:
    """A core that was stopped for a while gave up everybody before it had read what they had sent."""
    stack = SmallStack(Worker(hello("a")))
    stack.now += 60
    stack.engine.tick(stack.now)
    assert stack.engine.groups
    assert stack.engine.frontends.peers() == [FRONTEND]
    stack.pause(EngineConfig("").silence_s + 0.1)
    assert not stack.engine.groups
    assert not stack.engine.frontends.peers()


def test_a_request_that_takes_its_workers_with_it_is_given_up() -> None:
    stack = SmallStack(*(Worker(hello(f"g{i}")) for i in range(5)))
    stack.submit(1, [1, 2, 3], 150)
    for _ in range(stack.engine.config.max_losses):
        assert 1 not in stack.ends
        stack.turn(5)
        (holder,) = [peer for peer, group in stack.engine.groups.items() if group.scheduler.running]
        stack.engine.worker_gone(holder, stack.now)
        del stack.workers[holder]
        stack.turn(2)
    assert stack.ends[1] is Verdict.QUARANTINED
    stack.submit(2, [4, 5], 6)
    stack.run()
    assert stack.ends[2] is Verdict.LENGTH
    stack.engine.check_integrity()


def test_workers_that_leave_in_order_are_held_against_nobody() -> None:
    count = EngineConfig("").max_losses + 1
    stack = SmallStack(*(Worker(hello(f"g{i}")) for i in range(count + 1)))
    stack.submit(1, [1, 2, 3], 190)
    for _ in range(count):
        stack.turn(5)
        (holder,) = [peer for peer, group in stack.engine.groups.items() if group.scheduler.running]
        for frame in stack.workers.pop(holder).link.dialer.leave():
            stack.engine.on_worker(holder, frame, stack.now)
    stack.run()
    assert stack.ends[1] is Verdict.LENGTH


def test_a_namesake_is_refused_while_the_first_is_heard_and_takes_over_after() -> None:
    first, second, third = (Worker(hello("same"), peer=bytes([i + 1])) for i in range(3))
    stack = SmallStack(first, second)
    assert second.refused is not None and second.refused.reason == "GROUP_EXISTS"
    del stack.workers[first.peer], stack.workers[second.peer]
    stack.pause(1.5)
    stack.workers[third.peer] = third
    stack._inboxes[third.peer] = []
    stack.turn(5)
    assert third.refused is None and list(stack.engine.groups) == [third.peer]


def test_a_burst_that_finds_free_slots_is_not_turned_away() -> None:
    stack = SmallStack(Worker(hello("g")), max_queue=2)
    for handle in range(7):
        stack.submit(handle, [handle + 1], 5)
    stack.run()
    assert {handle for handle, verdict in stack.ends.items() if verdict is Verdict.QUEUE_FULL} == {6}
