"""The flash_attn backend over the real package where it is installed, else over its fake, without graphs."""

import importlib.util
import itertools
import sys

import pytest
import torch

from gpu_worker.attention import AttentionShape
from tests.gpu.drive import Driver
from tests.gpu.gpu_demo_answers import cases, check  # noqa: F401
from tests.support import fake_flash_attn

INSTALLED = importlib.util.find_spec("flash_attn") is not None


@pytest.fixture(scope="module", autouse=True)
def package():
    with pytest.MonkeyPatch.context() as patch:
        if not INSTALLED:
            patch.setitem(sys.modules, "flash_attn", fake_flash_attn)
        yield


@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 8), (2, 2), (32, 4), (6, 2)])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_layer_beside_triton(heads, kv_heads, head_dim):
    from tests.support.beside_triton import check as check_layer
    from tests.support.beside_triton import check_together

    shape = AttentionShape(heads, kv_heads, head_dim, 256)
    check_layer(shape, torch.device("cuda"))
    check_together(shape, torch.device("cuda"))


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
def test_answers(demo_runner, cases, enforce_eager):  # noqa: F811
    """Some alone, 256 at once, and in small chunks among decodes, word for word."""
    options = {"attention_backend": "flash_attn", "max_model_len": 512}
    if enforce_eager:
        options["enforce_eager"] = True
    elif not INSTALLED:
        pytest.skip("flash-attn is not installed, and its fake cannot be captured")
    driver = Driver(demo_runner(max_num_seqs=256, **options))
    for case in cases[::12]:
        check(driver, [case])
    check(driver, list(itertools.islice(itertools.cycle(cases), 256)))
    driver = Driver(demo_runner(max_num_seqs=8, max_num_batched_tokens=24, **options))
    check(driver, cases[::2])
