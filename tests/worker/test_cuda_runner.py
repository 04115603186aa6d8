"""The CUDA runner without a device: its checks run in a process where kernels are interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels are Triton's; it is for Linux")

CHECKS = Path(__file__).parent / "interpreted"


def test_interpreted():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-o", "addopts=--import-mode=importlib", "-o", "python_files=check_*.py", str(CHECKS)]
    done = subprocess.run(
        command,
        cwd=CHECKS.parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
