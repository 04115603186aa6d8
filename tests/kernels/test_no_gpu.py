"""`make test-gpu` where there is no GPU."""

import subprocess
import sys

import pytest
import torch

from tests.support.processes import ROOT


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_missing_device_is_all_that_is_said():
    command = ["make", "-s", "test-gpu", f"PY={sys.executable}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    (line,) = done.stdout.splitlines()
    assert "no CUDA device" in line
