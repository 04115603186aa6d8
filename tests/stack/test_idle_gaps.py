"""Idle time from a trace: the arithmetic, and a whole run on the CPU, where operators stand for kernels."""

import json
import subprocess
import sys

import pytest

from bench.idle_gaps import Span, gaps_of, spans_of, summary
from tests.support.processes import ROOT


def test_overlapping_spans_leave_only_true_gaps():
    spans = [Span(0, 10, "a"), Span(2, 4, "b"), Span(9, 12, "c"), Span(13, 14, "d"), Span(14, 20, "e")]
    assert gaps_of(spans) == [(1, "c", "d")]


def test_a_long_span_hides_what_ends_within_it():
    spans = [Span(0, 100, "long"), Span(5, 6, "a"), Span(50, 60, "b"), Span(110, 120, "c")]
    assert gaps_of(spans) == [(10, "long", "c")]


def test_shares_of_the_wall_time():
    spans = [
        Span(0, 40, "k"),
        Span(42, 60, "advance_kernel"),
        Span(80, 98, "k"),
        Span(98, 100, "advance_kernel"),
    ]
    found = summary(spans)
    assert (found["wall_ms"], found["steps"], found["step_ms"]) == (0.1, 2, 0.05)
    assert (found["idle_percent"], found["starved_percent"], found["starved_gaps"]) == (22.0, 20.0, 1)
    assert found["longest_us"][0] == [20.0, "advance_kernel", "k"]
    assert found["us_per_step"] == {"k": 29.0, "advance_kernel": 10.0}


def event(begin: float, length: float, kind: str = "kernel") -> dict[str, object]:
    return {"ph": "X", "cat": kind, "ts": begin, "dur": length, "name": kind}


def test_both_ends_of_a_trace_and_what_runs_on_the_host_are_left_out():
    host = [event(10 * i, 10, "cuda_runtime") for i in range(10)]
    device = [event(10 * i, 5) for i in reversed(range(100))] + [{"ph": "M", "name": "process_name"}]
    spans = spans_of({"traceEvents": [*host, *device]})
    assert [span.begin for span in spans] == [10.0 * i for i in range(20, 90)]


def test_a_trace_with_nothing_of_the_device_is_refused():
    with pytest.raises(ValueError, match="nothing ran"):
        spans_of({"traceEvents": [event(0, 1, "cuda_runtime")]})


def test_a_whole_run(tmp_path):
    command = [sys.executable, "-m", "bench.idle_gaps", "demo/model", "--device=cpu", "--batches", "1", "2"]
    command += ["--steps=10", f"--traces={tmp_path}", "--worker=--max-num-seqs 4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    batches = json.loads(done.stdout.splitlines()[-1])["batches"]
    assert list(batches) == ["1", "2"]
    for found in batches.values():
        assert 0 < found["starved_percent"] <= found["idle_percent"] < 100
        assert found["untraced_ms_per_token"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trace-1.json", "trace-2.json"]
