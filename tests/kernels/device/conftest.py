"""Checks of kernels: interpreted on the CPU at small sizes, or on a GPU at full size.

`test_interpreted.py` and `test_on_gpu.py` beside this folder run them, each in a process of its own: whether
kernels are interpreted is settled when they are first imported.
"""

import os
import random

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session")
def device():
    if INTERPRETED:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("neither interpreted nor a GPU")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session")
def full():
    """Whether sizes are those of production."""
    return not INTERPRETED


@pytest.fixture(autouse=True)
def inputs():
    """Fresh random inputs; a failure prints the seed."""
    seed = random.SystemRandom().getrandbits(32)
    print("seed", seed)
    torch.manual_seed(seed)
