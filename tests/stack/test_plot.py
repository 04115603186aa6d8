"""The drawing of results: what is no result is named in one line."""

import json
import subprocess
import sys

import pytest

from tests.support.processes import ROOT

pytest.importorskip("matplotlib")


def plot(results, out):
    command = [sys.executable, "bench/plot.py", str(results), str(out)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file or directory"),
        (b"no json", "Expecting value: line 1 column 1 (char 0)"),
        (b"\xff", "can't decode byte"),
        (b"[]", "no result of bench/gpu.py"),
        (b'{"bench": "idle gaps"}', "no result of bench/gpu.py"),
        (b'{"shapes": {"tiny": {"baton": {"tpot_ms_b1": 1}}}}', "no shape with figures of both engines"),
        (
            b'{"shapes": {"tiny": {"baton": {"tpot_ms_b1": 1}, "vllm": {"start_cold_s": 1}}}}',
            "no shape with figures of both engines",
        ),
    ],
)
def test_what_is_no_result_is_named_in_one_line(tmp_path, content, says):
    results = tmp_path / "results.json"
    if content is not None:
        results.write_bytes(content)
    done = plot(results, tmp_path / "out.png")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"bench/plot.py: {results}: ")
    assert says in line
    assert not (tmp_path / "out.png").exists()


def test_a_result_is_drawn(tmp_path):
    results = tmp_path / "results.json"
    one = {"baton": {"tpot_ms_b1": 0.7}, "vllm": {"tpot_ms_b1": 1.4}}
    results.write_text(json.dumps({"shapes": {"tiny": one, "large": {"baton": {"tpot_ms_b1": 2.0}}}}))
    done = plot(results, tmp_path / "out.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
