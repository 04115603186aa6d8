"""The benches of the stack run, account for every token by the worker's own log, and end with JSON."""

import json
import subprocess
import sys

from tests.support.processes import ROOT


def test_a_quick_run():
    command = [sys.executable, "-m", "bench.streaming", "--quick", "--step-us=3000", "--frontends=2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["bench"], summary["step_us"], summary["frontends"]) == ("streaming", 3000, 2)
    assert [case["by"] for case in summary["cases"]] == ["mux", "plain"]
    for case in summary["cases"]:
        assert 0 < case["added_ms_p50"] <= case["added_ms_p99"] <= case["added_ms_max"]
        assert 0 < case["tokens_per_s"] < 16 / 0.003
    mux, plain = summary["cases"]
    assert mux["messages_per_s"] < plain["messages_per_s"] / 2


def test_first_tokens():
    command = [sys.executable, "-m", "bench.first_token", "--quick", "--tokens=300", "--gap-ms=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["bench"], summary["tokens"]) == ("first_token", 300)
    for kind in ("short", "cold", "hit"):
        figures = summary[kind]
        assert 0 < figures["added_best_ms"] <= figures["added_ms"] < figures["first_token_ms"]
        assert all(figures[f"{part}_ms"] > 0 for part in ("there", "worker", "back"))
