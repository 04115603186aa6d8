"""Greedy tokens against transformers in float32, over random Qwen3 shapes in bfloat16.

Where the two choose another token, the reference's lead over ours has to be within what bfloat16's rounding
makes of the logits: TOLERANCE of the row's spread.
"""

import random

import pytest
import torch

from tests.gpu.drive import Driver, Request, make_runner
from tests.support.random_checkpoints import Shape, write_checkpoint

TOLERANCE = 0.2  # of the standard deviation of a row's logits


def shape_of(seed: int) -> Shape:
    draw = random.Random(seed)
    kv_heads = draw.choice([1, 2, 4])
    return Shape(
        vocab_size=draw.randrange(300, 5000),
        hidden_size=8 * draw.randrange(8, 40),
        intermediate_size=8 * draw.randrange(8, 60),
        num_hidden_layers=draw.choice([1, 2, 3]),
        num_attention_heads=kv_heads * [1, 2, 4, 8, 3, 6][seed % 6],
        num_key_value_heads=kv_heads,
        head_dim=[64, 128, 32, 256][seed % 4],
        max_position_embeddings=1024,
        tie_word_embeddings=seed % 2 == 0,
        rms_norm_eps=1e-6,
        rope_theta=draw.choice([10000.0, 1e6]),
        seed=seed,
        dtype=torch.bfloat16,
    )


@pytest.mark.parametrize("seed", range(4))
def test_greedy_tokens(seed, tmp_path):
    from transformers import AutoModelForCausalLM

    shape = shape_of(seed)
    folder = write_checkpoint(tmp_path / "model", shape, with_tokenizer=False)
    options = {"enforce_eager": True} if seed % 3 == 0 else {}
    runner = make_runner(
        folder, max_num_seqs=12, max_num_batched_tokens=96, kvcache_block_size=16 << seed % 3, **options
    )
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    reference = reference.cuda().eval()
    torch.backends.cuda.matmul.allow_tf32 = False
    draw = random.Random(seed)
    common = [draw.randrange(shape.vocab_size) for _ in range(70)]  # later prompts find it in the cache
    lengths = (1, 2, 17, 63, 150, 333, 3, 90, 64)
    prompts = [[draw.randrange(shape.vocab_size) for _ in range(n)] for n in lengths]
    driver, same, rows = Driver(runner), 0, 0
    for batch in ([*prompts[:1]], prompts, [common + p[:40] for p in prompts], [[*common, 7, seed]]):
        run = driver.run([Request(prompt, 24) for prompt in batch])
        for prompt, tokens in zip(batch, run.tokens, strict=True):
            assert len(tokens) == 24
            with torch.inference_mode():
                text = torch.tensor([prompt + tokens], device="cuda")
                logits = reference(text).logits[0, len(prompt) - 1 : -1]
            for row, token in zip(logits, tokens, strict=True):
                rows += 1
                same += int(row.argmax()) == token
                assert float((row.max() - row[token]) / row.std()) < TOLERANCE
                # where the choice is clear, it has to be ours as well
                lead = row.topk(2).values
                if float((lead[0] - lead[1]) / row.std()) > TOLERANCE:
                    assert int(row.argmax()) == token
    print(f"{same} of {rows} tokens are the reference's choice")
    assert same > 0.9 * rows
