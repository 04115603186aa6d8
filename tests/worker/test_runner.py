"""Single steps by hand-made plans: what a slot does, and what a result says."""

import numpy as np
import pytest
import torch

from baton_wire.plan import ADMISSION, APPEND, CHUNK, MAX_STOP_IDS, Mode, Plan
from baton_wire.result import NO_TOKEN, End
from baton_wire.state import Occupancy, state_hash
from gpu_worker.errors import PlanError
from gpu_worker.runner import Runner
from tests.support.random_checkpoints import Shape, write_checkpoint
from tests.worker import drive

VOCABULARY = 320


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return drive.load(write_checkpoint(tmp_path_factory.mktemp("model"), Shape(), with_tokenizer=False))


@pytest.fixture
def made(loaded):
    return drive.runner(loaded, max_num_seqs=6, num_kvcache_blocks=64, max_num_batched_tokens=100)


@pytest.fixture
def hand(made):
    return drive.Hand(made)


def greedy(n, max_tokens=20, **more):
    return drive.Request(list(range(n, 2 * n)), max_tokens, drive.sampling(seed=n), **more)


def text(hand, request, slot=0):
    """All tokens of a request that is alone, and why it ended."""
    result = hand.admit(slot, request)
    tokens = [int(result.tokens[slot])]
    while not len(result.ends):
        result = hand.plan()
        tokens.append(int(result.tokens[slot]))
    assert result.ends["slot"].tolist() == [slot]
    return tokens, End(result.ends["reason"][0])


def test_a_result_has_a_token_for_every_row_that_moved(hand):
    first = hand.admit(0, greedy(5))
    assert first.step == 1
    assert len(first.tokens) == 1
    second = hand.admit(3, greedy(9))
    assert (second.tokens != NO_TOKEN).tolist() == [True, False, False, True]
    assert 0 <= second.tokens.max() < VOCABULARY
    assert second.exec_us > 0


def test_stop_ids_beyond_the_vocabulary_never_match(hand):
    """Checkpoints cut from larger ones name ids that they do not have; one such request ended the worker."""
    beyond = (VOCABULARY, VOCABULARY + 3, 2**31 - 1)
    tokens, end = text(hand, greedy(5, 8, min_tokens=4, stop_ids=beyond))
    assert (len(tokens), end) == (8, End.LENGTH)


def test_a_chunk_that_is_not_the_last_samples_nothing(hand):
    admission = np.zeros(1, ADMISSION)
    admission["max_length"] = 60
    hand.bound = 1
    appends = np.array([(0, b) for b in range(4)], APPEND)
    chunk = np.array([(0, 0, 0, 7)], CHUNK)
    result = hand.plan(
        admissions=admission, appends=appends, chunks=chunk, chunk_tokens=np.arange(7, dtype=np.int32)
    )
    assert result.tokens.tolist() == [NO_TOKEN]
    slots = hand.runner.slots
    assert slots.occupancy[0] == Occupancy.PREFILL
    assert slots.length[0] == 7
    result = hand.plan(chunks=np.array([(0, 1, 7, 1)], CHUNK), chunk_tokens=np.array([9], np.int32))
    assert result.tokens[0] != NO_TOKEN
    assert slots.occupancy[0] == Occupancy.DECODE


def test_the_hash_is_that_of_the_table(hand):
    for slot, n in ((4, 5), (1, 40), (2, 3)):
        hand.admit(slot, greedy(n, max_tokens=2 if slot == 2 else 20))
    hand.bound = 6
    result = hand.plan()
    assert result.ends.tolist() == [(2, End.LENGTH)]
    slots = hand.runner.slots
    rows = np.array([1, 4])
    columns = (slots.admitted, slots.length, slots.occupancy, slots.last_token)
    assert slots.length[rows].tolist() == [42, 8]
    assert slots.admitted[rows].tolist() == [2, 1]
    assert slots.last_token[rows].tolist() == result.tokens[rows].tolist()
    assert result.state_hash == state_hash(rows, *(column.numpy()[rows] for column in columns))


@pytest.mark.parametrize("max_tokens", [1, 2, 17])
def test_length_ends_a_slot(hand, max_tokens):
    tokens, end = text(hand, greedy(6, max_tokens))
    assert len(tokens) == max_tokens
    assert end == End.LENGTH
    assert hand.plan().tokens.tolist() == [NO_TOKEN]


def test_a_stop_id_ends_a_slot_and_is_its_last_token(hand):
    tokens, _ = text(hand, greedy(6, 17))
    stop = tokens[5]
    stopped, end = text(hand, greedy(6, 17, stop_ids=(*range(300, 315), stop)))
    assert stopped == tokens[: tokens.index(stop) + 1]
    assert end == End.STOP


def test_a_stop_id_at_the_length_limit_is_a_stop(hand):
    tokens, _ = text(hand, greedy(6, 3))
    _, end = text(hand, greedy(6, 3, stop_ids=(tokens[-1],)))
    assert end == End.STOP


def test_stop_ids_wait_for_min_tokens(hand):
    tokens, _ = text(hand, greedy(6, 17))
    stops = (tokens[0], tokens[1])
    request = drive.Request(list(range(6, 12)), 17, drive.sampling(seed=99), stops, min_tokens=9)
    held_back, _ = text(hand, request)
    assert len(held_back) >= 9
    assert not {tokens[0], tokens[1]} & set(held_back[:9])
    assert held_back[0] != tokens[0]


def test_stop_ids_of_one_admission_do_not_stay_for_the_next(hand):
    tokens, _ = text(hand, greedy(6, 17))
    text(hand, greedy(8, 4, stop_ids=tuple(range(MAX_STOP_IDS))))
    assert text(hand, greedy(6, 17)) == (tokens, End.LENGTH)


def test_released_in_the_plan_that_admits_anew(hand):
    tokens, _ = text(hand, greedy(6, 4))
    hand.admit(0, greedy(30, 20))
    hand.plan()
    result = hand.admit(0, greedy(6, 4), releases=np.array([0], np.uint16))
    assert [int(result.tokens[0]), *(int(hand.plan().tokens[0]) for _ in range(3))] == tokens


def mask(*allowed):
    words = np.zeros((1, -(-VOCABULARY // 32)), np.uint32)
    for token in allowed:
        words[0, token // 32] |= 1 << token % 32
    return words


def test_a_held_slot_moves_when_named_and_under_its_mask(hand):
    held = np.array([1], np.uint16)
    hand.admit(0, greedy(6))
    first = hand.admit(1, greedy(7), mode=Mode.HELD, held=held, masks=mask(33, 319))
    assert first.tokens[1] in (33, 319)
    rest = hand.plan()
    assert rest.tokens[0] != NO_TOKEN
    assert rest.tokens[1] == NO_TOKEN
    length = int(hand.runner.slots.length[1])
    for allowed in ((5,), (64, 65), (0, 31, 32)):
        assert hand.plan(held=held, masks=mask(*allowed)).tokens[1] in allowed
    assert hand.runner.slots.length[1] == length + 3


def test_a_mask_that_allows_all_changes_nothing(hand):
    tokens, _ = text(hand, greedy(7, 5))
    everything = mask(*range(VOCABULARY))
    held = np.array([0], np.uint16)
    got = [hand.admit(0, greedy(7, 5), mode=Mode.HELD, held=held, masks=everything).tokens[0]]
    got += [hand.plan(held=held, masks=everything).tokens[0] for _ in range(4)]
    assert got == tokens


def test_a_mask_that_allows_nothing_is_a_numerical_end(hand):
    held = np.array([1], np.uint16)
    hand.admit(0, greedy(6))
    result = hand.admit(1, greedy(7), mode=Mode.HELD, held=held, masks=mask())
    assert result.ends.tolist() == [(1, End.NUMERICAL)]
    assert result.tokens[1] == NO_TOKEN
    assert result.tokens[0] != NO_TOKEN


@pytest.mark.parametrize(
    "sampling", [drive.sampling(), drive.sampling(temperature=1.0, seed=4)], ids=["0", "1"]
)
def test_broken_numbers_end_one_slot_only(hand, sampling):
    neighbour = greedy(20, 12)
    tokens, _ = text(hand, neighbour)
    hand.admit(0, neighbour)
    hand.admit(1, drive.Request(list(range(40)), 12, sampling))
    drive.poison(hand.runner, int(hand.runner.slots.block_table[1, 0]))
    result = hand.plan()
    assert result.ends.tolist() == [(1, End.NUMERICAL)]
    assert result.tokens[1] == NO_TOKEN
    assert result.tokens[0] == tokens[2]
    after = [int(hand.plan().tokens[0]) for _ in range(9)]
    assert after == tokens[3:]


def test_what_a_broken_owner_left_in_a_block_is_not_felt(hand):
    tokens, _ = text(hand, greedy(20, 30))
    drive.poison(hand.runner, *range(64))
    assert text(hand, greedy(20, 30))[0] == tokens


def test_cached_blocks_are_used_as_they_are(hand):
    request = greedy(40, 6)
    tokens, _ = text(hand, request)
    blocks = hand.runner.slots.block_table[0, :2].tolist()
    admission = np.zeros(1, ADMISSION)
    admission["slot"], admission["cached"], admission["max_length"] = 2, 32, 46
    hand.bound = 3
    result = hand.plan(
        admissions=admission,
        appends=np.array([(2, block) for block in (*blocks, 40)], APPEND),
        chunks=np.array([(2, 1, 32, 8)], CHUNK),
        chunk_tokens=np.array(request.prompt[32:], np.int32),
    )
    assert [int(result.tokens[2]), *(int(hand.plan().tokens[2]) for _ in range(5))] == tokens


def test_other_ranks_acknowledge_without_tokens(loaded, hand):
    made = hand.runner
    other = Runner(made.model, made.attention, made.cache, made.rotary, made.limits, rank=1)
    mine, theirs = hand.admit(0, greedy(5)), drive.Hand(other).admit(0, greedy(5))
    assert theirs.rank == 1
    assert len(theirs.tokens) == 0
    assert theirs.state_hash == mine.state_hash


def test_a_plan_without_work(hand):
    result = hand.plan()
    assert (len(result.tokens), len(result.ends), result.state_hash) == (0, 0, 0)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"releases": np.array([6], np.uint16)}, "release of slot 6"),
        ({"appends": np.array([(0, 64)], APPEND)}, "block 64"),
        ({"appends": np.array([(9, 1)], APPEND)}, "append of slot 9"),
        ({"appends": np.array([(0, 1)] * 33, APPEND)}, "slot 0 gets block"),
        ({"held": np.array([7], np.uint16), "masks": mask()}, "held of slot 7"),
        ({"row_bound": 7, "bucket": 8}, "row bound 7"),
        ({"bucket": 0}, "1 slots decode in a bucket of 0"),
        (
            {"chunks": np.array([(2, 0, 0, 1)], CHUNK), "chunk_tokens": np.zeros(1, np.int32)},
            "chunk at 0 for slot 2: FREE",
        ),
        (
            {"chunks": np.array([(0, 0, 3, 1)], CHUNK), "chunk_tokens": np.zeros(1, np.int32)},
            "chunk at 3 for slot 0: DECODE at 5",
        ),
        (
            {"chunks": np.array([(2, 0, 0, 101)], CHUNK), "chunk_tokens": np.zeros(101, np.int32)},
            "102 rows, at most 100",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_plans_that_cannot_be(made, columns, says):
    hand = drive.Hand(made)
    hand.admit(0, greedy(5))
    with pytest.raises(PlanError, match=says):
        made.execute(Plan(step=2, **({"row_bound": 1, "bucket": 8} | columns)))


def test_reset_frees_every_slot(hand):
    hand.admit(0, greedy(5))
    hand.runner.reset()
    assert hand.plan().tokens.tolist() == [NO_TOKEN]
    assert not torch.count_nonzero(hand.runner.slots.occupancy)


@pytest.mark.parametrize(
    ("blocks", "says"),
    [
        (1, "17 tokens: blocks=1 block_size=16; max_model_len=512 needs blocks=32"),
        (31, "497 tokens: blocks=31 block_size=16; max_model_len=512 needs blocks=32"),
        (32, None),
    ],
)
def test_a_cache_that_is_small_for_the_model_is_said(loaded, caplog, blocks, says):
    drive.runner(loaded, max_num_seqs=6, num_kvcache_blocks=blocks)
    warnings = [record.getMessage() for record in caplog.records if "tokens" in record.getMessage()]
    assert warnings == ([] if says is None else [f"this worker takes no requests of more than {says}"])
