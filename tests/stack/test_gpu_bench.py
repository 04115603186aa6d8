"""The GPU benchmark where there is none: Baton's whole stack on CPU beside a stand-in for vLLM's package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.figures import SCALES
from bench.gpu import better, table
from bench.roofline import limits
from bench.shapes import SHAPES

ROOT = Path(__file__).resolve().parents[2]

# Its interface as vLLM 0.26 has it, as far as the adapter uses it; every step gives each request one token.
_VLLM = """
from enum import Enum
from types import SimpleNamespace
from vllm import sampling_params
from vllm.sampling_params import SamplingParams

class _Engine:
    def __init__(self):
        self.running = {}
    def add_request(self, request_id, prompt, params):
        assert isinstance(request_id, str) and request_id not in self.running
        assert prompt["prompt_token_ids"] and params.ignore_eos and not params.detokenize
        self.running[request_id] = [params, 0]
    def has_unfinished_requests(self):
        return bool(self.running)
    def step(self):
        outputs = []
        for name, state in list(self.running.items()):
            state[1] += 1
            params, done = state
            over, final = done == params.max_tokens, params.output_kind.name == "FINAL_ONLY"
            if over:
                del self.running[name]
            if over or not final:
                ids = list(range(done)) if final else [done]
                outputs.append(SimpleNamespace(request_id=name, outputs=[SimpleNamespace(token_ids=ids)]))
        return outputs

class LLM:
    def __init__(self, model, *, max_model_len, max_num_seqs, enable_prefix_caching, gpu_memory_utilization,
                 load_format):
        assert load_format == "dummy" and enable_prefix_caching
        self.llm_engine = _Engine()
"""
_SAMPLING = """
from enum import Enum

class RequestOutputKind(Enum):
    CUMULATIVE, DELTA, FINAL_ONLY = 0, 1, 2

class SamplingParams:
    def __init__(self, *, temperature, max_tokens, ignore_eos, detokenize, output_kind):
        self.__dict__.update(locals())
"""


def test_both_engines_in_one_run(tmp_path: Path) -> None:
    package = tmp_path / "site" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(_VLLM)
    (package / "sampling_params.py").write_text(_SAMPLING)
    out = tmp_path / "results.json"
    command = [sys.executable, "bench/gpu.py", "--device", "cpu", "--scale", "small", "--shapes", "tiny"]
    command += ["--vllm-site", str(package.parent), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=_environment())
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert results == json.loads(out.read_text())
    ours, theirs = (results["shapes"]["tiny"][engine] for engine in ("baton", "vllm"))
    figures = {"tpot_ms_b1", "tpot_ms_b4", "ttft_long_cold_ms", "ttft_long_hit_ms", "throughput_tok_s"}
    assert ours.keys() == theirs.keys() | {"start_warm_s"}
    assert figures | {"start_cold_s", "online_20_per_s"} <= theirs.keys()
    assert ours["throughput_tok_s"][0] > 0 and ours["online_20_per_s"]["ttft_ms_p99"] > 0


def test_an_engine_that_is_not_there_costs_only_itself() -> None:
    command = [sys.executable, "bench/gpu.py", "--device", "cpu", "--scale", "small", "--shapes", "tiny"]
    done = subprocess.run(
        [*command, "--engines", "vllm"], cwd=ROOT, capture_output=True, text=True, env=_environment()
    )
    assert done.returncode == 1
    assert "No module named 'vllm'" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["shapes"]["tiny"] == {"vllm": {}}


def test_a_package_of_ours_that_is_not_there_ends_the_run_at_once(tmp_path: Path) -> None:
    (tmp_path / "zmq.py").write_text("raise ModuleNotFoundError(\"No module named 'zmq'\")")
    command = [sys.executable, "bench/gpu.py", "--device", "cpu", "--scale", "small", "--shapes", "tiny"]
    environment = _environment() | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "Baton cannot start here, it needs its extras scheduler and worker: "
        "ModuleNotFoundError: No module named 'zmq'"
    ]


def test_parts_are_measured_alone() -> None:
    command = [sys.executable, "bench/gpu.py", "--device", "cpu", "--scale", "small", "--shapes", "tiny"]
    command += ["--engines", "baton", "--parts", "first-token"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=_environment())
    assert done.returncode == 0, done.stderr
    ours = json.loads(done.stdout.splitlines()[-1])["shapes"]["tiny"]["baton"]
    assert ours.keys() == {"start_cold_s", "start_warm_s", "ttft_long_cold_ms", "ttft_long_hit_ms"}


def test_limits_are_those_of_the_arithmetic() -> None:
    rates = {"copy_tb_s": 4.27, "bf16_tflop_s": 790.0}
    small = limits(SHAPES["0.6b"], SCALES["full"], rates)
    # weights of 0.6B without the embedding's copy: 1.19 GB, 0.28 ms; a position is 112 KiB
    assert SHAPES["0.6b"].step_bytes == pytest.approx(1.19e9, rel=0.01)
    assert SHAPES["0.6b"].position_bytes == 112 * 1024
    assert small["tpot_ms_b1"] == pytest.approx(1.19e9 / 4.27e9 + 288 * 114_688 / 4.27e9, rel=0.01)
    assert small["throughput_tok_s"] == pytest.approx(36_000, rel=0.05)
    large = limits(SHAPES["8b"], SCALES["full"], rates)
    assert large["tpot_ms_b1"] == pytest.approx(3.55, rel=0.02)
    assert large["throughput_tok_s"] == pytest.approx(12_700, rel=0.1)
    assert large["ttft_long_cold_ms"] == pytest.approx(177, rel=0.1)


def test_the_roofline_measures_nothing_for_who_asks_for_help() -> None:
    command = [sys.executable, "-m", "bench.roofline", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=_environment())
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: python -m bench.roofline")


def test_better_is_more_of_a_rate_and_less_of_a_time() -> None:
    assert better("throughput_tok_s", 24.0, 20.0) == 1.2
    assert better("tpot_ms_b1", 0.8, 1.6) == 2.0
    assert better("tpot_ms_b1", 0.8, None) is None


def test_the_table_says_which_goals_are_reached() -> None:
    figures = {
        "baton": {"tpot_ms_b1": 0.70, "tpot_ms_b8": 0.9, "throughput_tok_s": [23_000, 25_000]},
        "vllm": {"tpot_ms_b1": 1.4, "throughput_tok_s": [20_000]},
    }
    rows = {row.split()[0]: row.split() for row in table("0.6b", figures).splitlines()}
    assert rows["tpot_ms_b1"][1:] == ["0.7", "1.4", "2", "0.75", "yes", "-"]
    assert rows["tpot_ms_b8"][1:] == ["0.9", "-", "-", "0.85", "no", "-"]
    assert rows["throughput_tok_s"][1:] == ["25,000", "20,000", "1.25", "1.2×", "yes", "-"]


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "VLLM_SITE"}
