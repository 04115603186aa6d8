"""Prompts that are cached whole: one position is computed, and not written."""

import numpy as np
import pytest
import torch

from baton_wire.plan import APPEND, CHUNK
from gpu_worker.errors import PlanError
from tests.support.demo import DEMO_MODEL
from tests.worker import drive

BLOCK = 16
PROMPT = [(7 * i + i * i) % 200 for i in range(3 * BLOCK)]
OPTIONS = {"max_num_seqs": 4, "num_kvcache_blocks": 40}


@pytest.fixture(scope="module")
def loaded():
    return drive.load(DEMO_MODEL)


@pytest.fixture
def hand(loaded):
    """Slot 0 decodes: the prompt is in blocks 0 to 2, its answer goes on in block 3."""
    hand = drive.Hand(drive.runner(loaded, **OPTIONS))
    hand.admit(0, drive.Request(PROMPT, 20, drive.sampling(seed=1)))
    hand.bound = 4
    return hand


def test_answers_are_those_of_prompts_that_are_computed(loaded):
    """Greedy and sampled, beside the sequence that computed the prompt, with the same bits of every logit."""
    made = drive.runner(loaded, **OPTIONS)
    works = [
        drive.Request(prompt, 20, drive.sampling(temperature, seed=seed))
        for seed, (prompt, temperature) in enumerate(
            [([*PROMPT, 5, 6], 0), (PROMPT, 0), (PROMPT[:BLOCK], 0.9), (PROMPT[: 2 * BLOCK], 0.9)]
        )
    ]
    alone = [drive.generate(made, [request]).tokens[0] for request in works]
    run = drive.generate(made, works, depth=3, stagger=4)
    assert run.known == 3
    assert run.tokens == alone  # the runner has compared the logits


def test_what_is_cached_is_read_and_stays_as_it_is(hand):
    """The last position's keys and values are others than would be computed, so that a write would show."""
    cache, shared = hand.runner.cache, [0, 1, 2]
    request = drive.Request(PROMPT, 20, drive.sampling(seed=2))
    first = hand.plan(**drive.known(1, shared, request))
    with torch.inference_mode():
        cache[:, 2, :, :, -1] = cache[:, 2, :, :, -1].neg() + 1
    before = cache.clone()
    hand.runner.digests.clear()
    second = hand.plan(**drive.known(2, shared, request), releases=np.array([1], np.uint16))
    assert torch.equal(cache[:, shared], before[:, shared])
    assert not cache[:, -1].any(), "the null block is zeros"
    assert second.tokens[0] >= 0, "slot 0 decodes from these blocks meanwhile"
    assert (first.tokens[1] >= 0, second.tokens[2] >= 0) == (True, True)
    append = np.array([(2, 20)], APPEND)
    hand.plan(appends=append)
    assert torch.equal(cache[:, shared], before[:, shared])
    assert cache[:, 20, :, :, 0].any() and not cache[:, 20, :, :, 1:].any()


def test_what_the_last_position_reads_of_itself_is_what_is_cached(hand):
    logits = []
    own = hand.runner._logits

    def note(step, hidden):
        logits.append(own(step, hidden))
        return logits[-1]

    hand.runner._logits = note
    for slot in (1, 2):
        hand.runner.digests.clear()
        request = drive.Request(PROMPT, 20, drive.sampling(seed=2))
        hand.plan(**drive.known(slot, [0, 1, 2], request))
        with torch.inference_mode():
            hand.runner.cache[:, 2, :, :, -1] += 1
    assert not torch.equal(logits[0][-1], logits[1][-1])


def test_what_is_not_finite_there_ends_this_request_alone(hand):
    """Nothing of it is written, the null block least of all."""
    request = drive.Request(PROMPT, 20, drive.sampling(seed=2))
    drive.poison(hand.runner, 2)
    hand.plan(releases=np.array([0], np.uint16))
    result = hand.plan(**drive.known(1, [0, 1, 2], request))
    assert result.ends["slot"].tolist() == [1] and result.tokens[1] == -1
    assert not hand.runner.cache[:, -1].any()


@pytest.mark.parametrize(
    ("chunk", "says"),
    [
        ({"last": 0}, "chunk of 1 at 47, slot 1: 48 positions are cached"),
        ({"count": 2}, "chunk of 2 at 47, slot 1: 48 positions are cached"),
        ({"start": 46}, "chunk of 1 at 46, slot 1: 48 positions are cached"),
        ({"start": 46, "count": 2}, "chunk of 2 at 46, slot 1: 48 positions are cached"),
        ({"start": 0, "count": 48}, "chunk of 48 at 0, slot 1: 48 positions are cached"),
    ],
)
def test_only_the_last_position_is_computed_again(hand, chunk, says):
    request = drive.Request(PROMPT, 20)
    with pytest.raises(PlanError, match=says):
        hand.plan(**drive.known(1, [0, 1, 2], request, **chunk))


@pytest.mark.parametrize("last", [0, 1])
def test_and_only_by_the_first_chunk(hand, last):
    """Neither of a slot that went beyond, nor of one that decodes."""
    request = drive.Request(PROMPT, 20)
    hand.plan(**drive.known(1, [0, 1, 2, 20], request, start=48, last=last))
    again = {"chunks": np.array([(1, 1, 47, 1)], CHUNK), "chunk_tokens": np.zeros(1, np.int32)}
    with pytest.raises(PlanError, match=f"chunk at 47 for slot 1: {('PREFILL', 'DECODE')[last]} at 49"):
        hand.plan(**again)


def test_a_slot_that_computed_its_prompt_has_no_such_position(hand):
    """Its length at admission was 0."""
    again = {"chunks": np.array([(0, 1, 47, 1)], CHUNK), "chunk_tokens": np.zeros(1, np.int32)}
    with pytest.raises(PlanError, match="chunk at 47 for slot 0: DECODE at 48"):
        hand.plan(**again)
