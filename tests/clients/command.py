"""Runs the `baton` command as a user does, and says what a good failure looks like."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEMO_MODEL = ROOT / "demo" / "model"
THREADS = {"OMP_NUM_THREADS": "1"}


def baton(*arguments, stdin="", timeout_s=60.0, environment=None):
    """Run the command; return its CompletedProcess with text output."""
    return subprocess.run(
        [sys.executable, "-m", "baton_client.cli", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, **THREADS, **(environment or {})},
    )


def assert_one_clear_line(done, *words, code=1):
    """The command failed as it should: one line, no traceback, no output."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("baton: ")
    for word in words:
        assert word in lines[0]


def output_of(process):
    """Standard output of a process that was started with a pipe there."""
    assert process.stdout is not None
    return process.stdout


def errors_of(process):
    """Standard error of a process that was started with a pipe there."""
    assert process.stderr is not None
    return process.stderr


def json_lines(text):
    return [json.loads(line) for line in text.splitlines()]


def processes_with(word):
    """Ids of living processes whose command line contains `word`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if word in command and state != "Z":
                found.append(int(entry.name))
    return found
