"""The fake worker's slot table: right tokens for right plans, an error for every wrong one."""

from collections import deque
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton_sim.fake_model import Chain, Expected, FakeModel, expected_tokens, extend_each
from baton_sim.slot_table import ContractError, SlotTable
from baton_wire.frontend import Submit
from baton_wire.hello import WorkerHello
from baton_wire.plan import ADMISSION, APPEND, CHUNK, HELD, RELEASE, SAMPLING, Mode, Plan
from baton_wire.result import End
from scheduler_svc.core.group import limits_of
from scheduler_svc.core.integrity import check_integrity
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.core.sequence import Sequence

HELLO = WorkerHello("g", 0, 1, "f", 4, 24, 4, 40, 16, 50, 2)


def sampling(seed):
    return np.array((seed, 1, 1, 0, 0), SAMPLING)[()]


# ---- the model --------------------------------------------------------------------------------------------

tokens = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=50)


@given(st.integers(0, 2**64 - 1), tokens, tokens)
def test_chains_are_the_same_in_runs_and_one_by_one(start, first, second):
    chain = Chain()
    whole = chain.extend(start, np.array(first + second, np.int32))
    again = chain.extend(int(chain.extend(start, np.array(first, np.int32))[-1]), np.array(second, np.int32))
    one = np.array([start], np.uint64)
    for token in first + second:
        one = extend_each(one, np.array([token], np.int32))
    assert whole[-1] == again[-1] == one[0]


@given(st.lists(st.tuples(*[st.integers(0, 2**64 - 1)] * 2, st.integers(0, 2**20)), min_size=1))
def test_vector_and_integer_sampling_agree(rows):
    model = FakeModel(50, stop_id=3, stop_every=4, numerical_every=5)
    chains, seeds, positions = (np.array(column, np.uint64) for column in zip(*rows, strict=True))
    sampled = model.sample(seeds, positions, chains)
    assert sampled.tolist() == [model.sample_one(seed, position, chain) for chain, seed, position in rows]


def test_expected_tokens_end_as_asked():
    model = FakeModel(50, stop_id=3, stop_every=4, numerical_every=50)
    ends = set()
    for seed in range(200):
        want = expected_tokens([1, 2], sampling(seed), 20, min_tokens=2, stop_ids=(3, 4), model=model)
        ends.add(want.end)
        assert not {3, 4} & set(want.tokens[:-1]) and not {3, 4} & set(want.tokens[:2])
        assert (want.end is End.STOP) == (want.tokens[-1:] in ([3], [4]))
        assert (want.end is End.LENGTH) <= (len(want.tokens) == 20)
    assert ends == {End.STOP, End.LENGTH, End.NUMERICAL}


# ---- driven by the production scheduler -------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_the_scheduler_gets_the_expected_tokens(seed):
    """Random requests, shared prefixes, plans ahead, withdrawals, a cache too small for all."""
    random = Random(seed)
    model = FakeModel(HELLO.vocab_size, stop_id=7, stop_every=20, numerical_every=random.choice([0, 40]))
    hello = replace(HELLO, num_blocks=random.choice([10, 14, 24]))
    scheduler, table = Scheduler(limits_of(hello)), SlotTable(hello, model)
    prefix = [random.randrange(50) for _ in range(30)]
    want: dict[int, Expected | None] = {}
    got: dict[int, list[int]] = {}
    live: dict[int, Sequence] = {}
    flying: deque[Plan] = deque()
    for _ in range(400):
        if len(want) < 40 and random.random() < 0.3:
            prompt = prefix[: random.randrange(1, 25)] + [
                random.randrange(50) for _ in range(random.randrange(3))
            ]
            room = hello.max_model_len - len(prompt)
            submit = Submit(
                *(len(want), np.array(prompt, "<i4"), random.randrange(1, room + 1), random.randrange(3)),
                *(sampling(random.randrange(3)), random.choice([(), (7,), (7, 9)])),
            )
            owner = len(want)
            want[owner] = expected_tokens(
                prompt,
                submit.sampling,
                submit.max_tokens,
                min_tokens=submit.min_tokens,
                stop_ids=submit.stop_ids,
                model=model,
            )
            got[owner] = []
            live[owner] = Sequence.of(owner, submit)
            scheduler.add(live[owner])
        if live and random.random() < 0.05:
            owner = random.choice(list(live))
            scheduler.withdraw(live.pop(owner))
            want[owner] = None
        plan = scheduler.schedule() if len(flying) < 3 else None
        if plan is not None:
            flying.append(Plan.decode(plan.encode()))
        if flying and (plan is None or random.random() < 0.4):
            outcome = scheduler.apply(table.execute(flying.popleft()))
            for owner, token in zip(outcome.owners.tolist(), outcome.tokens.tolist(), strict=True):
                assert want[owner] is not None
                got[owner].append(token)
            for sequence, end in outcome.ended:
                assert Expected(got[sequence.owner], end) == want[sequence.owner]
                del live[sequence.owner]
        check_integrity(scheduler)
    for owner, sampled in got.items():
        expected = want[owner]
        assert expected is None or sampled == expected.tokens[: len(sampled)]
    assert sum(map(len, got.values())) > 50


# ---- plans that no core may send --------------------------------------------------------------------------


def admission(slot, cached=0, max_length=12, mode=Mode.AUTO):
    return np.array([(slot, mode, 0, cached, max_length, 0, (1, 1, 1, 0, 0))], ADMISSION)


def chunk(slot, start, count, last=1):
    return {
        "chunks": np.array([(slot, last, start, count)], CHUNK),
        "chunk_tokens": np.arange(count, dtype="<i4"),
    }


def appends(slot, *blocks):
    return np.array([(slot, block) for block in blocks], APPEND)


def plan(table, **fields):
    step = table.step
    fields = {"row_bound": 4, "bucket": 4, **fields}
    return Plan(step + 1, step, table._hashes[step], **fields)


@pytest.fixture
def table():
    """Slot 0 decodes, length 6, blocks 0 and 1; slot 1 has a prompt half computed in blocks 2 and 3."""
    table = SlotTable(HELLO, FakeModel(50))
    table.execute(plan(table, admissions=admission(0), appends=appends(0, 0, 1), **chunk(0, 0, 6)))
    table.execute(plan(table, admissions=admission(1), appends=appends(1, 2, 3), **chunk(1, 0, 5, last=0)))
    assert table.length.tolist() == [7, 5, 0, 0]
    return table


def test_the_fixture_goes_on(table):
    result = table.execute(plan(table, **chunk(1, 5, 2)))
    assert (result.tokens[:2] >= 0).all() and (result.tokens[2:] < 0).all()


WRONG = {
    "step": lambda t: replace(plan(t), step=9),
    "state hash": lambda t: replace(plan(t), state_hash=1),
    "row bound": lambda t: plan(t, row_bound=1),
    "decode in a bucket": lambda t: plan(t, bucket=0),
    "row_multiple": lambda t: plan(t, row_bound=4, bucket=5),
    "released though free": lambda t: plan(t, releases=np.array([2], RELEASE)),
    "admitted though in use": lambda t: plan(t, admissions=admission(0)),
    "part of a block": lambda t: plan(t, admissions=admission(2, cached=2)),
    "impossible": lambda t: plan(t, admissions=admission(2, max_length=41)),
    "no block": lambda t: plan(t, admissions=admission(2)),
    "another slot uses it": lambda t: plan(t, appends=appends(0, 2)),
    "which is free": lambda t: plan(t, appends=appends(2, 9)),
    "not full": lambda t: plan(t, admissions=admission(2, cached=4), appends=appends(2, 1, 9)),
    "does not continue": lambda t: plan(t, admissions=admission(2, cached=8), appends=appends(2, 0, 2, 9)),
    "length 5": lambda t: plan(t, **chunk(1, 4, 2)),
    "chunk at 4, length 5": lambda t: plan(t, **chunk(1, 4, 1)),  # none of it was cached at its admission
    "does not prefill": lambda t: plan(t, **chunk(0, 7, 2)),
    "fills max_length": lambda t: plan(t, appends=appends(1, 4), **chunk(1, 5, 7)),
    "beyond the vocabulary": lambda t: plan(
        t, **{**chunk(1, 5, 2), "chunk_tokens": np.array([1, 50], "<i4")}
    ),
    "beyond the blocks": lambda t: plan(t, **chunk(1, 5, 5)),
    "a step holds": lambda t: plan(
        t, admissions=admission(2, max_length=40), appends=appends(2, 5, 6, 7, 8), **chunk(2, 0, 16)
    ),
    "not held": lambda t: plan(t, held=np.array([0], HELD)),
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_plans_are_refused(table, words):
    with pytest.raises(ContractError, match=words):
        table.execute(WRONG[words](table))


def test_a_missing_block_is_noticed_when_it_is_needed(table):
    table.execute(plan(table))  # length 8: both blocks full
    with pytest.raises(ContractError, match="beyond the blocks"):
        table.execute(plan(table))


def test_a_shared_block_is_not_written(table):
    """Whoever shares a block only reads it."""
    table.execute(plan(table, admissions=admission(2, cached=4), appends=appends(2, 0, 9), **chunk(2, 4, 2)))
    table.length[2] = 3  # as if it were about to write into the shared block
    with pytest.raises(ContractError, match="not its own"):
        table.execute(plan(table, appends=appends(0, 10)))


def known(slot, start, count=1, last=1, token=3, blocks=(0,)):
    """Columns that admit a slot with 4 cached positions and give it a chunk of one token over again."""
    fields = chunk(slot, start, count, last)
    fields["chunk_tokens"] = np.arange(token, token + count, dtype="<i4")
    return fields | {"admissions": admission(slot, cached=4), "appends": appends(slot, *blocks)}


def test_a_prompt_cached_whole_is_sampled_from_and_not_written(table):
    """Another slot reads its block. Its token is that of a prompt that was computed; it goes on in a block of
    its own."""
    tokens, chains = table.kv.tokens.copy(), table.kv.chains.copy()
    result = table.execute(plan(table, **known(2, 3)))
    want = expected_tokens([0, 1, 2, 3], sampling(1), 3, model=FakeModel(50)).tokens
    assert table.length[2] == 4 and table.kv.users[0] == 2
    assert (table.kv.tokens[0] == tokens[0]).all() and (table.kv.chains[0] == chains[0]).all()
    assert result.tokens[2] == want[0]
    result = table.execute(plan(table, appends=np.array([(2, 9), (0, 10)], APPEND)))
    assert result.tokens[2] == want[1]
    with pytest.raises(ContractError, match="does not prefill"):
        table.execute(plan(table, **chunk(2, 4, 1)))


WRONGLY_KNOWN: dict[str, Any] = {
    "not what its chunk says": {"start": 3, "token": 2},
    "chunk at 3, length 4": {"start": 3, "last": 0},
    "chunk at 2, length 4": {"start": 2, "count": 2},
    "chunk at 3, length 4 ": {"start": 3, "count": 2, "blocks": (0, 9)},
    "no block to write": {"start": 4},
    "no block to write ": {"start": 3, "blocks": ()},
    "not full": {"start": 3, "blocks": (1,)},
}


@pytest.mark.parametrize("words", WRONGLY_KNOWN)
def test_a_prompt_cached_whole_has_one_chunk_of_one_token(table, words):
    with pytest.raises(ContractError, match=words.strip()):
        table.execute(plan(table, **known(2, **WRONGLY_KNOWN[words])))


def test_no_position_is_computed_again_once_a_chunk_went_beyond(table):
    fields = known(2, 4, last=0, blocks=(0, 9))
    table.execute(plan(table, **fields))
    with pytest.raises(ContractError, match="chunk at 3, length 5"):
        table.execute(plan(table, **chunk(2, 3, 1)))


def test_a_wrong_prefix_changes_the_tokens():
    """The same request after two different cached blocks."""
    first = []
    for start in (0, 1):
        table = SlotTable(HELLO, FakeModel(1 << 30))
        fields = chunk(0, 0, 5)
        fields["chunk_tokens"] = fields["chunk_tokens"] + start
        table.execute(plan(table, admissions=admission(0), appends=appends(0, 0, 1), **fields))
        result = table.execute(
            plan(table, admissions=admission(1, cached=4), appends=appends(1, 0, 9), **chunk(1, 4, 2))
        )
        first.append(int(result.tokens[1]))
    assert first[0] != first[1]


def test_unconfirmed_ends_are_forgiven_and_no_others(table):
    while table.occupancy[0]:
        need = table.length[0] == table.block_count[0] * 4
        table.execute(plan(table, appends=appends(0, 10) if need else appends(0)))
    step = table.step
    unaware = {"applied": step - 1, "state_hash": table._hashes[step - 1]}
    with pytest.raises(ContractError, match="cannot know"):
        table.execute(replace(plan(table, admissions=admission(0), appends=appends(0, 0)), **unaware))
    table.step = step
    table.execute(replace(plan(table, appends=appends(0, 11)), **unaware))
    with pytest.raises(ContractError, match="which is free"):
        table.execute(plan(table, appends=appends(0, 11)))


def test_held_slots_advance_when_named_under_their_mask():
    table = SlotTable(HELLO, FakeModel(50))
    table.execute(
        plan(table, admissions=admission(0, mode=Mode.HELD), appends=appends(0, 0, 1), **chunk(0, 0, 2))
    )
    table.execute(plan(table))
    assert table.length[0] == 2
    mask = np.zeros((1, 2), "<u4")
    mask[0, 1] = 1 << 7  # token 39 only
    result = table.execute(plan(table, held=np.array([0], HELD), masks=mask))
    assert result.tokens[0] == 39 and table.length[0] == 3
