"""The flash_attn backend over a fake of that package which obeys its documentation, kernels interpreted."""

import sys
from dataclasses import replace

import pytest
import torch

from baton_kernels import reference
from gpu_worker.attention import AttentionShape
from gpu_worker.cuda.runner import CudaRunner
from tests.support import fake_flash_attn
from tests.support.random_checkpoints import Shape, write_checkpoint
from tests.worker import drive
from tests.worker.interpreted.check_cuda_runner import Both, device  # noqa: F401

BLOCK = 256
OPTIONS = {"max_num_seqs": 3, "num_kvcache_blocks": 4, "max_num_batched_tokens": 24, "kvcache_block_size": 16}


@pytest.fixture(autouse=True)
def package(monkeypatch):
    """The fake in place of the package, which the backend imports, and what imports the backend."""
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn)
    return fake_flash_attn


def numbers(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_the_fake_aligns_chunks_to_their_last_key(package):
    """The masks of the documentation: rows that see the first n keys average the first n values."""
    values = torch.arange(256.0).view(1, 256, 1, 1).expand(1, 256, 1, 8).to(torch.float16).contiguous()
    keys, q = torch.zeros_like(values), torch.zeros(5, 1, 8, dtype=torch.float16)
    table = torch.zeros(1, 1, dtype=torch.int32)
    for rows, seen, means in ((2, 5, [1.5, 2]), (5, 2, [0, 0, 0, 0, 0.5])):
        ends = (numbers(0, rows), numbers(0, seen), 5, 256)
        out = package.flash_attn_varlen_func(
            q, keys, values, *ends, causal=True, softmax_scale=1.0, block_table=table
        )
        assert out[:rows, 0, 0].tolist() == means
        assert out[rows:].isnan().all()


@pytest.mark.parametrize("group", [1, 3])
def test_a_layer_beside_triton(group):
    from tests.support.beside_triton import check

    check(AttentionShape(2 * group, 2, 16, BLOCK), torch.device("cpu"))


def test_decode_and_prompt_rows_together():
    from tests.support.beside_triton import check_together

    check_together(AttentionShape(4, 2, 16, BLOCK), torch.device("cpu"))


def flash_runner(loaded, limits):
    from gpu_worker.attention.flash_backend import FlashAttention

    c = loaded.config
    shape = AttentionShape(c.heads, c.kv_heads, c.head_dim, limits.block_size)
    attention = FlashAttention(shape, loaded.dtype, torch.device("cpu"))
    rotary = reference.rotary_table(limits.max_model_len, c.head_dim, c.rope_theta)
    cache = attention.cache(c.layers, limits.num_blocks).fill_(torch.nan)
    made = CudaRunner(loaded.model, attention, cache, rotary, limits, vocabulary=c.vocab_size)
    made.prepare(graphs=False)
    made.reset()
    return made


def test_requests_beside_the_cpu(tmp_path, package, monkeypatch):
    """Chunked prompts, decodes beside them, prefix hits, preemption, beside the CPU runner: same tokens.

    In float32, for in two bytes the two round differently, and in small blocks, which take few tokens: both
    the fake is told to take here alone.
    """
    monkeypatch.setattr(package, "DTYPES", {torch.float32})
    monkeypatch.setattr(package, "PAGE_MULTIPLE", 16)
    folder = write_checkpoint(tmp_path / "model", Shape(num_hidden_layers=1), with_tokenizer=False)
    loaded = drive.load_folded(folder)
    host = drive.runner(loaded, **OPTIONS)
    both = Both((flash_runner(loaded, replace(host.limits, row_multiple=1)), host))
    work = [
        drive.Request(
            [(7 * i + j * j) % 300 for j in range(length)],
            max_tokens=13,
            sampling=drive.sampling(temperature=0.7 * (i % 2), seed=i),
        )
        for i, length in enumerate((20, 30, 5))
    ]
    again = [*work[1].prompt, 1, 2]  # the prefix is cached by then …
    work.append(drive.Request(again, max_tokens=3, sampling=drive.sampling(seed=9)))
    work.append(drive.Request(again[:16], 3, drive.sampling(seed=10)))  # … and all of this one's
    run = drive.generate(both, work)
    assert all(end is not None for end in run.ends)
    assert run.preemptions and run.cached and run.known and max(both.prompts) > 1
