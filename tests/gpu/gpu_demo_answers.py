"""The demo model gives its trained answers word for word on the device, whatever the worker's settings."""

import itertools

import pytest

from demo.corpus import load_pairs
from demo.evaluate import Checkpoint
from tests.gpu.drive import Driver, Request
from tests.support.demo import DEMO_MODEL


@pytest.fixture(scope="module")
def cases():
    checkpoint = Checkpoint(DEMO_MODEL)
    ends = tuple(checkpoint.model.generation_config.eos_token_id)
    asked = [(question, pair.answer) for pair in load_pairs() for question in pair.questions]
    return [(checkpoint.chat_case(*entry), ends) for entry in asked]


def check(driver: Driver, cases) -> tuple[int, int]:
    """All answers at once; how many sequences were preempted and prompt tokens found in the cache."""
    requests = [Request(case.prompt_ids, len(case.answer_ids) + 8, stop_ids=ends) for case, ends in cases]
    run = driver.run(requests)
    wrong = [c.name for (c, _), tokens in zip(cases, run.tokens, strict=True) if tokens != c.answer_ids]
    assert not wrong, f"{len(wrong)} of {len(cases)}: {wrong[:3]}"
    return run.preemptions, run.cached


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("block_size", [16, 64])
def test_alone(demo_runner, cases, enforce_eager, block_size):
    options = {"enforce_eager": True} if enforce_eager else {}
    runner = demo_runner(max_num_seqs=256, kvcache_block_size=block_size, max_model_len=512, **options)
    driver = Driver(runner)
    for case in cases[::12] if enforce_eager else cases[::3]:
        check(driver, [case])


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("block_size", [16, 64])
def test_256_at_once_and_again_from_the_prefix_cache(demo_runner, cases, enforce_eager, block_size):
    options = {"enforce_eager": True} if enforce_eager else {}
    runner = demo_runner(max_num_seqs=256, kvcache_block_size=block_size, max_model_len=512, **options)
    driver = Driver(runner)
    many = list(itertools.islice(itertools.cycle(cases), 256))
    check(driver, many)
    _, cached = check(driver, many)
    assert block_size > 16 or cached > 16 * len(many) // 2


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
def test_with_preemption(demo_runner, cases, enforce_eager):
    options = {"enforce_eager": True} if enforce_eager else {}
    runner = demo_runner(
        max_num_seqs=64, kvcache_block_size=16, num_kvcache_blocks=150, max_model_len=512, **options
    )
    preemptions, _ = check(Driver(runner), cases)
    assert preemptions > 0


def test_prompts_in_small_chunks_among_decodes(demo_runner, cases):
    runner = demo_runner(max_num_seqs=8, max_num_batched_tokens=24, kvcache_block_size=16, max_model_len=512)
    check(Driver(runner), cases[::2])
