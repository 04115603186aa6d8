"""The CUDA runner without a device: its checks run in a process where kernels are interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels are Triton's; it is for Linux")

CHECKS = Path(__file__).parent / "interpreted"
OTHERS = "not come_and_go and not described and not flash"
SECONDS = 300  # an interpreted program takes milliseconds, and a step is hundreds of them


@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize(
    "which",
    ["come_and_go and True", "come_and_go and False", "described", "flash", OTHERS],
)
def test_interpreted(which):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-o", "addopts=--import-mode=importlib", "-o", "python_files=check_*.py"]
    command += ["-o", f"timeout={SECONDS}", "-k", which, str(CHECKS)]
    done = subprocess.run(
        command,
        cwd=CHECKS.parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
