"""`make demo`: three trained answers at once, times, a clean end, and readable errors."""

import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from demo.corpus import load_pairs
from demo.panels import Lines, _split
from demo.run import TRAINED_QUESTIONS
from tests.clients.command import ROOT, THREADS, processes_with

COMMAND = [sys.executable, str(ROOT / "demo" / "run.py")]
ANSWERS = {pair.questions[0]: pair.answer for pair in load_pairs()}


def run_demo(*arguments):
    environment = {**os.environ, **THREADS}
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=110, env=environment, cwd=ROOT
    )


def test_three_answers_with_times():
    done = run_demo()
    assert done.returncode == 0, done.stderr
    streams = re.findall(r"^\[(\d)\] (.*)$", done.stdout, re.MULTILINE)
    for number, question in enumerate(TRAINED_QUESTIONS, 1):
        asked, *answer = [text for label, text in streams if label == str(number)]
        assert asked == question
        assert "".join(" ".join(answer).split()) == "".join(ANSWERS[question].split())
    figures = re.findall(r"TTFT [\d.]+ ms, ITL median [\d.]+ ms, p99 [\d.]+ ms", done.stdout)
    assert len(figures) == 3
    assert re.search(r"^all  TTFT median [\d.]+ ms, ITL median", done.stdout, re.MULTILINE)
    assert "Stopped." in done.stdout
    address = re.search(r"is served at (\S+)", done.stdout)
    assert address is not None
    assert processes_with(address[1]) == []


def test_panels_on_a_terminal():
    primary, secondary = pty.openpty()
    with subprocess.Popen(
        COMMAND, stdout=secondary, stderr=secondary, env={**os.environ, **THREADS, "TERM": "xterm"}, cwd=ROOT
    ) as process:
        os.close(secondary)
        shown = b""
        while True:
            try:
                shown += os.read(primary, 65536)
            except OSError:  # the terminal closes with its last writer
                break
        assert process.wait(60) == 0, shown.decode(errors="replace")
    os.close(primary)
    text = shown.decode()
    assert "╭" in text
    assert all(question in text for question in TRAINED_QUESTIONS)
    assert "Traceback" not in text


def test_a_missing_model_is_one_message(tmp_path):
    done = run_demo("--model", str(tmp_path / "nowhere"))
    assert done.returncode != 0
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def short_folder():
    """A folder whose path leaves room for sockets."""
    with tempfile.TemporaryDirectory(prefix="b-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_behind(sign, short_folder):
    environment = {**os.environ, **THREADS, "TMPDIR": str(short_folder)}
    with subprocess.Popen(
        COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=ROOT
    ) as process:
        deadline = time.monotonic() + 60
        while not list(short_folder.glob("baton-*/worker-0.log")) and time.monotonic() < deadline:
            time.sleep(0.02)
        (run_dir,) = short_folder.glob("baton-*")
        process.send_signal(sign)
        assert process.wait(30) in (130, 143)
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
    assert processes_with(str(run_dir)) == []
    assert not run_dir.exists()


def test_trained_questions_are_trained():
    assert set(TRAINED_QUESTIONS) <= set(ANSWERS)


@pytest.mark.parametrize("text", ["", "a b", "word " * 50, "x" * 300, "one\ntwo\n\nthree", "é" * 73])
def test_lines_keep_every_word(text, capsys):
    lines = Lines(1)
    for start in range(0, len(text), 7):
        lines.add(0, text[start : start + 7])
    lines.end(0)
    shown = [line.removeprefix("[1] ") for line in capsys.readouterr().out.splitlines()]
    assert "".join("".join(shown).split()) == "".join(text.split())
    assert all(len(line) <= 72 for line in shown)


def test_a_line_breaks_at_a_space():
    assert _split("word " * 20) == (("word " * 15)[:72].rpartition(" ")[0], "word " * 6)
