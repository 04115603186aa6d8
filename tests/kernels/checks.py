"""Runs the checks of one file in `device/` in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "device"
NAMES = sorted(path.stem for path in FOLDER.glob("check_*.py"))


def run(name, *, interpreted):
    """(exit code, output) of pytest; 0 only where checks ran and all passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-o", "addopts=--import-mode=importlib", "-o", "python_files=check_*.py"]
    done = subprocess.run(
        [*command, FOLDER / f"{name}.py"],
        cwd=FOLDER.parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1" if interpreted else "0"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr
