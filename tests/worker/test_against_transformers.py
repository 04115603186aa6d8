"""Greedy tokens against transformers, float32 on CPU, over random configurations."""

import random

import pytest
import torch

from tests.support.random_checkpoints import Shape, write_checkpoint
from tests.worker import drive

TOLERANCE = 1e-4  # between two reference logits where the tokens differ


def random_shape(seed: int) -> Shape:
    draw = random.Random(seed)
    kv_heads = draw.choice([1, 2, 3, 4])
    return Shape(
        vocab_size=draw.randrange(60, 700),
        hidden_size=8 * draw.randrange(3, 20),
        intermediate_size=4 * draw.randrange(8, 60),
        num_hidden_layers=draw.choice([1, 2, 3]),
        num_attention_heads=kv_heads * [1, 2, 4, 8, 3, 6][seed % 6],
        num_key_value_heads=kv_heads,
        head_dim=draw.choice([8, 16, 24, 32, 64, 128]),
        max_position_embeddings=512,
        tie_word_embeddings=seed % 2 == 0,
        attention_bias=seed % 5 == 0,
        rms_norm_eps=draw.choice([1e-5, 1e-6]),
        rope_theta=draw.choice([10000.0, 1e6]),
        seed=seed,
        dtype=torch.bfloat16 if seed % 4 == 1 else torch.float32,
        shards=1 + seed % 3,
        rope_parameters=seed % 3 == 0,
    )


def reference_logits(folder, sequence: list[int]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([sequence])).logits[0]
    return logits


@pytest.mark.parametrize(
    ("seed", "load"),
    [(s, drive.load) for s in range(24)] + [(s, drive.load_folded) for s in (2, 3, 4, 6, 7, 8)],
)
def test_greedy_tokens_are_those_of_transformers(seed, load, tmp_path):
    shape = random_shape(seed)
    folder = write_checkpoint(tmp_path / "model", shape, with_tokenizer=False)
    made = drive.runner(load(folder), max_num_seqs=4, max_num_batched_tokens=48, num_kvcache_blocks=64)
    draw = random.Random(seed)
    prompts = [[draw.randrange(shape.vocab_size) for _ in range(n)] for n in (1, 11, 150)]
    run = drive.generate(made, [drive.Request(p, 20, drive.sampling(seed=i)) for i, p in enumerate(prompts)])
    for prompt, tokens in zip(prompts, run.tokens, strict=True):
        assert len(tokens) == 20
        logits = reference_logits(folder, prompt + tokens)[len(prompt) - 1 : -1]
        for row, token in zip(logits, tokens, strict=True):
            if int(row.argmax()) != token:
                assert float(row.max() - row[token]) < TOLERANCE
                break  # from here on the two have read different texts
