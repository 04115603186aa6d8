"""Tests of the whole worker on a CUDA device, by `make test-gpu`; named gpu_*.py, unseen by `make test`."""

import random

import pytest
import torch

from gpu_worker.cuda.runner import CudaRunner
from tests.gpu.drive import make_runner


def pytest_sessionstart():
    """Before anything else, of the folders beside this too: all skipped would look like a success.

    Only of a run that names this folder: in others pytest finds this file too late to ask it.
    """
    if not torch.cuda.is_available():
        pytest.exit("no CUDA device", returncode=1)


@pytest.fixture
def draw():
    """A fresh source of random inputs; a failure prints its seed."""
    seed = random.SystemRandom().getrandbits(32)
    print("seed", seed)
    return random.Random(seed)


def pytest_addoption(parser):
    parser.addoption(
        "--shared-device",
        action="store_true",
        help="others use the device meanwhile: that run counts this process's memory alone",
    )
    parser.addoption("--soak-s", type=float, default=15.0, help="how long the run takes that watches memory")


@pytest.fixture(scope="module")
def demo_runner():
    """Makes runners of the demo model, each once per module."""
    made: dict[tuple[tuple[str, object], ...], CudaRunner] = {}

    def get(**options: object) -> CudaRunner:
        key = tuple(sorted(options.items()))
        if key not in made:
            made[key] = make_runner(**options)
        made[key].reset()
        return made[key]

    return get
