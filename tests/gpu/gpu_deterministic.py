"""`--deterministic`: a request's tokens alone, and beside any others."""

import random

import pytest

from tests.gpu.drive import Driver, Request, make_runner
from tests.support.random_checkpoints import Shape, write_checkpoint

# Random weights over a large vocabulary: the best tokens are close together, so that rounding shows.
SHAPE = Shape(
    vocab_size=20000,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=128,
    max_position_embeddings=4096,
    std=0.02,
)


def requests(draw: random.Random) -> list[Request]:
    """Greedy and sampled, of lengths that differ; some begin alike, some are alike and fill whole blocks."""
    common = [draw.randrange(20000) for _ in range(300)]
    made = []
    for number in range(48):
        own = [draw.randrange(20000) for _ in range(draw.choice([1, 7, 64, 200, 700]))]
        temperature = draw.choice([0.0, 0.8])
        prompt = common + own if number % 3 == 0 else common[:256] if number % 8 == 1 else own
        made.append(Request(prompt, draw.randrange(20, 80), temperature, seed=draw.getrandbits(60)))
    return made


@pytest.mark.parametrize("block_size", [16, 64])
def test_alone_and_in_any_batch(tmp_path, draw, block_size):
    folder = write_checkpoint(tmp_path / "model", SHAPE, with_tokenizer=False)
    work = requests(draw)
    runner = make_runner(folder, deterministic=True, max_num_seqs=64, kvcache_block_size=block_size)
    alone = []
    for request in work:
        run = Driver(runner).run([request])
        assert not run.cached
        alone += run.tokens
    for batch in (64, 5):
        order = draw.sample(range(len(work)), len(work))
        runner = make_runner(
            folder,
            deterministic=True,
            max_num_seqs=batch,
            max_num_batched_tokens=128,
            kvcache_block_size=block_size,
        )
        run = Driver(runner).run([work[i] for i in order])
        assert not run.preemptions and run.cached
        for i, tokens in zip(order, run.tokens, strict=True):
            assert tokens == alone[i], (batch, i)
