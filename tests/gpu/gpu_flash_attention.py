"""The flash_attn backend over the real package, where it is installed."""

import itertools

import pytest
import torch

from gpu_worker.attention import AttentionShape
from tests.gpu.drive import Driver
from tests.gpu.gpu_demo_answers import cases, check  # noqa: F401

pytest.importorskip("flash_attn", reason="the package flash-attn is not installed")


@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 8), (2, 2), (32, 4), (6, 2)])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_layer_beside_triton(heads, kv_heads, head_dim):
    from tests.support.beside_triton import check as check_layer

    check_layer(AttentionShape(heads, kv_heads, head_dim, 256), torch.device("cuda"))


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
def test_answers(demo_runner, cases, enforce_eager):  # noqa: F811
    """Some alone, 256 at once, again with their prefixes cached, and preempted, word for word."""
    options = {"attention_backend": "flash_attn", "max_model_len": 512}
    if enforce_eager:
        options["enforce_eager"] = True
    driver = Driver(demo_runner(max_num_seqs=256, **options))
    for case in cases[::12]:
        check(driver, [case])
    many = list(itertools.islice(itertools.cycle(cases), 256))
    for _ in range(2):
        check(driver, many)
    driver = Driver(demo_runner(max_num_seqs=8, max_num_batched_tokens=24, **options))
    check(driver, cases[::2])
